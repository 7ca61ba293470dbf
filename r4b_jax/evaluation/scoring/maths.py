"""Mathematics whose answer a judge extracts: MathVista, MathVision, MathVerse, DynaMath."""

import json
import math
from collections.abc import Sequence

from r4b_jax.evaluation.scoring import arithmetic, options, symbolic
from r4b_jax.evaluation.scoring.contract import Cell, Profile, Result, Row, Scorer, text, tries
from r4b_jax.evaluation.scoring.report import (
    Report,
    Scored,
    all_right,
    grouped,
    mean,
    percent,
    share,
    values,
)
from r4b_jax.evaluation.tables import MISSING, seen

TRIES = 5


def _extraction(kind: str, row: Row, prediction: str, prefetched, right, works=True) -> Scorer:
    """The rule's answer if there is one and the rule `works`, else what the judge extracts: 1 if
    `right(answer)`."""
    ok = works and bool(prefetched)
    details = {"prefetched": prefetched, "prefetch_ok": ok, "res": prefetched}
    if ok:
        return Result(float(right(prefetched)), details)
    slots = {"question": text(row["question"]), "prediction": prediction}
    reply, _ = yield from tries(kind, slots, TRIES, lambda reply: reply, hotter=True)
    details["res"] = None if reply is None or reply in MISSING else reply
    if reply is None:
        return Result(None, details, fallback=float(right("nan")))
    return Result(float(right(seen(reply))), details)


# MathVista


