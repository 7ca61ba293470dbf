"""The report of a run: a table on the console, report.md, report.json and figures in the work
folder."""

import contextlib
import json
import os
import time

import matplotlib
import numpy as np
import rich.box
import rich.table
from PIL import Image

from r4b_jax.common import processes
from r4b_jax.common.metrics import console, read_metrics
from r4b_jax.config import Config, to_config_dict
from r4b_jax.data.dialogue import MODES
from r4b_jax.data.worlds import TOPICS
from r4b_jax.evaluation.evaluate import read_records, test_questions

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

COLOURS = {"auto": "#4c72b0", "thinking": "#dd8452", "non-thinking": "#55a868"}
SAMPLES_A_TOPIC = 2


class StageClock:
    """Seconds each stage took, over all the runs it needed: `with clock("joint"): ...`."""

    def __init__(self, workdir: str):
        self.path, self.seconds = os.path.join(workdir, "seconds.json"), {}
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as f:
                self.seconds = json.load(f)

    @contextlib.contextmanager
    def __call__(self, name: str):
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
            if processes.is_first():
                with open(self.path, "w", encoding="utf-8") as f:
                    json.dump(self.seconds, f)


def write(config: Config, workdir: str, seconds: dict[str, float]) -> dict:
    """Write the report of a finished run and show its table; returns the content of report.json."""
    content = {
        "name": config.name,
        "seed": config.seed,
        "topics": TOPICS,
        "before": _summary(workdir, "before"),
        "after": _summary(workdir, "after"),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "config": json.loads(to_config_dict(config).to_json()),
    }
    figures = _figures(content, workdir)
    samples = _samples(config, workdir)
    with open(os.path.join(workdir, "report.md"), "w", encoding="utf-8") as f:
        f.write(_markdown(content, figures, samples))
    keep(content, workdir)  # last: the run is done
    show(content, workdir)
    return content


