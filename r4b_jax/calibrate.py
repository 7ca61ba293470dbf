"""Choose the think_bias of a checkpoint from one evaluation in all three modes.

    python -m r4b_jax.calibrate runs/tiny-seed0                       the curve, and no choice
    python -m r4b_jax.calibrate runs/tiny-seed0 --max-drop 0.01 --write runs/tiny-seed0/bpo
    python -m r4b_jax.calibrate mmmu.jsonl ocr.jsonl --target-tokens 800 --write R-4B/

RECORDS are files of records, one in JSON a line, or run folders (their evaluation/after.jsonl).
Nothing is generated: auto mode is decided by one token, so accuracy and tokens at every bias follow
from the forced modes and the log-odds of thinking (r4b_jax/evaluation/knob.py). Written are
knob.md, knob.json and knob.png; with --write also `think_bias` in the checkpoint's
generation_config.json (of a converted checkpoint: in its hugging_face folder; of a stage of a run:
beside its folder, with the step), which `r4b_jax.load` then takes where no other bias is asked for.
"""

import argparse
import json
import math
import os
import sys

COLUMNS = 5  # topics side by side in the figure
POINTS = {
    "non-thinking": "never",
    "thinking": "always",
    "unbiased": "auto, bias 0",
    "chosen": "auto, chosen",
}


def records_of(source: str) -> list[dict]:
    """The records of a file, or of a run after its last stage."""
    from r4b_jax.evaluation import knob

    path = source
    if os.path.isdir(source):
        path = os.path.join(source, "evaluation", "after.jsonl")
    if not os.path.exists(path):
        raise ValueError(f"there are no records {path}")
    return knob.read(path)


def calibrate(records: list[dict], target, *, equal_topics=False, resamples=1000, seed=0) -> dict:
    """{"target", "overall", "topics"}: what `knob.describe` says of all queries, and of each
    topic's at the bias that was chosen for all."""
    from r4b_jax.evaluation import knob

    queries = knob.pair(records)
    if equal_topics:
        queries = queries.equal_topics()
    overall = knob.describe(queries, target, resamples, seed)
    same = knob.Target("bias", overall["chosen"]["bias"]) if target else None
    topics = {}
    for topic in dict.fromkeys(queries.topics.tolist()):
        topics[topic] = knob.describe(queries.take(queries.topics == topic), same, resamples, seed)
    rule = {"rule": target.rule, "value": target.value} if target else None
    return {"target": rule, "equal_topics": equal_topics, "overall": overall, "topics": topics}


# What is told


def _percent(triple, signed: bool = False) -> str:
    if triple is None:
        return "-"
    plus = "+" if signed else ""
    value, low, high = (round(100 * x, 1) + 0.0 for x in triple)  # no minus zero
    return f"{value:{plus}.1f} ({low:{plus}.1f} to {high:{plus}.1f})"


def _number(triple) -> str:
    value, low, high = triple
    digits = 0 if value >= 100 else 1
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


HEADERS = ["topic", "mode", "right %", "thinks %", "tokens", "above random %"]


def table_rows(content: dict) -> list[list[str]]:
    """One row a topic and point, the whole first."""
    rows = []
    for topic, found in {"all": content["overall"], **content["topics"]}.items():
        for point, name in POINTS.items():
            if point in found:
                numbers = found[point]
                rate = {"non-thinking": "0", "thinking": "100"}.get(point)
                rows.append(
                    [
                        topic if point == "non-thinking" else "",
                        name,
                        _percent(numbers["accuracy"]),
                        rate or _percent(numbers["think_rate"]),
                        _number(numbers["tokens"]),
                        "" if rate else _percent(numbers["gain"], signed=True),
                    ]
                )
    return rows


