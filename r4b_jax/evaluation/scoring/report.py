"""What aggregates return, and the means they are made of."""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from r4b_jax.evaluation.scoring.contract import FAILED, Cell, Result, Row


@dataclasses.dataclass(frozen=True)
class Scored:
    """A row with its result: what aggregates are given, in a list."""

    row: Row
    result: Result

    def __getitem__(self, column: str) -> Cell:
        return self.row.get(column)

    @property
    def score(self) -> float | None:
        return self.result.score


@dataclasses.dataclass(frozen=True)
class Report:
    """An aggregate.

    Attributes:
      table: the rows VLMEvalKit prints; None where it has NaN, or divides by zero.
      headline: the number the paper's table compares, 0 to 100; None if no row is judged.
      headline_name: which number that is.
      num_rows, unjudged, asked: rows, those of them without a score, questions to the judge.
    """

    table: list[dict]
    headline: float | None
    headline_name: str
    num_rows: int = 0
    unjudged: int = 0
    asked: int = 0


def mean(values) -> float | None:
    """numpy's mean, whose last digit is VLMEvalKit's, of those that are not None (unjudged rows);
    None of nothing."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def percent(value: float | None) -> float | None:
    return None if value is None else value * 100


def share(part: float, whole: float) -> float | None:
    """`part` in percent of `whole`, None if that is 0."""
    return part / whole * 100 if whole else None


def values(rows: Sequence[Scored], column: str) -> list[Cell]:
    """What stands in a column, each once, sorted; [] if there is no such column."""
    return sorted({row[column] for row in rows if row[column] is not None}, key=str)


def all_right(found: Sequence[float | None]) -> float | None:
    """The score of a group that is right if all of it is; unjudged only if that would decide."""
    if any(score == 0 for score in found):
        return 0.0
    return None if None in found else 1.0


def grouped(rows: Sequence[Scored], key: Callable) -> dict:
    """{key(row): its rows}."""
    found: dict = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


_REFUSAL = re.compile(
    r"\s*(?:i'?m sorry|i am sorry|sorry|i can(?:no|')t|i am unable|i'm unable|cannot determine)\b",
    re.IGNORECASE,
)


def tally(predictions: Sequence[str]) -> dict[str, int]:
    """What a score hides: how many predictions are empty, begin with a refusal, were never made
    (an API's failure), or are a thought that never ends."""
    return {
        "empty": sum(not x.strip() for x in predictions),
        "refused": sum(bool(_REFUSAL.match(x.replace("\u2019", "'"))) for x in predictions),
        "failed": sum(FAILED in x for x in predictions),
        "unclosed_thought": sum("<think>" in x and "</think>" not in x for x in predictions),
    }
