"""What a person watches: a progress bar with the time left, metrics.jsonl and TensorBoard."""

import contextlib
import json
import os
import sys
import time

import jax
import rich.console
import rich.progress
import tensorboardX

from r4b_jax.common import processes
from r4b_jax.common.chips import GIB, chip_of_device

console = rich.console.Console(highlight=False, soft_wrap=True, emoji=False)
LINE_SECONDS = 15  # between progress lines where there is no terminal


class Progress:
    """A bar with the newest figures and the time left; plain lines where output is not a
    terminal."""

    def __init__(self, title: str, total: int, done: int = 0):
        self.title, self.total, self.done = title, total, done
        self.first, self.start, self.last_line = done, time.monotonic(), time.monotonic()
        self.bar = None
        if console.is_terminal and processes.is_first():
            self.bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description:>16}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TextColumn("left"),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self.task = self.bar.add_task(title, total=total, completed=done, figures="")

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()
        else:
            self._line("done")

    def advance(self, count: int = 1, **figures):
        """`count` steps are done; `figures` (name=number) are shown, and stay until replaced."""
        self.done += count
        text = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self.bar:
            self.bar.update(self.task, completed=self.done, **({"figures": text} if text else {}))
        elif time.monotonic() - self.last_line > LINE_SECONDS:
            left = (time.monotonic() - self.start) / max(self.done - self.first, 1)
            self._line(f"{left * (self.total - self.done):.0f} s left {text}")

    def _line(self, text: str):
        if not processes.is_first():
            return
        self.last_line = time.monotonic()
        seconds = self.last_line - self.start
        print(f"{self.title:>16} {self.done}/{self.total} {seconds:.0f} s, {text}", flush=True)


class StepClock:
    """Where the seconds of a stage's steps go, and what they come to, since the last record."""

    def __init__(self):
        self.start = self.last = time.monotonic()
        self.steps, self.waited, self.tokens = 0, 0.0, 0

    @contextlib.contextmanager
    def waiting(self):
        """The block waits for input."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def step(self, tokens: int):
        """A step over so many tokens was given to the devices."""
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens

    def record(self, flops_per_token: float) -> dict[str, float]:
        """The metrics since the last record; to be called when the devices have ended.

        Args:
          flops_per_token: that training cannot do without (`cost.train_flops`).
        """
        now = time.monotonic()
        seconds, device = now - self.last, jax.local_devices()[0]
        values = {
            "seconds": now - self.start,
            "seconds/step": seconds / self.steps,
            "seconds/input": self.waited / self.steps,
            "tokens_per_second": self.tokens / seconds,
        }
        if chip := chip_of_device(device.device_kind):
            done = self.tokens * flops_per_token / jax.device_count()
            values["mfu"] = done / seconds / chip.peak
        if stats := device.memory_stats():
            values["hbm_gib"] = stats["peak_bytes_in_use"] / GIB
        self.last, self.steps, self.waited, self.tokens = now, 0, 0.0, 0
        return values


class Trace:
    """A profile of a few steps for xprof, `folder`/plugins: `tensorboard --logdir=folder`.

    Args:
      first: the first step traced, when all is compiled; count: how many, 0 = none.
    """

    def __init__(self, folder: str, first: int, count: int):
        self.folder, self.first, self.count, self.runs = folder, first, count, False

    def step(self, step: int, state):
        """The step begins, as soon as the devices are done with `state`."""
        if not self.count or step not in (self.first, self.first + self.count):
            return
        jax.block_until_ready(state)
        self.close()
        if step == self.first:
            jax.profiler.start_trace(self.folder)
            self.runs = True

    def close(self):
        if self.runs:
            jax.profiler.stop_trace()
            self.runs = False


class MetricWriter:
    """Appends records to `folder`/metrics.jsonl and scalars to `folder`/tensorboard.

    A resumed stage first drops its own records from `resume_step` on, so the file reads as if the
    run had never stopped.
    """

    def __init__(self, folder: str, stage: str, resume_step: int = 0):
        first = processes.is_first()
        self.path = os.path.join(folder, "metrics.jsonl") if first else os.devnull
        self.stage = stage
        kept = [
            record
            for record in read_metrics(folder)
            if record["stage"] != stage or 0 < resume_step >= record["step"]
        ]
        with open(self.path, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(record) + "\n" for record in kept)
        self.file = open(self.path, "a", encoding="utf-8")
        self.board = tensorboardX.SummaryWriter(
            os.path.join(folder, "tensorboard", stage), write_to_disk=first
        )

    def write(self, step: int, values: dict):
        """Write {name: number} of one step."""
        values = {name: float(value) for name, value in values.items()}
        self.file.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(f"{self.stage}/{name}", value, step)

    def close(self):
        self.file.close()
        self.board.close()


class StepLog:
    """Appends what went wrong in a step to `folder`/`name`, a line of JSON each.

    A resumed stage first drops its own lines from after `resume_step`. Each process has a file of
    its own: the first `name`, the others with their number before the ending.
    """

    def __init__(self, folder: str, name: str, stage: str, resume_step: int = 0):
        if (number := jax.process_index()) > 0:
            base, ending = os.path.splitext(name)
            name = f"{base}-{number}{ending}"
        self.path, self.stage = os.path.join(folder, name), stage
        kept = []
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as f:
                whole = [(line, json.loads(line)) for line in f if line.endswith("\n")]
            kept = [
                line
                for line, record in whole
                if record["stage"] != stage or 0 < resume_step >= record["step"]
            ]
            with open(self.path, "w", encoding="utf-8") as f:
                f.writelines(kept)

    def write(self, step: int, records: list[dict]):
        """The records of one step; without any, nothing is written."""
        if records:
            with open(self.path, "a", encoding="utf-8") as f:
                for record in records:
                    f.write(json.dumps({"stage": self.stage, "step": step, **record}) + "\n")


def read_metrics(folder: str, stage: str | None = None) -> list[dict]:
    """The whole records of `folder`/metrics.jsonl, of one stage or all."""
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    records = []
    with open(path, encoding="utf-8") as f:
        for line in f:
            if line.endswith("\n"):
                records.append(json.loads(line))
    return [r for r in records if stage is None or r["stage"] == stage]


def warn(text: str):
    """One line to standard error."""
    print(f"r4b_jax: {text}", file=sys.stderr, flush=True)