def sentences(content: dict) -> list[str]:
    """What the numbers say, and how far they can be trusted."""
    found, out = content["overall"], []
    rate, tokens = found["areas"]["same_think_rate"], found["areas"]["same_tokens"]
    weigh = "topics weigh the same" if content["equal_topics"] else "queries weigh the same"
    out.append(
        f"{found['count']} queries, {len(content['topics'])} topics; {weigh}. On the mean over the "
        f"curve, auto mode is {_percent(rate, True)} points more accurate than random mixing at "
        f"the same think rate, and {_percent(tokens, True)} at the same tokens."
    )
    if "chosen" in found:
        chosen, wanted = found["chosen"], content["target"]
        out.append(
            f"think_bias {chosen['bias']:g} ({_rule(wanted)}): right "
            f"{_percent(chosen['accuracy'])} %, {_number(chosen['tokens'])} tokens, thinks "
            f"{_percent(chosen['think_rate'])} %; {_percent(chosen['drop'], True)} points below "
            f"always thinking. Random mixing at that think rate: "
            f"{100 * chosen['random']['accuracy']:.1f} % and {chosen['random']['tokens']:.1f} "
            "tokens."
        )
        if apart := chosen["held_out"]:
            out.append(
                f"On queries that had no part in the choice (tenfold): right "
                f"{100 * apart['accuracy']:.1f} %, {apart['tokens']:.1f} tokens, thinks "
                f"{100 * apart['think_rate']:.1f} %."
            )
    if found["certain"] < 1:
        out.append(
            f"Of {1 - found['certain']:.1%} of the queries it is taken, not proven, that the model "
            "begins as in non-thinking mode where it does not think (records with mode_logps and "
            "close_logp tell)."
        )
    if found["auto_differs"]:
        out.append(
            f"WARNING: {found['auto_differs']} auto records are not what is predicted for their "
            "bias. Were all modes run with the same weights, settings and machine?"
        )
    return out


def _rule(target: dict) -> str:
    value = target["value"]
    return {
        "tokens": f"the most accurate with at most {value:g} tokens",
        "think_rate": f"the think rate nearest to {value:.1%}",
        "drop": f"the fewest tokens with a drop of at most {100 * value:g} points",
        "best": "the most accurate",
        "bias": "as given",
    }[target["rule"]]


def markdown(content: dict) -> str:
    from r4b_jax.evaluation.report import markdown_table

    note = (
        "In brackets: 95% intervals over resampled queries. *above random*: accuracy over that of "
        "thinking at random as often, which lies on the straight line between the forced modes."
    )
    parts = ["# Accuracy and tokens at every think_bias", *sentences(content)]
    parts += ["![accuracy against tokens](knob.png)", markdown_table(HEADERS, table_rows(content))]
    return "\n\n".join([*parts, note]) + "\n"


# The figure


