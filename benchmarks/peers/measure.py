"""What the scripts share: their flags, the clock, the peak of the memory, and the line of JSON."""

import argparse
import json
import os
import time
from importlib import metadata

import sizes

# The sizes of the work, each with a flag: what it is by default, and what it means.
GROUPS = dict(
    prompts=(sizes.PROMPTS, "prompts"),
    samples=(sizes.SAMPLES, "answers to each prompt"),
    prompt_length=(sizes.PROMPT_LENGTH, "tokens of a prompt"),
    new_tokens=(sizes.NEW_TOKENS, "tokens of an answer"),
)
ROWS = dict(
    rows=(sizes.ROWS, "rows of a batch"),
    row_length=(sizes.ROW_LENGTH, "tokens of a row"),
    documents=(sizes.DOCUMENTS, "documents of a row, all of one length (m1: 1)"),
)


def parser(
    description: str, models: tuple = ("m1", "m2"), work: dict = GROUPS
) -> argparse.ArgumentParser:
    """The flags that all scripts have, and those of the work's sizes: GROUPS or ROWS."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--model", choices=models, default="m2", help="m1 sees pictures, m2 is text")
    p.add_argument("--repeats", type=int, default=2, help="measured repeats, after a warm-up")
    for name, (default, meaning) in work.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=meaning)
    p.set_defaults(size_names=tuple(work))
    return p


def document_length(args) -> int:
    """Tokens of one of W3's documents."""
    length, left = divmod(args.row_length, args.documents)
    if left or (args.model == "m1" and args.documents > 1):
        raise SystemExit("--documents must divide --row-length, and be 1 for m1")
    return length


def one_core():
    """Keeps this process on one core, so that its CPU seconds are those of one thread."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


class Clock:
    """CPU seconds (of all threads) and wall seconds of a block."""

    def __enter__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.wall = time.perf_counter() - self.wall
        self.cpu = time.process_time() - self.cpu


def repeat(run, count: int) -> list[Clock]:
    """Runs `run(number)` so often: the clock of each run."""
    clocks = []
    for number in range(count):
        with Clock() as clock:
            run(number)
        clocks.append(clock)
    return clocks


def peak_rss_gb() -> float:
    """This process's peak of resident memory in GiB, from its start; not that of its parent,
    which getrusage would report if it is larger."""
    with open("/proc/self/status") as f:
        kib = next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))
    return round(kib / 2**20, 3)


def report(args, work: str, cpu_s: list, wall_s: list, packages: tuple, **more):
    """Prints the result, the last line of the output. Tokens: those sampled in W1; those of the
    sequences, prompts counted for each sample, in W2; those of the rows in W3."""
    if work == "W3":
        tokens = args.rows * args.row_length
    else:
        length = args.new_tokens + (args.prompt_length if work == "W2" else 0)
        tokens = args.prompts * args.samples * length
    result = dict(
        work=work,
        model=args.model,
        cpu_s=[round(x, 3) for x in cpu_s],
        wall_s=[round(x, 3) for x in wall_s],
        peak_rss_gb=peak_rss_gb(),
        tokens=tokens,
        **{name: getattr(args, name) for name in args.size_names},
        versions={p: metadata.version(p) for p in packages},
    )
    print(json.dumps(more | result), flush=True)
