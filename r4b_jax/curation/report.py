"""The report of curation: a table on the console; report.md, report.json and a figure in its
folder."""

import collections
import json
import os

import matplotlib
import numpy as np
import rich.box
import rich.table

from r4b_jax.common.metrics import console
from r4b_jax.config import Config, to_config_dict
from r4b_jax.curation.output import Output
from r4b_jax.evaluation.report import keep, markdown_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

DECISIONS = ("direct", "reasoning", "set aside")
COLOURS = dict(zip(DECISIONS, ("#55a868", "#dd8452", "#c8c8c8")))
NO_TOPIC = "(unknown)"  # of what cannot be read
EXAMPLES = 2  # queries shown of each decision and cause


def write(config: Config, output: Output, names: dict[str, str]) -> dict:
    """Count all decisions and write the report; returns the content of report.json.

    Args:
      names: who was teacher, judge and reasoner.
    """
    content, examples = _count(output, config.curation.num_answers)
    content = {"name": config.name, "seed": config.seed} | content
    content["who"] = {
        role: {"name": names.get(role, "nobody")} | output.counters.get(role, {})
        for role in ("teacher", "judge", "reasoner")
    }
    content["config"] = json.loads(to_config_dict(config.curation).to_json())
    figure = _draw(content)
    figure.savefig(os.path.join(output.folder, "distribution.png"), dpi=110, bbox_inches="tight")
    plt.close(figure)
    with open(os.path.join(output.folder, "report.md"), "w", encoding="utf-8") as f:
        f.write(_markdown(content, examples))
    keep(content, output.folder)  # last: curation is done
    return content


def _count(output: Output, num_answers: int) -> tuple[dict, list[dict]]:
    """The figures of the report, and a few decisions of each kind."""
    topics: dict = {}
    causes: dict = {decision: collections.Counter() for decision in DECISIONS}
    filters, thoughts = collections.Counter(), collections.Counter()
    examples: list[dict] = []
    for decision, _ in output.read():
        row = topics.setdefault(
            decision["topic"] or NO_TOPIC,
            {"queries": 0, **dict.fromkeys(DECISIONS, 0), "right": [0] * (num_answers + 1)},
        )
        row["queries"] += 1
        row[decision["decision"]] += 1
        if decision["tries"] == num_answers:
            row["right"][decision["right"]] += 1
        counts = causes[decision["decision"]]
        counts[decision["cause"]] += 1
        if counts[decision["cause"]] <= EXAMPLES:
            examples.append(decision)
        thoughts.update([decision["who"]] if decision["who"] else [])
        filters.update(f"{r['who']}: {r['filter']}" for r in decision["refused"])
    examples.sort(key=lambda d: (DECISIONS.index(d["decision"]), d["cause"]))
    content = {
        "queries": sum(row["queries"] for row in topics.values()),
        "decisions": {d: sum(row[d] for row in topics.values()) for d in DECISIONS},
        "topics": dict(sorted(topics.items())),
        "causes": {d: dict(counts.most_common()) for d, counts in causes.items()},
        "thoughts": dict(thoughts.most_common()),
        "refused": dict(filters.most_common()),
        "answers": num_answers,
    }
    return content, examples


HEADERS = ["topic", "queries", *DECISIONS, "reasoning, of decided"]


def table_rows(content: dict) -> list[list[str]]:
    """One row a topic, and one of all."""
    everything = {"queries": content["queries"]} | content["decisions"]
    return [
        [name, f"{row['queries']:,}", *(f"{row[d]:,}" for d in DECISIONS), _share(row)]
        for name, row in [*content["topics"].items(), ("all", everything)]
    ]


def _share(row: dict) -> str:
    decided = row["direct"] + row["reasoning"]
    return f"{row['reasoning'] / decided:.1%}" if decided else "-"


def _cause_rows(content: dict) -> list[list[str]]:
    return [
        [decision, cause, f"{count:,}"]
        for decision, causes in content["causes"].items()
        for cause, count in causes.items()
    ]


def show(content: dict, folder: str):
    """The tables of a report on the console."""
    title = f"{content['name']}, seed {content['seed']}: who thinks"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for i, header in enumerate(HEADERS):
        table.add_column(header, justify="right" if i else "left")
    rows = table_rows(content)
    for i, row in enumerate(rows):
        table.add_row(*row, end_section=i == len(rows) - 2)
    console.print(table)
    for decision in DECISIONS:
        causes = content["causes"][decision]
        told = ", ".join(f"{cause} {count:,}" for cause, count in causes.items())
        console.print(f"{decision}: {told or 'none'}", markup=False)
    if content["refused"]:
        told = ", ".join(f"{by} {count:,}" for by, count in content["refused"].items())
        console.print(f"thoughts refused: {told}", markup=False)
    console.print(f"Report: {os.path.join(folder, 'report.md')}", markup=False)


