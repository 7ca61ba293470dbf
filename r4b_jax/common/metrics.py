"""What a person watches: a progress bar with the time left, metrics.jsonl and TensorBoard."""

import json
import os
import sys
import time

import rich.console
import rich.progress
import tensorboardX

console = rich.console.Console(highlight=False, soft_wrap=True, emoji=False)
LINE_SECONDS = 15  # between progress lines where there is no terminal


class Progress:
    """A bar with the newest figures and the time left; plain lines where output is not a
    terminal."""

    def __init__(self, title: str, total: int, done: int = 0):
        self.title, self.total, self.done = title, total, done
        self.first, self.start, self.last_line = done, time.monotonic(), time.monotonic()
        self.bar = None
        if console.is_terminal:
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
        self.last_line = time.monotonic()
        seconds = self.last_line - self.start
        print(f"{self.title:>16} {self.done}/{self.total} {seconds:.0f} s, {text}", flush=True)


class MetricWriter:
    """Appends records to `folder`/metrics.jsonl and scalars to `folder`/tensorboard.

    A resumed stage first drops its own records from `resume_step` on, so the file reads as if the
    run had never stopped.
    """

    def __init__(self, folder: str, stage: str, resume_step: int = 0):
        self.path, self.stage = os.path.join(folder, "metrics.jsonl"), stage
        kept = [
            record
            for record in read_metrics(folder)
            if record["stage"] != stage or 0 < resume_step >= record["step"]
        ]
        with open(self.path, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(record) + "\n" for record in kept)
        self.file = open(self.path, "a", encoding="utf-8")
        self.board = tensorboardX.SummaryWriter(os.path.join(folder, "tensorboard", stage))

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