def draw(content: dict):
    """Accuracy against tokens, of all queries and of each topic; think rate against bias."""
    from r4b_jax.evaluation.report import COLOURS, plt

    topics = content["topics"] if len(content["topics"]) > 1 else {}
    rows = -(-len(topics) // COLUMNS)
    figure = plt.figure(figsize=(12, 4.6 + 2.5 * rows), layout="constrained")
    top, *below = figure.subfigures(
        1 + bool(rows), 1, height_ratios=[4.6] + [2.5 * rows] * bool(rows)
    )
    main, side = top.subplots(1, 2, width_ratios=[1.7, 1])
    _draw_plane(main, content["overall"], COLOURS)
    main.set(xlabel="tokens a reply", ylabel="right, %", title="every think_bias")
    main.legend(frameon=False, loc="best", fontsize=9)
    _draw_bias(side, content["overall"], COLOURS)
    if rows:
        grid = below[0].subplots(rows, COLUMNS, squeeze=False).ravel()
        for axis in grid[len(topics) :]:
            axis.remove()
        for i, (axis, (topic, found)) in enumerate(zip(grid, topics.items())):
            _draw_plane(axis, found, COLOURS, small=True)
            axis.set_title(topic, fontsize=10)
            axis.tick_params(labelsize=8)
            if i % COLUMNS == 0:
                axis.set_ylabel("right, %", fontsize=9)
            axis.set_xlabel("tokens", fontsize=9)
    return figure


def _draw_plane(axis, found: dict, colours: dict, small: bool = False):
    line, size = found["curve"], 0.55 if small else 1.0
    low, high, right = (
        [100 * x for x in line[n]] for n in ("accuracy_low", "accuracy_high", "accuracy")
    )
    axis.fill_between(line["tokens"], low, high, color=colours["auto"], alpha=0.18, lw=0)
    axis.plot(line["tokens"], right, color=colours["auto"], lw=2 * size, label="auto, any bias")
    ends = [
        (found[m]["tokens"][0], 100 * found[m]["accuracy"][0]) for m in ("non-thinking", "thinking")
    ]
    axis.plot(*zip(*ends), "--", color="0.45", lw=1.3 * size, label="random mixing", zorder=1)
    marks = {"non-thinking": "s", "thinking": "D", "unbiased": "o", "chosen": "*"}
    for name, mark in marks.items():
        if name not in found:
            continue
        (x, *_), (y, *_) = found[name]["tokens"], found[name]["accuracy"]
        label = name if name in colours else "auto, bias 0"
        if name == "chosen":
            label = f"auto, bias {found[name]['bias']:.3g}"
        axis.plot(
            x,
            100 * y,
            mark,
            color=colours.get(name, "#c44e52" if name == "chosen" else colours["auto"]),
            markersize={"*": 17, "o": 6}.get(mark, 11) * size,
            markeredgecolor="white",
            markeredgewidth=size,
            label=label,
            zorder={"*": 4, "o": 5}.get(mark, 3),  # where they meet, all can be seen
            linestyle="none",
        )
    axis.margins(0.06)
    bottom, top = axis.get_ylim()
    short = max(0.0, (10 - (top - bottom)) / 2)  # a point or two must not look like a mountain
    axis.set_ylim(bottom - short, top + short)
    axis.grid(color="0.92", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_bias(axis, found: dict, colours: dict):
    line = found["curve"]
    for name, label, colour in (
        ("think_rate", "thinks", colours["thinking"]),
        ("accuracy", "right", colours["auto"]),
    ):
        values = [100 * x for x in line[name]]
        axis.plot(line["bias"], values, color=colour, lw=2, label=label)
    axis.axvline(0, color="0.8", lw=1, zorder=0)
    if "chosen" in found:
        axis.axvline(found["chosen"]["bias"], color="#c44e52", lw=1.3, ls=":", label="chosen")
    axis.set(xlabel="think_bias", ylabel="% of queries", ylim=(-3, 103), title="what the bias does")
    axis.legend(frameon=False, loc="best", fontsize=9)
    axis.grid(color="0.92", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


# Files


def _replace(path: str, text: str):
    """A file whole or not at all; a link is replaced, what it points to stays."""
    with open(path + ".part", "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".part", path)


def save(content: dict, folder: str):
    """knob.json, knob.png and knob.md, the last when the others are there."""
    from r4b_jax.evaluation.report import plt

    os.makedirs(folder, exist_ok=True)
    _replace(os.path.join(folder, "knob.json"), json.dumps(content, indent=1, allow_nan=False))
    figure = draw(content)
    figure.savefig(os.path.join(folder, "knob.png"), dpi=110, bbox_inches="tight")
    plt.close(figure)
    _replace(os.path.join(folder, "knob.md"), markdown(content))


def write_bias(checkpoint: str, bias: float) -> str:
    """Make `bias` the default of a checkpoint; returns the file. All else in it stays.

    Raises:
      CheckpointError: there is no checkpoint, or its generation config is no JSON.
      ValueError: a bias that is not finite.
    """
    from r4b_jax.common.checkpoint import StageCheckpoints
    from r4b_jax.decoding.chat import BIAS, bias_file, is_stage
    from r4b_jax.models import released
    from r4b_jax.models.convert import CheckpointError

    if not math.isfinite(bias):
        raise ValueError("an infinite bias is a forced mode: ask for that mode")
    file = bias_file(checkpoint)
    folder, name = os.path.split(file)
    step = None
    if os.path.isdir(checkpoint) and is_stage(checkpoint):
        stage = StageCheckpoints(checkpoint)
        step = stage.latest
        stage.close()
        if step is None:
            raise CheckpointError(f"{checkpoint} holds no checkpoint")
        settings = {"step": step}
    elif released.read_json(folder, "config.json") is None:
        raise CheckpointError(f"{checkpoint} is no checkpoint: {folder} has no config.json")
    else:
        settings = released.read_json(folder, name)
        if settings is None:  # what transformers would else read off config.json, and now will not
            settings = _token_ids(released.read_json(folder, "config.json"))
    _replace(file, json.dumps(settings | {BIAS: bias}, indent=2) + "\n")
    return file


def _token_ids(config: dict) -> dict:
    """The ids that end a reply, as config.json has them."""
    both = config.get("text_config", {}) | config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: both[name] for name in names if both.get(name) is not None}


# The command line


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m r4b_jax.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("records", nargs="+", help="files of records, or run folders")
    rule = out.add_mutually_exclusive_group()
    rule.add_argument(
        "--target-tokens", type=float, metavar="N", help="the most accurate with at most N tokens"
    )
    rule.add_argument(
        "--target-think-rate", type=float, metavar="P", help="the think rate nearest to P, 0 to 1"
    )
    rule.add_argument(
        "--max-drop",
        type=float,
        metavar="X",
        help="the fewest tokens with accuracy (0 to 1) at most X below always thinking",
    )
    rule.add_argument("--best", action="store_true", help="the most accurate")
    rule.add_argument("--bias", type=float, metavar="B", help="this one: what does it give?")
    out.add_argument("--equal-topics", action="store_true", help="else queries weigh the same")
    out.add_argument("--write", metavar="CHECKPOINT", help="make the bias this one's default")
    out.add_argument("--out", help="folder of the report; default that of the first records")
    out.add_argument("--resamples", type=int, default=1000, help="for the intervals")
    out.add_argument("--seed", type=int, default=0, help="of the resamples")
    return out


def target_of(args: argparse.Namespace):
    """The Target that the arguments name, or None."""
    from r4b_jax.evaluation.knob import Target

    values = {
        "tokens": args.target_tokens,
        "think_rate": args.target_think_rate,
        "drop": args.max_drop,
        "best": 0.0 if args.best else None,
        "bias": args.bias,
    }
    return next((Target(rule, value) for rule, value in values.items() if value is not None), None)


def run(args: argparse.Namespace):
    target = target_of(args)
    if args.write and target is None:
        raise ValueError("--write needs a choice: --target-tokens, --max-drop, --best, ...")
    if args.resamples < 2:
        raise ValueError("--resamples is at least 2")
    records = [record for source in args.records for record in records_of(source)]
    options = dict(equal_topics=args.equal_topics, resamples=args.resamples, seed=args.seed)
    content = calibrate(records, target, **options)
    first = args.records[0]
    beside = os.path.join(first, "evaluation") if os.path.isdir(first) else os.path.dirname(first)
    folder = args.out or beside or "."
    save(content, folder)
    for line in sentences(content):
        print(line)
    print(f"{os.path.join(folder, 'knob.md')}, knob.json and knob.png written")
    if args.write:
        bias = content["overall"]["chosen"]["bias"]
        print(f"think_bias {bias:g} written to {write_bias(args.write, bias)}")


def main():
    try:
        run(parser().parse_args())
    except ValueError as error:
        print(f"r4b_jax: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
