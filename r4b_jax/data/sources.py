"""A dataset of people's own: the samples of all its files by number, what is in them, and how to
write such a file."""

import bisect
import dataclasses
import glob
import itertools
import os

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from r4b_jax.config import ConfigError, SourceConfig
from r4b_jax.data import records
from r4b_jax.data.cache import cached, replacing
from r4b_jax.data.readers import open_file
from r4b_jax.data.samples import RecordError, Sample


@dataclasses.dataclass(frozen=True)
class Index:
    """What one pass over a source's n records found."""

    topic: np.ndarray  # int32[n], into topics; -1 = the record is bad
    topics: tuple[str, ...]
    thinks: np.ndarray  # bool[n], the last turn has a thought
    bad: list[tuple[str, str]]  # (where it is, why it cannot be used), in order


class Source:
    """The samples of all files that a source's path matches, by number.

    Args:
      name: the source's; ids begin with it.
      workdir: what {workdir} stands for in the config's folders.
    Raises:
      ConfigError: no file matches, or one is of no known format or cannot be opened.
    """

    def __init__(self, name: str, config: SourceConfig, workdir: str = ""):
        self.name, self.config = name, config
        path, self.images = (
            os.path.expanduser(setting.replace("{workdir}", workdir))
            for setting in (config.path, config.images)
        )
        found = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        self.files = [file for file in found if os.path.isfile(file)]
        if not self.files:
            raise ConfigError(f"sources.{name}.path: no file matches {path!r}")
        self.readers = [open_file(file) for file in self.files]
        self.ends = list(itertools.accumulate(map(len, self.readers)))
        self.folder = os.path.commonpath([os.path.dirname(file) or "." for file in self.files])

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Sample:
        """Sample i; its id is `<name>/<the record's id>`, or `locate(i)` if the record has none.

        Raises:
          RecordError: the record cannot be used.
        """
        file, number = self._find(i)
        sample = records.parse(
            self.readers[file][number],
            id=self.locate(i),
            topic=self.config.topic or self.name,
            prompt=self.config.prompt,
            folder=self.images or os.path.dirname(self.files[file]),
        )
        # What was read from a source of this name, and written by write_array_record, has its id.
        if sample.id.startswith(self.name + "/"):
            return sample
        return dataclasses.replace(sample, id=f"{self.name}/{sample.id}")

    def locate(self, i: int) -> str:
        """Where record i is, also if it is bad: `<name>/<file>:<number, from 1>`."""
        file, number = self._find(i)
        return f"{self.name}/{os.path.relpath(self.files[file], self.folder)}:{number + 1}"

    def _find(self, i: int) -> tuple[int, int]:
        """(which file, which of its records)."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        file = bisect.bisect_right(self.ends, i)
        return file, i - (self.ends[file - 1] if file else 0)


def index(source: Source) -> Index:
    """The topics of all samples, which of them think, and which records are bad: one pass over
    them, kept in the cache folder until a file or the source's settings change."""
    n = len(source)
    what = ["index", source.name, dataclasses.astuple(source.config), source.images]

    def build():
        from r4b_jax.common.metrics import Progress  # with JAX, which readers do without

        topics, thinks, bad = [], np.zeros(n, bool), []
        with Progress(f"index {source.name}", n) as progress:
            for i in range(n):
                try:
                    sample = source[i]
                    topics.append(sample.topic)
                    thinks[i] = sample.last.thought is not None
                except RecordError as error:
                    topics.append(None)
                    bad.append((source.locate(i), str(error)))
                progress.advance()
        names = sorted({*topics} - {None})
        number = {None: -1, **{name: i for i, name in enumerate(names)}}
        topic = np.array([number[name] for name in topics], np.int32)
        return [topic.tobytes(), names, thinks.tobytes(), bad]

    topic, names, thinks, bad = cached(what, source.files, build)
    return Index(
        np.frombuffer(topic, np.int32),
        tuple(names),
        np.frombuffer(thinks, bool),
        [tuple(pair) for pair in bad],
    )


def write_array_record(samples, path: str):
    """Write samples to the project's own `.array_record`, pictures within: a source that reads it
    gives them again, with the same ids if it has the name of the one they came from.

    The file is there only when it is whole.

    Raises:
      RecordError: a picture cannot be read, or a sample has no answer.
    """
    write_records(map(records.to_record, samples), path)


def write_records(made, path: str):
    """`write_array_record` of what records.to_record made of each sample."""
    with replacing(path) as part:
        writer = ArrayRecordWriter(part, "group_size:1")  # one by one, for they are read so
        try:
            for record in made:
                writer.write(msgpack.packb(record))
        finally:
            writer.close()