def keep(content: dict, folder: str):
    """Write `folder`/report.json, which is there only when whole."""
    path = os.path.join(folder, "report.json")
    with open(path + ".part", "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1)
    os.replace(path + ".part", path)


def read(folder: str) -> dict | None:
    """The content of report.json if what is reported in `folder` is done, else None."""
    path = os.path.join(folder, "report.json")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def _summary(workdir: str, when: str) -> dict:
    path = os.path.join(workdir, "evaluation", f"{when}.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def table_rows(content: dict) -> list[list[str]]:
    """One row a topic and mode: accuracy, think rate and tokens, before and after BPO."""
    rows = []
    for topic, kind in content["topics"].items():
        for mode in MODES:
            row = [[topic, kind, ""][MODES.index(mode)], mode]
            for when in ("before", "after"):
                cell = content[when].get(topic, {}).get(mode)
                if cell is None:
                    row += ["-"] * 3
                    continue
                think = f"{cell['think_rate']:.1%}" if mode == "auto" else ""
                row += [f"{cell['accuracy']:.1%}", think, f"{cell['tokens']:.1f}"]
            rows.append(row)
    return rows


HEADERS = ["topic", "mode", "right", "thinks", "tokens", "right*", "thinks*", "tokens*"]


def show(content: dict, workdir: str):
    """The table of a report on the console."""
    title = f"{content['name']}, seed {content['seed']} (* after BPO)"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for i, header in enumerate(HEADERS):
        table.add_column(header, justify="left" if i < 2 else "right")
    for i, row in enumerate(table_rows(content)):
        table.add_row(*row, end_section=i % len(MODES) == len(MODES) - 1)
    console.print(table)
    console.print(_seconds(content))
    console.print(f"Report: {os.path.join(workdir, 'report.md')}")


def _seconds(content: dict) -> str:
    stages = ", ".join(f"{name} {value:.0f}" for name, value in content["seconds"].items())
    return f"Seconds: {stages}; {sum(content['seconds'].values()):.0f} in all."


def markdown_table(headers: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown(content: dict, figures: dict[str, str], samples: list[dict]) -> str:
    parts = [
        f"# {content['name']}, seed {content['seed']}",
        "Test questions, answered by the annealed model and, in columns with a star, after BPO. "
        "Answers are greedy; a reply that was cut off counts as wrong. *tokens* are those after "
        "`<think>`, forced ones included; *thinks* is the share of auto replies that begin with a "
        "thought.",
        markdown_table(HEADERS, table_rows(content)),
        _seconds(content),
    ]
    parts += [f"## {title}\n![{title}]({path})" for title, path in figures.items()]
    parts.append("## Some answers after BPO, in auto mode")
    for s in samples:
        picture = f"![picture]({s['picture']}) " if s["picture"] else ""
        thought = f" *thought:* `{s['thought']}`;" if s["thought"] else " *no thought;*"
        verdict = "right" if s["correct"] else f"wrong, it is {s['reference']}"
        question = s["question"].replace("\n", " / ")
        parts.append(
            f"{picture}**{s['topic']}**: {question}{thought} *answer:* {s['answer']} ({verdict}), "
            f"P(think) {s['p_think']:.2f}"
        )
    return "\n\n".join(parts) + "\n"


def _samples(config: Config, workdir: str) -> list[dict]:
    """A few auto replies of each topic, their pictures saved beside them."""
    records = [r for r in read_records(workdir, "after") if r["mode"] == "auto"]
    questions = test_questions(config, config.eval_questions)
    os.makedirs(os.path.join(workdir, "samples"), exist_ok=True)
    samples, seen = [], {}
    for record, question in zip(records, questions):
        seen[record["topic"]] = seen.get(record["topic"], 0) + 1
        if seen[record["topic"]] > SAMPLES_A_TOPIC:
            continue
        record["picture"] = None
        if question.images:
            record["picture"] = f"samples/{record['topic']}-{seen[record['topic']]}.png"
            size = [3 * s for s in question.images[0].shape[1::-1]]
            picture = Image.fromarray(question.images[0]).resize(size, Image.Resampling.NEAREST)
            picture.save(os.path.join(workdir, record["picture"]))
        samples.append(record)
    return samples


def _figures(content: dict, workdir: str) -> dict[str, str]:
    """Draw the figures; {title: file name}."""
    figures = {
        "Accuracy by topic and mode": ("accuracy.png", _draw_accuracy),
        "Tokens by topic and mode (the paper's figure 7)": ("tokens.png", _draw_tokens),
        "Think rate over BPO steps (figures 5 and 8)": ("think_rate_steps.png", _draw_think_rate),
        "Accuracy over BPO steps (figure 9)": ("accuracy_steps.png", _draw_accuracy_steps),
    }
    for name, draw in figures.values():
        figure = draw(content, read_metrics(workdir, "bpo"))
        figure.savefig(os.path.join(workdir, name), dpi=110, bbox_inches="tight")
        plt.close(figure)
    return {title: name for title, (name, _) in figures.items()}


def _bars(content: dict, field: str, label: str, limit: float | None):
    """Bars of one field by topic and mode, before and after side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    for axis, when in zip(axes, ("before", "after")):
        topics = [t for t in content["topics"] if t in content[when]]
        places = np.arange(len(topics))
        for i, mode in enumerate(MODES):
            values = [content[when][t][mode][field] for t in topics]
            bars = axis.bar(places + (i - 1) * 0.27, values, 0.25, color=COLOURS[mode], label=mode)
            numbers = [f"{100 * v:.0f}" if limit else f"{v:.0f}" for v in values]
            axis.bar_label(bars, numbers, fontsize=7)
        axis.set_xticks(places, topics)
        axis.set_title("annealed" if when == "before" else "after BPO")
        axis.spines[["top", "right"]].set_visible(False)
        if limit:
            axis.set_ylim(0, limit)
    axes[0].set_ylabel(label)
    axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_accuracy(content: dict, _):
    return _bars(content, "accuracy", "accuracy", 1.05)


def _draw_tokens(content: dict, _):
    return _bars(content, "tokens", "tokens a reply", None)


def _curves(content: dict, records: list[dict], field: str, label: str):
    """One field of the small auto-mode evaluations over BPO steps, a line a topic."""
    figure, axis = plt.subplots(figsize=(7, 3.8))
    styles = {"non-reasoning": ":", "reasoning": "-", "unrewarded": "--"}
    for topic, kind in content["topics"].items():
        name = f"eval/{topic}/{field}"
        points = [(r["step"], r[name]) for r in records if name in r]
        if points:
            steps, values = zip(*points)
            axis.plot(steps, values, styles[kind], marker=".", label=f"{topic} ({kind})")
    axis.set(xlabel="BPO step", ylabel=label, ylim=(-0.03, 1.03))
    axis.spines[["top", "right"]].set_visible(False)
    if axis.lines:
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_think_rate(content: dict, records: list[dict]):
    return _curves(content, records, "think_rate", "think rate in auto mode")


def _draw_accuracy_steps(content: dict, records: list[dict]):
    return _curves(content, records, "accuracy", "accuracy in auto mode")
