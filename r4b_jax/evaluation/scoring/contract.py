"""What every score function takes and gives, and the two profiles.

VLMEvalKit scores a row by rules, asks a judge where the rules find nothing, asks again where the
reply cannot be read, and sometimes asks a second question. So a scorer is a generator: it yields an
`Ask`, is sent the reply, and returns a `Result`. It touches nothing else: `replay` runs one with
the replies that are there, and whoever has a judge runs many together, a round of questions at a
time (evaluation/judge.py).
"""

import dataclasses
from collections.abc import Callable, Generator, Sequence

Cell = str | int | float | bool | None  # None = missing: see tables.py
Row = dict[str, Cell]
# What VLMEvalKit's clients return for "no reply"; it also stands in prediction files.
FAILED = "Failed to obtain answer via API."


@dataclasses.dataclass(frozen=True)
class Profile:
    """VLMEvalKit at one commit, as far as its scores changed."""

    name: str
    commit: str
    answer_is_phrase: bool  # the option matcher reads "answer is B"
    mmvp_pairs: bool  # MMVP: "Overall" is the share of pairs, not of questions
    last_answer_line: bool  # MMMU-Pro COT: the last "Answer:" line counts, not only a single one
    vlmblind_overall: bool  # VLMs are Blind: the table has the mean of the tasks
    countbench_percent: bool
    charxiv_key: str  # what the judge's JSON calls the extracted answer
    free_form_prefetch: bool  # MathVision: the rule stage works (aug2025's died in its threads)


PROFILES = {
    "aug2025": Profile(
        name="aug2025",
        commit="598cbeeae68f91ec08db73d00147865dac2ae046",  # 2025-08-28, the paper's week
        answer_is_phrase=False,
        mmvp_pairs=False,
        last_answer_line=False,
        vlmblind_overall=True,
        countbench_percent=False,
        charxiv_key="extract_answer",
        free_form_prefetch=False,
    ),
    "head": Profile(
        name="head",
        commit="e8e78f05f3080fe28154f2130321f17951c3be94",  # 2026-08-18
        answer_is_phrase=True,
        mmvp_pairs=True,
        last_answer_line=True,
        vlmblind_overall=False,
        countbench_percent=True,
        charxiv_key="extracted_answer",
        free_form_prefetch=True,
    ),
}


# Where a score, or a crash, is not VLMEvalKit's.
DIFFERENCES = (
    "A judge that never replies leaves a row unjudged, outside every mean; VLMEvalKit counts it as "
    "wrong, or falls back to rules, or stops.",
    "Multiple choice: three replies of the judge without a letter leave the row unjudged; "
    "VLMEvalKit draws a random letter.",
    "Table cells are read as Python literals, never run; a cell that is none is taken as text.",
    "MathVision: replies are read as arithmetic (numbers, operators, comparisons, abs, min, max, "
    "pow, round, int, float, bool), never run with eval. Strings, indexing, comprehensions and "
    "other functions have no value. A power of more than a million bits is not equal to anything.",
    "Formulas are compared in a process that ends after 30 seconds: MathVision a comparison, "
    "OlympiadBench a pair of parts, as there.",
    'Empty predictions are scored as "nan" everywhere; they crash VLMEvalKit in MMMU-Pro COT, '
    "VLMs are Blind, WeMath without a judge and CharXiv.",
    "MM-Vet: a grade of nan is no grade, and is asked again; it crashes VLMEvalKit.",
    "DocVQA: an answer that is a list of numbers is compared as text; it crashes VLMEvalKit.",
    "OlympiadBench and VisuLogic: a source or category without rows has no number; VLMEvalKit "
    "divides by zero, so it cannot score OlympiadBench_EN and _CN.",
    "OlympiadBench: an `error` column of nothing but numbers is used; it crashes VLMEvalKit.",
    "VLMs are Blind: answers are compared as text also if a file's are all numbers.",
    "MMVP: an odd last question counts in the average; VLMEvalKit refuses the file. Pairs are not "
    "checked for equal questions.",
    "DynaMath: variants belong together by qid, a problem without variant 1 is left out; "
    "VLMEvalKit crashes. A short answer that is no string is taken as text where a text is asked.",
    "WeMath: a rate of nothing is printed nan%; VLMEvalKit divides by zero.",
    "A result column of nothing but numbers (judge extractions of MathVista) is not turned into "
    "floats, which in VLMEvalKit makes 7.0 an integer.",
    "The judge's replies are limited by the endpoint's own max_tokens, not to 128 or 2048.",
)


@dataclasses.dataclass(frozen=True)
class Ask:
    """A question to the judge. `kind` names its wording (judge.py), `slots` is what that holds."""

    kind: str
    slots: dict[str, str]
    number: int = 0  # which try, from 0: the same question, drawn anew
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True)
class Result:
    """What a row is worth."""

    score: float | None  # 0 to 1; None = unjudged: a judge was needed, and never gave a reply
    details: dict = dataclasses.field(default_factory=dict)  # what was read in the prediction
    # What VLMEvalKit writes for an unjudged row; None where it draws a random answer instead.
    fallback: float | None = 0.0
    asked: int = 0  # questions to the judge

    @property
    def strict(self) -> float | None:
        """The score in VLMEvalKit's tables, where a row without a judge's reply counts as well."""
        return self.fallback if self.score is None else self.score


Scorer = Generator[Ask, str, Result]


def replay(scorer: Scorer, replies: Sequence[str | None] = ()) -> Result | Ask:
    """Run `scorer` with the replies there are: its Result, or the Ask it is waiting for. A reply
    of None is one that the judge owed."""
    asked = 0
    try:
        ask = next(scorer)
        for reply in replies:
            asked += 1
            ask = scorer.send(FAILED if reply is None else reply)
    except StopIteration as stop:
        return dataclasses.replace(stop.value, asked=asked)
    scorer.close()
    return ask


def tries(kind: str, slots: dict, count: int, read: Callable, hotter: bool = False):
    """Ask up to `count` times until `read(reply)` gives something other than None; `hotter` raises
    the temperature by 0.5 each time. Gives (what was read or None, whether any reply came)."""
    answered = False
    for n in range(count):
        reply = yield Ask(kind, slots, n, 0.5 * n if hotter else 0.0)
        if FAILED in reply:
            continue
        answered = True
        if (found := read(reply)) is not None:
            return found, True
    return None, answered


def text(cell: Cell) -> str:
    """A cell as VLMEvalKit's str() has it: a missing one is "nan"."""
    return "nan" if cell is None else str(cell)
