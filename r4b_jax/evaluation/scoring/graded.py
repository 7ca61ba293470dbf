"""What only a judge can score: MM-Vet, CharXiv, LogicVista."""

import json
from collections.abc import Sequence

from r4b_jax.evaluation.scoring.contract import Cell, Profile, Result, Row, Scorer, text, tries
from r4b_jax.evaluation.scoring.report import Report, Scored, percent, share

TRIES, CHARXIV_TRIES = 5, 10

# MM-Vet

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def score_mmvet(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    """The judge's grade, 0 to 1; 0 if it never gives one. (A grade of nan crashes VLMEvalKit; it is
    no grade here.)"""
    slots = {"question": text(row["question"]), "prediction": prediction}
    slots["answer"] = text(row["answer"])
    grade, answered = yield from tries("mmvet", slots, TRIES, _grade, hotter=True)
    return Result((grade or 0.0) if answered else None)


def _grade(reply: str) -> float | None:
    try:
        grade = float(reply)
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def mmvet(rows: Sequence[Scored], profile: Profile) -> Report:
    """In percent, by capability. A row counts for each that its category names, and a row that
    needs just one counts twice there: VLMEvalKit adds it up as a category, too, in the same sum."""
    found: dict[str, list[float]] = {name: [] for name in (*CAPABILITIES, "Overall")}
    for row in rows:
        category = text(row["category"])
        named = [name for name in CAPABILITIES if name in category]
        named += [name for name in CAPABILITIES if name == category]
        for name in (*named, "Overall"):
            if row.score is not None:
                found[name].append(row.score)
    table = [
        {"Category": name, "tot": len(grades), "acc": share(sum(grades), len(grades))}
        for name, grades in found.items()
    ]
    return Report(table, table[-1]["acc"], "Overall")


# CharXiv

DESCRIPTIVE = {
    **dict.fromkeys(range(1, 8), "Information Extraction"),
    **dict.fromkeys((8, 9, 13, 14, 15), "Enumeration"),
    **dict.fromkeys((10, 12, 19), "Counting"),
    **dict.fromkeys((11, 16, 18), "Pattern Recognition"),
    17: "Compositionality",
}
REASONING = {
    1: "Text-in-Chart",
    2: "Text-in-General",
    3: "Number-in-Chart",
    4: "Number-in-General",
}
UNREAD = "Failed to parse response"


def score_charxiv(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    """The score in the judge's JSON. What is no JSON is asked again; JSON without the two keys is
    0 at once. (An empty prediction crashes VLMEvalKit; here it is judged as "nan".)"""
    prompt = text(row["grading_query"]).replace("{PREDICTION}", prediction)
    found, answered = yield from tries("charxiv", {"prompt": prompt}, CHARXIV_TRIES, _json)
    if not answered:
        return Result(None, {"extracted": UNREAD})
    if not isinstance(found, dict) or not {"score", profile.charxiv_key} <= set(found):
        return Result(0.0, {"extracted": UNREAD})
    try:
        score = float(found["score"])
    except (TypeError, ValueError):
        score = 0.0
    return Result(score, {"extracted": found[profile.charxiv_key]})


def _json(reply: str):
    """What the JSON says; False for null, which is an answer too."""
    try:
        found = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    return False if found is None else found


def charxiv_descriptive(rows: Sequence[Scored], profile: Profile) -> Report:
    return _charxiv(rows, "qid", DESCRIPTIVE)


def charxiv_reasoning(rows: Sequence[Scored], profile: Profile) -> Report:
    return _charxiv(rows, "inst_category", REASONING)


def _charxiv(rows: Sequence[Scored], column: str, names: dict[int, str]) -> Report:
    """0 to 1, by category."""
    judged = [row for row in rows if row.score is not None]
    totals: dict[str, list[float]] = {}
    for row in judged:
        totals.setdefault(names.get(_number(row[column]), "other"), []).append(row.score)
    line = {name: sum(found) / len(found) for name, found in totals.items()}
    total = sum(sum(found) for found in totals.values())
    line["Overall"] = total / len(judged) if judged else None
    return Report([line], percent(line["Overall"]), "Overall")


def _number(cell: Cell) -> int | None:
    try:
        return int(cell)
    except (TypeError, ValueError):
        return None


# LogicVista

SKILLS = ("inductive", "deductive", "numerical", "spatial", "mechanical")


def score_logicvista(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    """1 if the letters of the judge's reply, nothing but capitals, are the answer's in any
    order."""
    slots = {"question": text(row["question"]), "prediction": prediction}
    letters, answered = yield from tries(
        "logicvista",
        slots,
        TRIES,
        lambda reply: reply if reply.isupper() and reply.isalpha() else None,
        hotter=True,
    )
    expected = sorted(x.lower() for x in text(row["answer"]).split(", "))
    right = letters is not None and "".join(sorted(letters.lower())) == "".join(expected)
    return Result(float(right) if answered else None, {"res": letters or None})


def logicvista(rows: Sequence[Scored], profile: Profile) -> Report:
    """In percent, overall and by skill; a row counts for each skill that its `skill` names."""
    table = []
    for name in ("Overall", *SKILLS):
        found = [r.score for r in rows if name == "Overall" or name in text(r["skill"])]
        found = [score for score in found if score is not None]
        hit, total = int(sum(found)), len(found)
        table.append({"Task&Skill": name, "tot": total, "hit": hit, "acc": share(hit, total)})
    return Report(table, table[0]["acc"], "Overall")