def score_mathvista(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    """A choice by its letter, a number if it is the whole answer. Answers that are a text or a list
    are never right: VLMEvalKit compares a variable that it has not set."""
    if row["question_type"] == "multi_choice":
        choices = options.of_list(row["choices"])
        found = options.match(prediction, choices, profile)

        def right(answer) -> bool:
            return options.match(text(answer), choices, profile) == row["answer_option"]

        return (yield from _extraction("mathvista", row, prediction, found, right))
    kind = {"integer": int, "float": float}.get(row["answer_type"])

    def right(answer) -> bool:
        value, expected = _number(kind, answer), _number(kind, row["answer"])
        return value is not None and value == expected

    found = _number(kind, prediction) if right(prediction) else None
    return (yield from _extraction("mathvista", row, prediction, found, right))


def _number(kind, cell: Cell) -> int | float | None:
    if kind is None:
        return None
    try:
        return kind(cell)
    except (ValueError, TypeError, OverflowError):
        return None


def mathvista(rows: Sequence[Scored], profile: Profile) -> Report:
    """Overall, by task and by skill, in percent."""

    def labels(row: Scored) -> list[str]:
        skills = options.literal(row["skills"])
        skills = [text(x) for x in skills] if isinstance(skills, list | tuple) else [text(skills)]
        return [*skills, text(row["task"])]

    table = _by_label("Task&Skill", rows, labels)
    return Report(table, table[0]["acc"], "Overall")


def mathvision(rows: Sequence[Scored], profile: Profile) -> Report:
    """Overall and by subject, in percent."""
    table = _by_label("Subject", rows, lambda row: [text(row["category"])])
    return Report(table, table[0]["acc"], "Overall")


def _by_label(title: str, rows: Sequence[Scored], labels) -> list[dict]:
    """A row of the table for each label; a row of the benchmark counts in each of its labels."""
    counts: dict = {"Overall": [0, 0, 0]}
    for row in rows:
        if row.score is None:
            continue
        for label in ("Overall", *labels(row)):
            count = counts.setdefault(label, [0, 0, 0])
            count[0] += 1
            count[1] += bool(row.result.details["prefetch_ok"])
            count[2] += int(row.score)
    return [
        {
            title: label,
            "tot": total,
            "prefetch": prefetch,
            "hit": hit,
            "prefetch_rate": share(prefetch, total),
            "acc": share(hit, total),
        }
        for label, (total, prefetch, hit) in counts.items()
    ]


# MathVision


def score_mathvision(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    """A choice by its letter, else an answer that `equal` takes for the row's."""
    answer, choices = row["answer"], options.of_list(row["choices"])
    if choices:
        found = options.match(prediction, choices, profile)

        def right(reply) -> bool:
            letter = options.match(text(reply), choices, profile)
            return letter is not None and equal(letter, answer)

        return (yield from _extraction("mathvision", row, prediction, found, right))

    def right(reply) -> bool:
        return equal(text(reply), text(answer))

    found = prediction if right(prediction) else None
    works = profile.free_form_prefetch
    return (yield from _extraction("mathvision", row, prediction, found, right, works))


def equal(reply: str, answer: Cell) -> bool:
    """The same text but for case, numbers that are close as Python arithmetic, or as LaTeX.

    A reply that is the single letter "a" takes the answer's own value (VLMEvalKit's eval finds a
    variable of that name) and so equals any number.
    """
    reply, answer = reply.lower().strip(), text(answer).lower().strip()
    if reply == answer:
        return True
    try:
        a = arithmetic.value(answer)
        b = arithmetic.value(reply, {"a": a})
        if abs(a - b) < symbolic.CLOSE:
            return True
    except arithmetic.TooLarge:
        return False
    except Exception:
        pass
    return symbolic.within("mathvision_equal", reply, answer)


# MathVerse


def score_mathverse(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    """The judge extracts the answer; if that is not the row's to the letter, the judge compares."""
    found, extracted = yield from tries(
        "mathverse_extract", {"prediction": prediction}, TRIES, lambda reply: reply, hotter=True
    )
    kept, answer = seen(found or ""), text(row["answer"])
    same = kept.strip() == answer.strip()
    details = {"extracted": None if kept == "nan" else kept, "score_prefetch_ok": same}
    if same:
        return Result(1.0 if extracted else None, details)
    slots = {"question": text(row["question_for_eval"]), "answer": answer, "extract": kept}
    verdict, compared = yield from tries(
        "mathverse_score",
        slots,
        TRIES,
        lambda reply: float(reply) if reply.strip() in ("0", "1") else None,
        hotter=True,
    )
    right = verdict or 0.0
    if not (extracted and compared):
        return Result(None, details, fallback=right)
    return Result(right, details)


def mathverse(rows: Sequence[Scored], profile: Profile) -> Report:
    """By version of the problems: overall, by subject and subfield, in percent."""
    facts = {id(row): _metadata(row["metadata"]) for row in rows}
    table = []
    for version, members in grouped(rows, lambda row: row["problem_version"]).items():
        line = {"split": version, "Overall": percent(mean(row.score for row in members))}
        for field in ("subject", "subfield"):
            for name in sorted({facts[id(row)].get(field, "") for row in rows}):
                found = [row.score for row in members if facts[id(row)].get(field, "") == name]
                line[name] = percent(mean(found))
        table.append(line)
    return Report(table, table[0]["Overall"] if table else None, "Overall")


def _metadata(cell: Cell) -> dict:
    try:
        return json.loads(text(cell).replace("'", '"'))
    except ValueError:
        return {}


# DynaMath

_INSTRUCTED = {"multiple choice": "dynamath_choice", "float": "dynamath_float"}


def score_dynamath(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    """The "short answer" of the JSON in the prediction, else the whole as a short answer, else what
    the judge makes of it. A text is right if it is a part of the answer, so nothing at all is."""
    kind = text(row["answer_type"])
    cut = _json_part(prediction)
    found = _short_answer(cut, kind)
    if found is None:
        found = _parsed(cut, kind)
    answered = True
    if found is None:
        ask = _INSTRUCTED.get(kind, "dynamath_text")
        found, answered = yield from tries(
            ask, {"prediction": cut}, 1, lambda reply: _parsed(reply, kind)
        )
    details = {"parse": found is not None, "extracted": None if found in MISSING else found}
    answer = text(row["answer"])
    if found is None:
        right = kind == "multiple choice" and answer in cut[:3].upper()
    elif kind == "float":
        expected = _number(float, answer)
        right = expected is not None and abs(found - expected) <= 0.001
    elif kind == "multiple choice":
        right = found == answer
    else:
        right = found.lower() in answer.lower()
    return Result(float(right) if answered else None, details, fallback=float(right))


def _json_part(prediction: str) -> str:
    """From the first { to the last }, or all; without any backslash."""
    start, end = prediction.find("{"), prediction.rfind("}")
    if 0 <= start < end:
        prediction = prediction[start : end + 1]
    return prediction.replace("\\", "")


def _short_answer(cut: str, kind: str) -> str | float | None:
    try:
        found = json.loads(cut, strict=False).get("short answer")
    except (ValueError, AttributeError, RecursionError):
        return None
    if not isinstance(found, str):
        return str(found) if kind not in _INSTRUCTED and found is not None else None
    return _parsed(found, kind)


def _parsed(reply: str, kind: str) -> str | float | None:
    if kind == "float":
        first = reply if reply.isdigit() else reply.split(" ")[0]
        times_pi = "\u03c0" in first
        value = _number(float, first.split("\u03c0")[0])
        return value if value is None or not times_pi else value * math.pi
    if kind == "multiple choice":
        if len(reply) == 1:
            return reply.upper()
        letters = [x for x in "ABCDE" if x in reply.upper()]
        return letters[0] if len(letters) == 1 else None
    return reply


def dynamath(rows: Sequence[Scored], profile: Profile) -> Report:
    """Average: all variants; Worst Case: problems right in every variant; 0 to 1. The paper's
    numbers fit the worst case (Qwen2.5-VL-7B: 20.1), which is the headline."""
    worst = []
    for members in grouped(rows, lambda row: row["qid"]).values():
        right = all_right([member.score for member in members])
        first = [member for member in members if member["varid"] == 1]
        if first and right is not None:
            worst.append(Scored(first[0].row, Result(right)))
    table = [_setting("Average", rows), _setting("Worst Case", worst)]
    return Report(table, percent(table[1]["Overall"]), "Overall of Worst Case")


def _setting(name: str, rows: Sequence[Scored]) -> dict:
    line = {"Setting": name, "Overall": mean(row.score for row in rows)}
    for title, column in (("Subject", "subject"), ("Level", "knowledge_level")):
        for value in values(rows, column):
            found = [row.score for row in rows if row[column] == value]
            line[f"{title}-{value}"] = mean(found)
    return line
