"""What the mode token does to the think rate: BPO's three treatments and vanilla GRPO.

From the annealed checkpoint of one finished run, with the settings of the run but for one:

    policy      the mode token in the loss, old log-probability from the policy (the run itself)
    mask        the mode token outside the loss
    behaviour   the mode token in the loss, old probability 1/2
    grpo        vanilla GRPO: 2g rollouts that choose a mode (the paper's preference dilemma)

    python -m r4b_jax.main --config=configs/tiny.py            first, makes runs/tiny-seed0
    python experiments/mode_tokens.py --run=runs/tiny-seed0    then, adds mode_tokens/ to it

The figure is the paper's figures 8 and 10 in small: think rate in auto mode over the steps.
"""

import dataclasses
import json
import os

import matplotlib.pyplot as plt
from absl import app, flags, logging

from r4b_jax.common.checkpoint import StageCheckpoints
from r4b_jax.common.metrics import console, read_metrics
from r4b_jax.config import Config, from_config_dict
from r4b_jax.data.worlds import TOPICS, world_tokenizer
from r4b_jax.evaluation.evaluate import evaluate_once
from r4b_jax.evaluation.report import markdown_table
from r4b_jax.rl.loop import run_bpo

_RUN = flags.DEFINE_string("run", "runs/tiny-seed0", "Work folder of a finished run.")

VARIANTS = {
    "policy": {"mode_tokens": "policy"},
    "mask": {"mode_tokens": "mask"},
    "behaviour": {"mode_tokens": "behaviour"},
    "grpo": {"algorithm": "grpo"},
}


def run_variant(config: Config, name: str, run: str) -> str:
    """Train and evaluate one variant; returns its folder."""
    if VARIANTS[name].items() <= dataclasses.asdict(config.bpo).items():
        return run  # the run itself
    folder = os.path.join(run, "mode_tokens", name)
    os.makedirs(folder, exist_ok=True)
    console.print(f"variant {name}")
    config = dataclasses.replace(config, bpo=dataclasses.replace(config.bpo, **VARIANTS[name]))
    tokenizer = world_tokenizer(config.world, run)
    annealed = StageCheckpoints(os.path.join(run, "annealing")).restore_params()
    params = run_bpo(config, annealed, tokenizer, folder)
    evaluate_once(config, params, tokenizer, folder, "after")
    return folder


def summary(folder: str, when: str) -> dict:
    with open(os.path.join(folder, "evaluation", f"{when}.json"), encoding="utf-8") as f:
        return json.load(f)


def draw(folders: dict[str, str], path: str):
    """Think rate, and P(think) beneath it, over the steps: a column a variant, a line a topic."""
    size = (3.4 * len(folders), 5.6)
    figure, axes = plt.subplots(2, len(folders), figsize=size, sharex=True, sharey=True)
    styles = {"non-reasoning": ":", "reasoning": "-", "unrewarded": "--"}
    for column, (name, folder) in zip(axes.T, folders.items()):
        records = read_metrics(folder, "bpo")
        for axis, figure_name in zip(column, ("think_rate", "p_think")):
            for topic, kind in TOPICS.items():
                field = f"eval/{topic}/{figure_name}"
                points = [(r["step"], r[field]) for r in records if field in r]
                axis.plot(*zip(*points), styles[kind], marker=".", label=f"{topic} ({kind})")
            axis.set(ylim=(-0.03, 1.03))
            axis.spines[["top", "right"]].set_visible(False)
        column[0].set_title(name)
        column[1].set_xlabel("BPO step")
    axes[0, 0].set_ylabel("think rate in auto mode")
    axes[1, 0].set_ylabel("P(think) after <think>")
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(_):
    logging.set_verbosity(logging.WARNING)
    run = _RUN.value
    with open(os.path.join(run, "config.json"), encoding="utf-8") as f:
        config = from_config_dict(Config, json.load(f))
    folders = {name: run_variant(config, name, run) for name in VARIANTS}
    out = os.path.join(run, "mode_tokens")
    draw(folders, os.path.join(out, "think_rate.png"))
    tables = {"annealed": summary(run, "before")}
    tables |= {name: summary(folder, "after") for name, folder in folders.items()}
    parts = [f"# Mode tokens, {config.name}, seed {config.seed}", "![think rate](think_rate.png)"]
    for field, title in (("think_rate", "Think rate"), ("accuracy", "Accuracy")):
        rows = [
            [name, *(f"{table[t]['auto'][field]:.1%}" for t in TOPICS)]
            for name, table in tables.items()
        ]
        headers = ["", *(f"{topic} ({kind})" for topic, kind in TOPICS.items())]
        parts += [f"## {title} in auto mode", markdown_table(headers, rows)]
    with open(os.path.join(out, "report.md"), "w", encoding="utf-8") as f:
        f.write("\n\n".join(parts) + "\n")
    with open(os.path.join(out, "report.json"), "w", encoding="utf-8") as f:
        json.dump({"topics": TOPICS, **tables}, f, indent=1)
    console.print("\n\n".join(parts))


if __name__ == "__main__":
    app.run(main)
