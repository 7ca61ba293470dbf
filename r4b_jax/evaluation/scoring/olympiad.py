"""OlympiadBench: formulas compared by sympy, answers in any order, no judge."""

import re
from collections.abc import Sequence

from r4b_jax.evaluation.scoring import symbolic
from r4b_jax.evaluation.scoring.contract import Cell, Profile, Result, Row, text
from r4b_jax.evaluation.scoring.reading import ruled
from r4b_jax.evaluation.scoring.report import Report, Scored
from r4b_jax.evaluation.tables import pandas_float

PRECISION = 1e-8
FINAL = {"zh": "所以最终答案是(.*)", "en": "So the final answer is (.*)"}
SOURCES = (
    "OE_MM_maths_en_COMP",
    "OE_MM_maths_zh_CEE",
    "OE_MM_maths_zh_COMP",
    "OE_MM_physics_en_COMP",
    "OE_MM_physics_zh_CEE",
    "OE_TO_maths_en_COMP",
    "OE_TO_maths_zh_CEE",
    "OE_TO_maths_zh_COMP",
    "OE_TO_physics_en_COMP",
    "OE_TO_physics_zh_CEE",
)
_SYMBOLS = {
    "\\left": "",
    "\\right": "",
    "∶": ":",
    "，": ",",
    "$": "",
    "\\approx": "=",
    "\\simeq": "=",
    "\\sim": "=",
    "^\\prime": "'",
    "^{\\prime}": "'",
    "^\\circ": "",
    "%": "",
}
_AROUND = "\n$,.:;^_=+`!@#%&*~，。"
_CHINESE = re.compile("[\u4e00-\u9fff]+")


@ruled
def score(row: Row, prediction: str) -> Result:
    """1 if the prediction's answers pair up with the row's. A list of errors that is too short, or
    an `error` column of numbers, ends VLMEvalKit; here the answer is wrong, and the number used."""
    found = re.findall(FINAL["zh" if "zh" in text(row["source"]) else "en"], prediction)
    cut = found[-1].strip() if found else prediction
    answer = text(row["final_answer"])[2:-2]  # the list's brackets and quotes
    errors = None if "Tuple" in text(row["answer_type"]) else row["error"]
    return Result(float(same(cut, answer, precisions(errors))), {"extracted": cut})


def precisions(cell: Cell) -> list[float]:
    """How far off an answer may be: of all answers, or of each."""
    return [_precision(part) for part in text(cell).split(",")]


def _precision(part: str) -> float:
    try:
        value = float(part)
    except ValueError:
        return PRECISION
    return PRECISION if value != value else value  # "nan": no `error` at all


def same(reply: str, answer: str, allowed: list[float]) -> bool:
    """The texts, cleaned, are the same, or their parts pair up in any order."""
    try:
        reply, answer = _cleaned(reply), _cleaned(answer)
    except ValueError:
        return False
    if reply == answer:
        return True
    ours, theirs = (_parts(_CHINESE.sub("", x)) for x in (reply, answer))
    allowed = allowed * len(ours) if len(allowed) == 1 else list(allowed)
    if len(ours) != len(theirs):
        return False
    place = -1
    while ours:
        place = (place + 1) % len(ours)
        if place >= len(allowed):
            return False
        a, precision = ours[place], allowed[place]
        b = next((b for b in theirs if symbolic.within("olympiad_equal", a, b, precision)), None)
        if b is None:
            return False
        ours.remove(a)
        theirs.remove(b)
        allowed.remove(precision)
    return True


def _parts(answer: str) -> list[str]:
    """The answer at its commas outside brackets; x \\pm y is two."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(answer):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append(answer[start:i].strip())
            start = i + 1
    if start < len(answer):
        parts.append(answer[start:].strip())
    signs = {True: "+-", False: " "}
    return [part.replace("\\pm", sign) for part in parts for sign in signs["\\pm" in part]]


def _cleaned(answer: str) -> str:
    """What is boxed, else the formulas of the last line, else all, without ornaments.

    Raises:
      ValueError: a box is not closed.
    """
    answer = _formulas(answer)
    if "\\in " in answer:
        answer = answer.split("\\in ")[1]
    for symbol, plain in _SYMBOLS.items():
        answer = answer.replace(symbol, plain)
    return re.sub(r"\\(?:mathrm|mathbf)\{~?([^}]*)\}", r"\1", answer.strip(_AROUND))


def _formulas(answer: str) -> str:
    boxed = ""
    for match in re.finditer(r"\\boxed{", answer):
        depth, end = 1, match.end()
        while depth and end < len(answer):
            depth += (answer[end] == "{") - (answer[end] == "}")
            end += 1
        if depth:
            raise ValueError("a box is not closed")
        boxed += answer[match.end() : end - 1] + ","
    if boxed:
        return boxed
    last = re.findall(r"\$(.*?)\$", answer.strip().split("\n")[-1])
    return "".join(part + "," for part in last) or answer


def olympiad(rows: Sequence[Scored], profile: Profile) -> Report:
    """In percent, by source, by language and subject, by subject; AVG is of all rows. A source
    without rows is None, where VLMEvalKit divides by zero (so for OlympiadBench_EN and _CN)."""

    def accuracy(*parts: str) -> float | None:
        named = [source for source in SOURCES if all(part in source for part in parts)]
        found = [row.score for row in rows if row["source"] in named]
        return 100 * sum(found) / len(found) if found else None

    line = {source: accuracy(source) for source in SOURCES}
    for language in ("zh", "en"):
        for subject in ("maths", "physics"):
            line[f"{language}_{subject}"] = accuracy(language, subject)
    line |= {subject: accuracy(subject) for subject in ("maths", "physics")}
    right = sum(row.score for row in rows if row["source"] in SOURCES)
    line["AVG"] = 100 * right / len(rows) if rows else None
    # VLMEvalKit prints what it reads back from a file.
    line = {name: x if x is None else pandas_float(repr(x)) for name, x in line.items()}
    return Report([line], line["AVG"], "AVG")
