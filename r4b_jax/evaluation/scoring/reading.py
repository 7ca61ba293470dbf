"""Text in pictures and small things seen: DocVQA, OCRBench, CountBench, VLMs are Blind,
VisuLogic. Rules alone, no judge."""

import re
from collections.abc import Sequence

from r4b_jax.evaluation.scoring import options
from r4b_jax.evaluation.scoring.contract import Profile, Result, Row, Scorer, text
from r4b_jax.evaluation.scoring.report import Report, Scored, grouped, mean, percent, share, values


def ruled(rule):
    """A scorer of a rule that never asks: rule(row, prediction) -> Result."""

    def score(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
        return rule(row, prediction)
        yield

    score.__doc__ = rule.__doc__
    return score


# DocVQA

ANLS_THRESHOLD = 0.5


@ruled
def score_docvqa(row: Row, prediction: str) -> Result:
    """Average normalised Levenshtein similarity: 1 - the distance of the nearest answer, or 0 if
    less than 0.5. An answer that is a list of numbers is read as text; it crashes VLMEvalKit."""
    cell = text(row["answer"])
    found = options.literal(cell)
    answers = [str(x) for x in found] if isinstance(found, list) else [cell]
    distances = [_distance(answer, prediction) for answer in answers]
    similarity = 1 - min(distances, default=1.0)
    kept = 0.0 if similarity < ANLS_THRESHOLD else similarity
    return Result(kept, {"gt": answers, "distance": distances})


def _distance(answer: str, prediction: str) -> float:
    """Edits of the cleaned texts, in characters of the longer raw one (in capitals, where a ß is
    two)."""
    edits = _edits(" ".join(answer.lower().split()), " ".join(prediction.lower().split()))
    longest = max(len(answer.upper()), len(prediction.upper()))
    return edits / longest if longest else 0.0


def _edits(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def docvqa(rows: Sequence[Scored], profile: Profile) -> Report:
    """The mean in percent, by split or else by category where there are such columns."""
    line = {}
    column = "split" if any(row["split"] is not None for row in rows) else "category"
    for name in values(rows, column):
        line[name] = percent(mean(row.score for row in rows if row[column] == name))
    line["Overall"] = percent(mean(row.score for row in rows))
    return Report([line], line["Overall"], "Overall")


# OCRBench

FORMULAS = "Handwritten Mathematical Expression Recognition"
RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
OCR_TASKS = ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", FORMULAS)


@ruled
def score_ocrbench(row: Row, prediction: str) -> Result:
    """1 if an accepted answer is a part of the prediction: whatever the case, or in formulas
    whatever the spaces. So "bus 142" holds 42."""
    found = options.literal(row["answer"])
    answers = [str(x) for x in found] if isinstance(found, list | tuple) else [text(found)]
    formula = row["category"] == FORMULAS

    def plain(words: str) -> str:
        words = (words if formula else words.lower()).strip().replace("\n", " ")
        return words.replace(" ", "") if formula else words

    return Result(float(any(plain(answer) in plain(prediction) for answer in answers)))


def ocrbench(rows: Sequence[Scored], profile: Profile) -> Report:
    """Right answers by task, out of 1000 in all."""

    def right(*categories: str) -> int:
        return int(sum(row.score for row in rows if row["category"] in categories))

    line = {"Text Recognition": right(*RECOGNITION)} | {task: right(task) for task in OCR_TASKS}
    line["Final Score"] = sum(line.values())
    line["Final Score Norm"] = line["Final Score"] / 10
    headline = share(line["Final Score"], len(rows))
    return Report([line], headline, "Final Score in percent of the rows")


# CountBench


@ruled
def score_countbench(row: Row, prediction: str) -> Result:
    """1 if the number is a part of the prediction: "14" holds 4."""
    return Result(float(text(row["answer"]) in prediction))


def countbench(rows: Sequence[Scored], profile: Profile) -> Report:
    right = sum(row.score for row in rows)
    accuracy = right / len(rows) if rows else None
    headline = percent(accuracy)
    value = headline if profile.countbench_percent else accuracy
    return Report([{"accuracy": value}], headline, "accuracy")


# VLMs are Blind

BRACED = ("Subway Connections", "Nested Squares", "Line Plot Intersections", "Circled Letter")
CONTAINED = ("Olympic Counting - Pentagons", "Olympic Counting - Circles")
GRIDS = ("Counting Grid - Word Grids", "Counting Grid - Blank Grids")
TOUCHING = "Touching Circles"


@ruled
def score_vlmblind(row: Row, prediction: str) -> Result:
    """A rule for each task. Answers are compared as text; VLMEvalKit crashes on an empty prediction
    and, if every answer of a file is a number, calls all wrong."""
    task, answer = row["task"], text(row["answers"])
    braces = re.search(r"\{(.*?)\}", prediction)
    braced = braces[1] if braces else ""
    if task in BRACED:
        right = braced == answer
    elif task in CONTAINED:
        right = answer in prediction
    elif task == TOUCHING:
        right = answer.lower() in prediction.lower()
    else:
        right = task in GRIDS and _grid(prediction, answer)
    return Result(float(right), {"braces": braced})


def _grid(prediction: str, answer: str) -> bool:
    """Rows and columns in braces after their names, else the first (rows, columns)."""
    try:
        wanted = [int(x) for x in answer.split(",")]
    except ValueError:
        return False
    rows = re.search(r"[Rr]ows?[^{}]*\{(\d+)\}", prediction)
    columns = re.search(r"[Cc]olumns?[^{}]*\{(\d+)\}", prediction)
    if rows and columns:
        return [int(rows[1]), int(columns[1])] == wanted
    pair = re.search(r"\((\d+),\s*(\d+)\)", prediction)
    return pair is not None and [int(pair[1]), int(pair[2])] == wanted


def vlmblind(rows: Sequence[Scored], profile: Profile) -> Report:
    """By task, 0 to 1. Their mean was printed at the paper's time only, and is the headline."""
    tasks = grouped(rows, lambda row: row["task"])
    line = {task: sum(row.score for row in found) / len(found) for task, found in tasks.items()}
    overall = mean(line.values())
    if profile.vlmblind_overall:
        line["overall"] = overall
    return Report([line], percent(overall), "mean of the tasks")


# VisuLogic

LETTERS = ("A", "B", "C", "D")
CATEGORIES = (
    "Quantitative Reasoning",
    "Spatial Reasoning",
    "Positional Reasoning",
    "Attribute Reasoning",
    "Stylistic Reasoning",
    "Other",
)
_PHRASES = (  # in this order; the first that occurs is not always the one that counts
    "answer:",
    "the final answer is:",
    "the answer is option:",
    "the answer is:",
    "the correct answer is option:",
    "the correct answer is:",
    "the answer should be:",
    "the final answer is",
    "the answer is option",
    "the answer is",
    "the correct answer is option",
    "the correct answer is",
    "the answer should be",
)


@ruled
def score_visulogic(row: Row, prediction: str) -> Result:
    r"""The letter in the last \boxed{}, else by where a letter stands, else after a phrase."""
    letter, how = _boxed_letter(prediction), "box"
    if letter not in LETTERS:
        letter, how = _stated_letter(prediction.replace("<|endoftext|>", "")), "lang"
    if letter not in LETTERS:
        letter, how = options.NONE, "error"
    return Result(float(letter == row["answer"]), {"extracted": letter, "how": how})


def _boxed_letter(reply: str) -> str:
    """What the last outermost \\boxed{} holds, or the whole reply where that is no letter.

    A brace closes only with a character other than a backslash before it that no other match has
    used, so of "}}" just the first does.
    """
    if len(reply) < 3:
        return reply.strip()
    content, opened = None, []
    for match in re.finditer(r"\\boxed\{|[^\\]\}", reply):
        if match[0] == r"\boxed{":
            opened.append(match.end())
        elif opened:
            start = opened.pop()
            if not opened:
                content = reply[start : match.start() + 1]
    if content is None:
        return reply.strip()
    for command in (r"\text{", r"\rm{", r"\mathbf{", "$", "}"):
        content = content.replace(command, "")
    if "letter" in content.lower() or "or" in content or len(content) > 2:
        content = reply
    return content.strip()


def _stated_letter(reply: str) -> str | None:
    for x in LETTERS:
        starts = (f"{x}\n", f"({x})\n", f"({x}) {x}\n")
        if reply.endswith((f" {x}.", f" ({x}).")) or reply.startswith(starts):
            return x
    rest = reply.lower()
    for phrase in _PHRASES:
        if phrase in rest:
            rest = rest.split(phrase)[-1].strip().split("\n")[0].split(".")[0]
            if rest.upper() in LETTERS:
                return rest.upper()
    return reply


def visulogic(rows: Sequence[Scored], profile: Profile) -> Report:
    """By category, in percent; one without rows is None, where VLMEvalKit divides by zero."""
    table = []
    for name in ("Overall", *CATEGORIES):
        found = [row.score for row in rows if name in ("Overall", row["category"])]
        hit = int(sum(found))
        table.append(
            {"category": name, "tot": len(found), "hit": hit, "acc": share(hit, len(found))}
        )
    return Report(table, table[0]["acc"], "Overall")
