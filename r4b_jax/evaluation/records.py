"""A folder of records: what was asked, answered and set aside, line by line as it comes.

    settings.json          what was asked how; other settings are refused
    records/NAME.jsonl     of each benchmark: a line a query and mode, or one a query set aside
    lock                   held by the process that writes

The files only grow. A process that was killed leaves at most a half-written last line, which the
next one cuts off; which lines are there tells it what is left to do.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator

from r4b_jax.config import ConfigError


class Folder(contextlib.AbstractContextManager):
    """A folder of records, open for writing.

    Args:
      settings: all that the records depend on, {name: what JSON can hold}.
    Attributes:
      started: when its first run began, such as 20250828-120000.
    Raises:
      ConfigError: another process writes there, or it holds records of other settings.
    """

    def __init__(self, path: str, settings: dict):
        os.makedirs(os.path.join(path, "records"), exist_ok=True)
        self.path, self._file = path, os.path.join(path, "settings.json")
        self._lock = _locked(os.path.join(path, "lock"))
        try:
            self._content = self._claimed(json.loads(json.dumps(settings)))
        except BaseException:
            self.close()
            raise
        self.started = self._content["started"]

    def _claimed(self, settings: dict) -> dict:
        if not os.path.exists(self._file):
            content = {"started": time.strftime("%Y%m%d-%H%M%S"), "settings": settings}
            return self._write(content | {"tables": {}})
        with open(self._file, encoding="utf-8") as f:
            content = json.load(f)
        theirs = content["settings"]
        changed = [
            f"{name}: {theirs.get(name)!r} there, {settings.get(name)!r} here"
            for name in sorted(settings.keys() | theirs.keys())
            if settings.get(name) != theirs.get(name)
        ]
        if changed:
            raise ConfigError(
                f"{self.path} holds records of other settings ({'; '.join(changed)}): choose "
                "another --out, or remove it"
            )
        return content

    def _write(self, content: dict) -> dict:
        write_whole(self._file, json.dumps(content, indent=1))
        return content

    def records(self, name: str, md5: str) -> "Records":
        """The records of a benchmark, mended.

        Args:
          md5: of its table. Raises ConfigError if they are of another one.
        """
        known = self._content["tables"].setdefault(name, md5)
        if known != md5:
            raise ConfigError(
                f"{self.path} holds records of {name} from a table with md5 {known}, this one has "
                f"{md5}: choose another --out"
            )
        self._write(self._content)
        return Records(os.path.join(self.path, "records", f"{name}.jsonl"))

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._lock.close()  # which gives it back, as any end of the process does


def _locked(path: str):
    """The lock file, held. Raises ConfigError if another process holds it."""
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise ConfigError(
            f"{os.path.dirname(path)} is being written by process {holder}: one at a time"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


class Records:
    """The records of one benchmark. Each has `row`, the place of its query, and `mode`; or `row`
    and `set_aside`, the reason why there is no answer in any mode.

    Attributes:
      aside: the queries set aside, {row: reason}.
    """

    def __init__(self, path: str):
        self.path, self.aside = path, {}
        self._done: set[tuple[int, str]] = set()
        whole = 0
        for number, (line, start) in enumerate(_lines(path), 1):
            try:
                record = json.loads(line)
                if not line.endswith(b"\n"):
                    raise ValueError
            except ValueError:
                if start + len(line) < os.path.getsize(path):
                    raise ConfigError(
                        f"{path}, line {number} is damaged: remove what begins with it, and run "
                        "again"
                    ) from None
                break
            whole = start + len(line)
            self._note(record)
        with open(path, "ab") as f:
            f.truncate(whole)

    def _note(self, record: dict):
        if "set_aside" in record:
            self.aside[record["row"]] = record["set_aside"]
        else:
            self._done.add((record["row"], record["mode"]))

    def missing(self, row: int, modes) -> bool:
        """Whether a query lacks the answer in a mode, and is not set aside."""
        return row not in self.aside and any((row, mode) not in self._done for mode in modes)

    def append(self, records: Iterator[dict]):
        """Write those that are not there yet, each as it comes; on the disk when this returns."""
        with open(self.path, "ab") as f:
            for record in records:
                key = (record["row"], record.get("mode"))
                if key in self._done or record["row"] in self.aside:
                    continue
                f.write(json.dumps(record).encode() + b"\n")
                self._note(record)
            f.flush()
            os.fsync(f.fileno())

    def read(self) -> Iterator[dict]:
        """Every record, in the order of the file."""
        for line, _ in _lines(self.path):
            yield json.loads(line)


def _lines(path: str) -> Iterator[tuple[bytes, int]]:
    """(line, byte at which it starts)."""
    start = 0
    if os.path.exists(path):
        with open(path, "rb") as f:
            for line in f:
                yield line, start
                start += len(line)


def write_whole(path: str, text: str):
    """Write a text file that is there only when whole."""
    with open(path + ".part", "w", encoding="utf-8", errors="replace") as f:
        f.write(text)
    os.replace(path + ".part", path)
