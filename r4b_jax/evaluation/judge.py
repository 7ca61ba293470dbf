"""Scores of many rows at once, with a judge where one is needed.

A judge is whatever answers texts: `EndpointJudge` asks an OpenAI-compatible server, and the
project's own model, or a test, needs only an `ask`. What it never answers stays unjudged.
"""

import concurrent.futures
import dataclasses
import logging
from collections.abc import Sequence
from typing import Protocol

from r4b_jax.common.endpoint import Endpoint, Request, user_message
from r4b_jax.config import ConfigError, EndpointConfig
from r4b_jax.evaluation import tables
from r4b_jax.evaluation.benchmarks import Benchmark
from r4b_jax.evaluation.scoring import symbolic, wording
from r4b_jax.evaluation.scoring.choice import group_of
from r4b_jax.evaluation.scoring.contract import Ask, Result, Row


@dataclasses.dataclass(frozen=True)
class Question:
    """What a judge is asked."""

    text: str
    system: str = ""
    number: int = 0  # the same text asked again: an answer drawn anew is wanted
    temperature: float = 0.0
    kind: str = ""  # which of the questions this is: see scoring/wording.py
    row: int = 0  # the place of the row it is about


class Judge(Protocol):
    wording: wording.Wording

    def ask(self, questions: Sequence[Question], progress=None) -> list[str | None]:
        """Replies in order, without thoughts; None = none came."""


class EndpointJudge:
    """Asks the model of an OpenAI-compatible server.

    Bounded concurrency, retries with back-off and the cache on disk are `common/endpoint.py`'s, so
    a run that was stopped goes on where it was. A server that is gone, or refuses the key, leaves
    rows unjudged: run again when it is up. `temperature` is VLMEvalKit's for each try (0, then up
    by 0.5 where it does so), `max_tokens` is the config's own. A judge that thinks must be served
    so that its thought comes apart, or with thinking off.

    Args:
      cache: a folder for the replies.
      checkout: a checkout of VLMEvalKit, for its wording of the questions; "" = ours.
    Attributes:
      fault: why the judge is given up, "" while it is not.
      asked, failed: questions, and those without a reply.
    """

    def __init__(self, config: EndpointConfig, cache: str, checkout: str = "", first_wait=1.0):
        self.config, self.cache, self.first_wait = config, cache, first_wait
        self.wording = wording.of_checkout(checkout) if checkout else wording.own()
        self.fault, self.asked, self.failed = "", 0, 0

    def ask(self, questions: Sequence[Question], progress=None) -> list[str | None]:
        replies: list[str | None] = [None] * len(questions)
        for temperature in sorted({question.temperature for question in questions}):
            places = [i for i, q in enumerate(questions) if q.temperature == temperature]
            found = self._ask([questions[i] for i in places], temperature, progress)
            for i, reply in zip(places, found):
                replies[i] = reply
        self.asked += len(questions)
        self.failed += replies.count(None)
        return replies

    def _ask(self, questions: Sequence[Question], temperature: float, progress):
        if self.fault:
            return [None] * len(questions)
        config = dataclasses.replace(self.config, temperature=temperature)
        requests = [
            Request(user_message(question.text, system=question.system), question.number)
            for question in questions
        ]
        try:
            with Endpoint(config, self.cache, self.first_wait) as endpoint:
                return [answer.text for answer in endpoint.ask(requests, progress)]
        except ConfigError as error:
            self.fault = str(error)
            logging.warning("the judge is given up, rows it should see stay unjudged: %s", error)
            return [None] * len(questions)


def score_all(
    benchmark: Benchmark,
    rows: Sequence[Row],
    predictions: Sequence[str],
    judge: Judge | None = None,
    profile: str = "head",
    progress=None,
) -> list[Result]:
    """The results of all rows of a prediction file, in order.

    Args:
      predictions: the answers alone (see `tables.split_think`), as they are written to the file;
        they are scored as VLMEvalKit reads them back from it.
      judge: None = VLMEvalKit's exact matching, where there is such a thing.
      progress: told by `advance(number)` as the judge's replies come.
    """
    predictions = tables.read_back(predictions)
    judged = judge is not None and benchmark.judge != "no"
    replies: list[list | None] = [[] if judged else None for _ in rows]

    def scored(i: int) -> Result | Ask:
        return benchmark.score(rows[i], predictions[i], replies[i], profile)

    with concurrent.futures.ThreadPoolExecutor(symbolic.WORKERS) as threads:  # formulas are slow
        results = list(threads.map(scored, range(len(rows))))
        while waiting := _next_questions(benchmark, rows, results):
            questions = [_question(judge.wording, results[i], i) for i in waiting]
            for i, reply in zip(waiting, judge.ask(questions, progress)):
                replies[i].append(reply)
            for i, result in zip(waiting, threads.map(scored, waiting)):
                results[i] = result
    return results


def _question(words: wording.Wording, ask: Ask, row: int) -> Question:
    system = words.system.get(ask.kind, "")
    return Question(words.text(ask), system, ask.number, ask.temperature, ask.kind, row)


def _next_questions(
    benchmark: Benchmark, rows: Sequence[Row], results: list[Result | Ask]
) -> list[int]:
    """The rows whose question is asked now. Of MMBench's groups one row at a time, by index, and
    none any more once the group is lost: those rows are marked as skipped."""
    waiting = [i for i, result in enumerate(results) if isinstance(result, Ask)]
    if not benchmark.circular:
        return waiting
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(group_of(row), []).append(i)
    first, asked = [], set(waiting)
    for members in groups.values():
        asking = sorted(asked.intersection(members), key=lambda i: rows[i]["index"])
        if any(isinstance(results[i], Result) and results[i].score == 0 for i in members):
            for i in asking:
                details = {"prefetched": None, "extracted": None, "skipped": True}
                results[i] = Result(None, details, fallback=None)
        else:
            first += asking[:1]
    return first
