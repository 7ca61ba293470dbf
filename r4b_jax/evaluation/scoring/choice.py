"""Multiple choice: MMStar, MMBench, MMMU, MMMU-Pro, MMVP, RealWorldQA, AI2D, BLINK."""

import dataclasses
import re
import string
from collections.abc import Sequence

from r4b_jax.evaluation.scoring import options
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
from r4b_jax.evaluation.tables import seen

TRIES = 3
_CHINESE = re.compile("[\u4e00-\u9fff]")
# MMBench's names of abilities, as its tables abbreviate them
SHORT = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def score(row: Row, prediction: str, profile: Profile, judge: bool, kind: str = "") -> Scorer:
    """1 if the letter found in the prediction is the row's answer. Where none is found, the judge
    is asked for one; without a judge that is wrong, as in VLMEvalKit's exact matching.

    VLMEvalKit draws a random letter after three replies without one; here the row is unjudged.
    """
    choices, answer = options.of_row(row), row["answer"]
    found = options.match(prediction, choices, profile)
    details = {"prefetched": found, "extracted": found or options.NONE}
    if found or not judge:
        return Result(float(details["extracted"] == answer), details)
    slots = {"question": text(row["question"]), "options": options.listed(choices)}
    kind = kind or ("mcq_chinese" if _CHINESE.search(slots["question"]) else "mcq")
    letter, _ = yield from tries(
        kind,
        slots | {"prediction": prediction},
        TRIES,
        lambda reply: options.match(reply, choices, profile),
    )
    details["extracted"] = letter
    if letter is None:
        return Result(None, details, fallback=None)
    return Result(float(letter == answer), details)


def score_blink(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    return (yield from score(row, prediction, profile, judge, "mcq_blink"))


def score_mmmu(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    """Open questions become a choice between the answer and "Other Answers": a prediction that
    contains the answer, and is not twice as long as both, is right."""
    if row.get("A") is None:
        row = row | {"A": row["answer"], "B": "Other Answers"}
    if row["answer"] not in tuple(string.ascii_uppercase):
        row = row | {"answer": "A"}
    return (yield from score(row, prediction, profile, judge))


def score_mmmu_pro_vision(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    """The question is in the picture, so the judge does not see it."""
    row = row | {"question": "placeholder"}
    return (yield from score_mmmu(row, prediction, profile, judge))


def score_mmmu_pro_cot(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    """What the last line says that begins with "Answer:" counts. An empty prediction is wrong; it
    crashes VLMEvalKit."""
    cut = seen(last_answer(prediction, profile))  # it goes through another file
    result = yield from score_mmmu(row, cut, profile, judge)
    return dataclasses.replace(result, details=result.details | {"postprocessed": cut})


def last_answer(prediction: str, profile: Profile) -> str:
    """The one capital letter of the "Answer:" line, else its text, else the whole prediction."""
    lines = [line.strip() for line in prediction.strip().split("\n")]
    found = [line for line in lines if line.startswith("Answer:")]
    if not found or len(found) > 1 and not profile.last_answer_line:
        return prediction
    after = found[-1].removeprefix("Answer:")
    seen = after if profile.last_answer_line else found[-1]  # then the A of Answer is one, too
    letters = {x for x in seen if x in string.ascii_uppercase}
    return letters.pop() if len(letters) == 1 else after


# Tables


def accuracy(rows: Sequence[Scored], profile: Profile) -> Report:
    """A row of the table for each split: overall, and by the two levels of category; 0 to 1."""
    table = _table(rows)
    overall = table[0]["Overall"] if len(table) == 1 else mean(row.score for row in rows)
    return Report(table, percent(overall), "Overall")


def validation(rows: Sequence[Scored], profile: Profile) -> Report:
    """MMMU: of its two splits, `validation` counts."""
    table = _table(rows)
    found = [row["Overall"] for row in table if row["split"] == "validation"]
    return Report(table, percent(found[0] if found else None), "Overall of split=validation")


def _table(rows: Sequence[Scored]) -> list[dict]:
    by_split = grouped(rows, lambda row: "none" if row["split"] is None else row["split"])
    table = []
    for split, members in by_split.items():
        line = {"split": split, "Overall": mean(row.score for row in members)}
        for column in ("l2-category", "category"):
            for name in values(rows, column):
                found = [row.score for row in members if row[column] == name]
                line[SHORT.get(name, name)] = mean(found)
        table.append(line)
    return table


def group_of(row: Row) -> int:
    """MMBench asks a question up to four times with its options rotated: the index of the first."""
    group = row.get("g_index")
    return int(row["index"]) % 1_000_000 if group is None else int(group)


def circular(rows: Sequence[Scored], profile: Profile) -> Report:
    """CircularEval: a question is right if it is in every rotation. Its category is the first
    rotation's; a question without that one is left out, as VLMEvalKit does."""
    mains = []
    for group, members in grouped(rows, lambda row: group_of(row.row)).items():
        right = all_right([member.score for member in members])
        main = [member for member in members if int(member["index"]) == group]
        if main and right is not None:
            mains.append(dataclasses.replace(main[0], result=Result(right)))
    return accuracy(mains, profile)


def mmvp(rows: Sequence[Scored], profile: Profile) -> Report:
    """Questions come in pairs, by index. The paper's number is per question: at its time that was
    "Overall", today it is "Average", and "Overall" is the share of pairs with both right.

    A last question without its pair counts in the average alone; VLMEvalKit refuses it.
    """
    rows = sorted(rows, key=lambda row: row["index"])
    average = mean(row.score for row in rows)
    if not profile.mmvp_pairs:
        return Report(_table(rows), percent(average), "Overall")
    both = mean(all_right([a.score, b.score]) for a, b in zip(rows[::2], rows[1::2]))
    return Report([{"Average": average, "Overall": both}], percent(average), "Average")
