"""HallusionBench: yes or no, and consistently so."""

import re
from collections.abc import Sequence

from r4b_jax.evaluation.scoring.contract import Profile, Result, Row, Scorer, text, tries
from r4b_jax.evaluation.scoring.report import (
    Report,
    Scored,
    all_right,
    grouped,
    mean,
    percent,
    values,
)

TRIES = 5
UNKNOWN = "Unknown"
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
STRAY_PERIODS = 32  # deleted; those after them stay (a flag of `re` is passed as the count)


def without_punctuation(reply: str) -> str:
    """VQA's cleaning of an answer: a sign is deleted where it stands beside a space anywhere (or a
    number has a comma), else becomes a space; then periods that touch no digit go."""
    cleaned = reply
    comma = re.search(r"\d,\d", reply) is not None
    for sign in PUNCTUATION:
        deleted = comma or f"{sign} " in reply or f" {sign}" in reply
        cleaned = cleaned.replace(sign, "" if deleted else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", cleaned, count=STRAY_PERIODS)


def extract(reply: str) -> str:
    """Yes, No or Unknown."""
    words = without_punctuation(reply.lower()).split()
    if ("yes" in words) == ("no" in words):
        return UNKNOWN
    return "Yes" if "yes" in words else "No"


def score(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    """1 if the word found is the row's answer. The judge is asked where there is no such word."""
    found = extract(prediction)
    details = {"extracted_by_rule": found, "extracted": found}
    if found != UNKNOWN or not judge:
        return Result(float(found == row["answer"]), details)
    read, answered = yield from tries(
        "yes_no",
        {"question": text(row["question"]), "prediction": prediction},
        TRIES,
        lambda reply: word if (word := extract(reply)) != UNKNOWN else None,
        hotter=True,
    )
    details["extracted"] = read or UNKNOWN
    if not answered:
        return Result(None, details)
    return Result(float(read == row["answer"]), details)


def hallusion(rows: Sequence[Scored], profile: Profile) -> Report:
    """aAcc: questions; fAcc: figures with all questions right; qAcc: questions right on all
    figures; in percent. The number that is quoted is the mean of the three."""
    table = [_line("Overall", rows)]
    for column in ("category", "l2-category"):
        for name in values(rows, column):
            table.append(_line(name, [row for row in rows if row[column] == name]))
    three = [table[0][name] for name in ("aAcc", "fAcc", "qAcc")]
    headline = None if None in three else mean(three)
    return Report(table, headline, "mean of aAcc, fAcc and qAcc")


def _line(name: str, rows: Sequence[Scored]) -> dict:
    def consistent(part: int) -> float | None:
        groups = grouped(rows, lambda row: (row["l2-category"], _part(row, 3), _part(row, part)))
        found = ([row.score for row in group] for group in groups.values())
        return percent(mean(all_right(scores) for scores in found))

    accuracy = percent(mean(row.score for row in rows))
    return {"split": name, "aAcc": accuracy, "fAcc": consistent(4), "qAcc": consistent(5)}


def _part(row: Scored, place: int) -> str:
    """Set (3), figure (4) or question (5) of an index such as hb_VD_figure_0_1_1."""
    return f"{row['index']}_____".split("_")[place]
