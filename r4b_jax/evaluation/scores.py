"""A benchmark's records scored: its part of the report, its prediction files, its scored records.

    OUT/MODEL-MODE/T<time>/MODEL-MODE_DATASET.tsv     what VLMEvalKit's `--mode eval` scores
    OUT/scores/NAME.jsonl                             what `python -m r4b_jax.calibrate` takes

Where there is no answer the prediction is "": see runner.py.
"""

import dataclasses
import json
import os
import re
from collections.abc import Sequence

import numpy as np

from r4b_jax.common.metrics import console
from r4b_jax.evaluation import judge as judging
from r4b_jax.evaluation import tables
from r4b_jax.evaluation.benchmarks import Benchmark
from r4b_jax.evaluation.records import Records, write_whole
from r4b_jax.evaluation.scoring.contract import Result, Row
from r4b_jax.evaluation.scoring.options import REFUSALS

# What counts as a refusal, at the start of an answer; it is only counted, the score is the rules'.
REFUSES = re.compile(
    r"\W*(?:(?:I['’]m|I am) (?:very |so )?sorry|sorry\b|I (?:can(?:no|['’])t|can not|am unable|"
    r"won['’]t)\b|I['’]m (?:unable|not able)|unable to|as an AI\b|抱歉|对不起|我无法|无法回答)",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A benchmark that is run."""

    benchmark: Benchmark
    table: tables.Table
    count: int  # of its rows so many, the first ones
    records: Records

    @property
    def rows(self) -> list[Row]:
        return self.table.rows[: self.count]


def write(job: Job, modes: Sequence[str], about: dict, judge: judging.Judge | None, out: str):
    """Score the records and write the files; the benchmark's part of report.json."""
    benchmark, rows, profile = job.benchmark, job.rows, about["profile"]
    found = _by_mode(job, modes)
    part = {
        "title": benchmark.title,
        "dataset": benchmark.dataset,
        "md5": job.table.md5,
        "rows": len(rows),
        "rows_of_table": len(job.table.rows),
        "judge": benchmark.judge,
        "set_aside": {
            str(rows[row]["index"]): reason for row, reason in sorted(job.records.aside.items())
        },
        "modes": {},
    }
    results = {}
    for mode in modes:
        answers = [record and record["answer"] or "" for record in found[mode]]
        if len(rows) == len(job.table.rows):  # VLMEvalKit refuses a file that lacks rows
            name = f"{about['name']}-{mode}"
            path = tables.prediction_path(out, name, benchmark.dataset, about["started"])
            os.makedirs(os.path.dirname(path), exist_ok=True)
            tables.write_predictions(path, rows, answers)
        results[mode] = score(benchmark, rows, answers, job.records.aside, judge, profile)
        part["modes"][mode] = _cell(benchmark, rows, results[mode], found[mode], profile)
        console.print(_line(benchmark, mode, part["modes"][mode], profile), markup=False)
    path = os.path.join(out, "scores", f"{benchmark.name}.jsonl")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_whole(path, "".join(_scored(found, results)))
    return part


def _by_mode(job: Job, modes: Sequence[str]) -> dict[str, list[dict | None]]:
    """The records in the order of the table, without their thoughts: those fill the memory."""
    found: dict[str, list[dict | None]] = {mode: [None] * job.count for mode in modes}
    for record in job.records.read():
        if "mode" in record:
            slim = {key: value for key, value in record.items() if key != "thought"}
            found[record["mode"]][record["row"]] = slim
    return found


def score(
    benchmark: Benchmark,
    rows: Sequence[Row],
    predictions: Sequence[str],
    aside: dict[int, str],
    judge: judging.Judge | None,
    profile: str,
) -> list[Result]:
    """The result of each row. One set aside has no score, and is not among the unjudged; where
    VLMEvalKit's own number is asked for (`Result.strict`) it has an empty prediction's."""
    kept = [row for row in range(len(rows)) if row not in aside]
    asked = [rows[row] for row in kept], [predictions[row] for row in kept]
    judged = iter(judging.score_all(benchmark, *asked, judge, profile))
    results = []
    for row, cells in enumerate(rows):
        if row not in aside:
            results.append(next(judged))
            continue
        empty = benchmark.score(cells, "nan", None, profile)
        details = empty.details | {"skipped": True, "set_aside": True}
        empty = dataclasses.replace(empty, score=None, fallback=empty.strict, details=details)
        results.append(empty)
    return results


def _cell(benchmark: Benchmark, rows, results, records, profile: str) -> dict:
    """The numbers of a benchmark in one mode."""
    found = benchmark.report(rows, results, profile)
    strict = benchmark.report(rows, results, profile, strict=True)
    some = [record for record in records if record is not None]
    ended = [record for record in some if record["finish"] == "end"]

    def mean(field: str) -> float | None:
        return float(np.mean([record[field] for record in some])) if some else None

    return {
        "score": found.headline,
        "score_name": found.headline_name,
        "vlmevalkit_score": strict.headline,
        "answered": len(some),
        "think_rate": mean("thinks"),
        "p_think": mean("p_think"),
        "tokens": mean("tokens"),
        "prompt_tokens": mean("prompt_tokens"),
        "truncated": len(some) - len(ended),
        "empty": sum(not record["answer"] for record in ended),
        "refused": sum(refuses(record["answer"] or "") for record in ended),
        "neither_mode": sum(record["chosen"] == "neither" for record in some),
        "unjudged": found.unjudged,
        "asked": found.asked,
        "table": found.table,
    }


def _line(benchmark: Benchmark, mode: str, cell: dict, profile: str) -> str:
    number = "no score" if cell["score"] is None else f"{cell['score']:.1f}"
    odd = [f"{cell[key]} {key}" for key in ("truncated", "empty", "unjudged") if cell[key]]
    told = "" if not odd else f" ({', '.join(odd)} of {cell['answered']})"
    return f"{benchmark.dataset} [{profile}], {mode}: {number}{told}"


def _scored(found: dict, results: dict) -> list[str]:
    """Lines of JSON: the records with their scores, of the queries that have one in every mode."""
    lines = []
    for of_query in zip(*(zip(found[mode], results[mode]) for mode in found)):
        if all(record is not None and result.score is not None for record, result in of_query):
            for record, result in of_query:
                more = {"score": result.score, "details": result.details, "asked": result.asked}
                lines.append(json.dumps(record | more, default=str) + "\n")
    return lines


def refuses(answer: str) -> bool:
    """Whether an answer reads as a refusal."""
    return bool(REFUSES.match(answer)) or any(phrase in answer for phrase in REFUSALS)
