"""What the benchmarks share: sides that take turns, each in a process of its own and on one core.

A round runs every side once, and a ratio is taken within a round, so that a machine that becomes
slower or faster between rounds changes both. What is reported are medians over the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "peers"))

import measure  # noqa: E402


def parser(description: str, work: dict = measure.GROUPS) -> argparse.ArgumentParser:
    """The flags of all benchmarks: the peers' and those of taking turns."""
    p = measure.parser(description, work=work)
    p.add_argument("--rounds", type=int, default=3, help="rounds; each side runs once in each")
    p.add_argument("--torch-python", help="Python with transformers and trl: peers/README.md")
    p.add_argument("--tunix-python", help="Python with google-tunix: peers/README.md")
    p.add_argument("--side", help="one side alone, in this process: how the others are started")
    if work is measure.GROUPS:
        text = "instead: our cost at 2g = 4, 8, 16, 32, two prompts"
        p.add_argument("--growth", action="store_true", help=text)
        p.set_defaults(shared_prefix=True)
    return p


def timed(run, repeats: int) -> dict:
    """Time `run(number)` after one run that compiles: seconds a repeat, peak memory in GiB."""
    first, *clocks = measure.repeat(run, repeats + 1)
    return {
        "cpu_s": [c.cpu for c in clocks],
        "wall_s": [c.wall for c in clocks],
        "compile_cpu_s": first.cpu - min(c.cpu for c in clocks),
        "peak_rss_gb": measure.peak_rss_gb(),
    }


def flags_of(args) -> list[str]:
    """The sizes, as flags for another process."""
    names = ("model", *args.size_names)
    return [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]


def ours(script: str, side: str, args) -> list[str]:
    """The command of one of this project's own sides."""
    return [
        sys.executable,
        os.path.join(HERE, script),
        f"--side={side}",
        *flags_of(args),
        f"--repeats={args.repeats}",
    ]


def peer(python: str, script: str, args, *more: str) -> list[str]:
    """The command of a peer's side."""
    path = os.path.join(HERE, "peers", script)
    return [python, path, *flags_of(args), "--repeats=1", *more]


def run_side(command: list[str]) -> dict:
    """Run one side; its last line is its result."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(sides: dict[str, list[str]], rounds: int) -> dict:
    """Let the sides take turns; the first is the one the others are compared with.

    Returns:
      {side: {cpu_s, wall_s, peak_rss_gb, ratio}}, medians over the rounds; `ratio` is the side's
      CPU seconds over the first side's in the same round.
    """
    results = {name: [] for name in sides}
    for i in range(rounds):
        for name, command in sides.items():
            result = run_side(command)
            results[name].append(result)
            print(f"round {i + 1}, {name}: {min(result['cpu_s']):.2f} CPU s", flush=True)
    first = next(iter(sides))
    table = {}
    for name, rows in results.items():
        ratios = [min(row["cpu_s"]) / min(base["cpu_s"]) for row, base in zip(rows, results[first])]
        table[name] = {
            "cpu_s": statistics.median(min(row["cpu_s"]) for row in rows),
            "wall_s": statistics.median(min(row["wall_s"]) for row in rows),
            "peak_rss_gb": max(row["peak_rss_gb"] for row in rows),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
    return table


def show(table: dict, work: str, args):
    """A table for people, then the JSON, last."""
    print(f"{'':28}{'CPU s':>8}{'wall s':>8}{'peak GB':>9}{'ratio':>7}")
    for name, row in table.items():
        numbers = f"{row['cpu_s']:8.2f}{row['wall_s']:8.2f}{row['peak_rss_gb']:9.2f}"
        print(f"{name:28}{numbers}{row['ratio']:7.2f}")
    sizes_of = {flag.split("=")[0].lstrip("-"): flag.split("=")[1] for flag in flags_of(args)}
    print(json.dumps({"work": work, "sizes": sizes_of, "rounds": args.rounds, "sides": table}))


def growth(script: str, work: str, args):
    """Our cost at 2g = 4, 8, 16, 32 and prompts of one and four times the length."""
    cells = {}
    for length in (args.prompt_length, 4 * args.prompt_length):
        for samples in (4, 8, 16, 32):
            size = argparse.Namespace(**vars(args) | {"prompt_length": length, "samples": samples})
            runs = [run_side(ours(script, "r4b_jax", size)) for _ in range(args.rounds)]
            cpu = statistics.median(min(run["cpu_s"]) for run in runs)
            peak = max(run["peak_rss_gb"] for run in runs)
            cells[f"{length}/{samples}"] = {"cpu_s": cpu, "peak_rss_gb": peak}
            print(
                f"prompt {length:5}, 2g = {samples:2}: {cpu:7.2f} CPU s, {peak:.2f} GB", flush=True
            )
    print(json.dumps({"work": work, "growth": cells}))