def _markdown(content: dict, examples: list[dict]) -> str:
    parts = [
        f"# Curation of {content['name']}, seed {content['seed']}",
        "Who thinks, decided without labels: an objective query, of a topic with a reward, needs "
        f"reasoning if all of the teacher's {content['answers']} answers are wrong; of others a "
        "judge decides. *Set aside* is what could not be decided, or has no thought that passed; "
        "decisions.jsonl has the reason of each, samples.jsonl the samples.",
        markdown_table(HEADERS, table_rows(content)),
        "![Samples by topic](distribution.png)",
        "## Why",
        markdown_table(["decision", "cause", "queries"], _cause_rows(content)),
        "## Thoughts",
        _thoughts(content),
    ]
    if refused := content["refused"]:
        rows = [[by, f"{count:,}"] for by, count in refused.items()]
        parts.append(markdown_table(["refused by", "thoughts"], rows))
    if graded := _graded(content):
        count = content["answers"]
        rows = [[topic, *(f"{n:,}" for n in right)] for topic, right in graded.items()]
        parts += [
            f"## Right answers of {count}",
            "Queries by how many of the teacher's answers were right, where all could be graded.",
            markdown_table(["topic", *map(str, range(count + 1))], rows),
        ]
    parts += ["## Who answered", *(_who(role, who) for role, who in content["who"].items())]
    parts += ["## Some queries", *map(_example, examples)]
    return "\n\n".join(parts) + "\n"


def _thoughts(content: dict) -> str:
    kept = [f"{count:,} of the {who}" for who, count in content["thoughts"].items()]
    refused = sum(content["refused"].values())
    return f"Kept: {', '.join(kept) or 'none'}. Refused: {refused:,}."


def _who(role: str, who: dict) -> str:
    counters = ", ".join(f"{count:,} {name}" for name, count in who.items() if name != "name")
    return f"*{role}*: {who['name']}" + (f" ({counters})" if counters else "")


def _example(decision: dict) -> str:
    question = " ".join(decision["question"].split())[:200].replace("`", "'")
    reason = " ".join(decision["reason"].split())[:300]
    told = f"**{decision['decision']}**, {decision['topic'] or NO_TOPIC}: {reason}"
    return f"{told} (`{question}`, {decision['id']})" if question else f"{told} ({decision['id']})"


def _graded(content: dict) -> dict[str, list[int]]:
    """Topic -> queries by right answers, of those that were graded."""
    return {t: row["right"] for t, row in content["topics"].items() if sum(row["right"])}


def _draw(content: dict):
    """The paper's figure 4: samples by topic and decision; and how often the teacher was right."""
    topics, graded = content["topics"], _graded(content)
    order = sorted(topics, key=lambda topic: topics[topic]["queries"])
    height = 1.3 + 0.36 * len(order)
    figure, axes = plt.subplots(
        1, 2, figsize=(11, max(height, 3.2)), width_ratios=(2, 1), squeeze=False
    )
    axis, other = axes[0]
    sizes = [topics[topic]["queries"] for topic in order]
    most, left = max(sizes, default=1), np.zeros(len(order))
    for decision in DECISIONS:
        counts = np.array([topics[topic][decision] for topic in order])
        bars = axis.barh(order, counts, 0.7, left, color=COLOURS[decision], label=decision)
        room = [f"{n:,}" if n > 0.06 * most else "" for n in counts]
        axis.bar_label(bars, room, label_type="center", fontsize=8)
        left = left + counts
    for place, size in enumerate(sizes):
        axis.text(size + 0.01 * most, place, f"{size:,}", va="center", size=8)
    axis.set_xlim(0, 1.12 * most)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("queries")
    axis.set_title("Queries by topic and decision", pad=24)
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    if not graded:
        other.set_visible(False)
        return figure
    counts = np.sum(list(graded.values()), 0)
    colours = [COLOURS["reasoning"]] + [COLOURS["direct"]] * (len(counts) - 1)
    bars = other.bar(range(len(counts)), counts / counts.sum(), color=colours)
    other.bar_label(bars, [f"{100 * n / counts.sum():.0f}%" for n in counts], fontsize=8)
    other.set_xticks(range(len(counts)))
    other.set_yticks([])
    other.set_xlabel(f"right answers of {len(counts) - 1}")
    other.set_title(f"{counts.sum():,} objective queries", pad=24)
    other.spines[["top", "right", "left"]].set_visible(False)
    return figure
