"""Which sample comes when: sources, pooled by topic and mode, and mixed by weight.

Sample i of a stream is a pure function of (settings, seed, name of the stream, i): Grain's random
access over shuffled pools. A pool begins again, in another order, when it is through.
"""

import dataclasses
import difflib
import functools
import zlib

import grain
import numpy as np

from r4b_jax.config import Config, ConfigError, SourceConfig, StageConfig, WorldConfig
from r4b_jax.data import sources
from r4b_jax.data.samples import RecordError, Sample, SetAside
from r4b_jax.data.worlds import World

ENDLESS = 2**40
MODES = ("direct", "thinking")


def stream_seed(seed: int, name: str) -> int:
    """The seed of a named stream of samples: streams of other names or seeds are independent."""
    return zlib.crc32(f"{seed}/{name}".encode())


class Samples:
    """Some records of a source, by number: what cannot be read is a SetAside."""

    def __init__(self, source: sources.Source, numbers: np.ndarray):
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i) -> Sample | SetAside:
        number = int(self.numbers[i])
        try:
            return self.source[number]
        except RecordError as error:
            return SetAside(self.source.locate(number), str(error))


class Files:
    """A source of people's records, with its index."""

    def __init__(self, name: str, config: SourceConfig, workdir: str):
        self.source = sources.Source(name, config, workdir)
        self.index = sources.index(self.source)
        self.bad = [SetAside(*entry) for entry in self.index.bad]

    @functools.cached_property
    def pools(self) -> dict[tuple[str, str], Samples]:
        """(topic, mode) -> its samples, in order; by one sort, for there may be many of both."""
        code = 2 * self.index.topic + self.index.thinks
        order = np.argsort(code, kind="stable")[np.sum(self.index.topic < 0) :]
        first = np.flatnonzero(np.diff(code[order], prepend=-1))
        return {
            (self.index.topics[code[numbers[0]] // 2], MODES[code[numbers[0]] % 2]): Samples(
                self.source, numbers
            )
            for numbers in np.split(order, first[1:])
            if len(numbers)
        }

    def in_order(self) -> Samples:
        return Samples(self.source, np.arange(len(self.source)))


class SmallWorld:
    """The small world as a source: every topic in both modes, endless."""

    bad = ()

    def __init__(self, config: WorldConfig):
        self.world = World(config, "train")

    def stream(self, topic: str, mode: str, name: str, seed: int) -> grain.MapDataset:
        """Questions about a topic; those of mode "direct" without the thought."""

        def make(i: int, rng: np.random.Generator) -> Sample:
            sample = self.world.question(topic, rng)
            thought = sample.last.thought if mode == "thinking" else None
            sample = sample.answered(sample.answer, thought)
            return dataclasses.replace(sample, id=f"world/{name}/{topic}/{mode}/{i}")

        return grain.MapDataset.range(ENDLESS).seed(seed).random_map(make)


def open_sources(config: Config, names: tuple[str, ...], workdir: str) -> list:
    """The sources called `names`, or all.

    Raises:
      ConfigError: there is none of that name, or its files cannot be read.
    """
    opened = []
    for name in names or sorted(config.sources):
        source = config.sources[name]
        if source.path == "world":
            opened.append(SmallWorld(config.world))
        else:
            opened.append(Files(name, source, workdir))
    return opened


def _pool(opened: list, topic: str, mode: str, name: str, seed: int) -> list[grain.MapDataset]:
    """The endless streams of a topic and mode, one a source that has it."""
    streams = []
    for source in opened:
        if isinstance(source, SmallWorld):
            if topic in source.world.topics:
                streams.append(source.stream(topic, mode, name, seed))
        elif samples := source.pools.get((topic, mode)):
            streams.append(grain.MapDataset.source(samples))
    return streams


def _shuffled(parts: list[grain.MapDataset], seed: int) -> grain.MapDataset:
    """Datasets as one, endless: the finite ones together, in a new order each time; the endless
    ones as they are."""
    endless = [part for part in parts if len(part) >= ENDLESS]
    if finite := [part for part in parts if len(part) < ENDLESS]:
        endless.append(grain.MapDataset.concatenate(finite).seed(seed).shuffle().repeat())
    return grain.MapDataset.mix(endless) if len(endless) > 1 else endless[0]


def stage_stream(config: Config, name: str, workdir: str) -> tuple[grain.MapDataset, list]:
    """The stream of a stage's samples, and what its sources set aside before it begins.

    Raises:
      ConfigError: the mixture names what the sources do not have.
    """
    stage: StageConfig = getattr(config, name)
    opened = open_sources(config, stage.sources, workdir)
    bad = [aside for source in opened for aside in source.bad]
    if not stage.mixture:
        pools = [source.pools for source in opened]
        parts = [grain.MapDataset.source(s) for found in pools for s in found.values()]
        if not parts:
            raise ConfigError(f"config.{name}: there is no sample in its sources")
        streams, weights = [_shuffled(parts, stream_seed(config.seed, name))], [1.0]
    else:
        streams, weights, parts = [], [], []
        for topic, by_mode in sorted(stage.mixture.items()):
            for mode, weight in zip(MODES, by_mode):
                if weight > 0:
                    seed = stream_seed(config.seed, f"{name}/{topic}/{mode}")
                    found = _pool(opened, topic, mode, name, seed)
                    if not found:
                        raise _absent(f"config.{name}.mixture", topic, mode, opened)
                    parts += found
                    streams.append(_shuffled(found, seed))
                    weights.append(weight)
    stream = grain.MapDataset.mix(streams, weights)
    if stage.epochs:
        stream = stream[: stage.epochs * sum(map(len, parts))]
    return stream, bad


def queries(
    config: Config,
    names: tuple[str, ...],
    topics: dict[str, float],
    stream: str,
    workdir: str,
    *,
    endless: bool = False,
    number: int = 0,
) -> tuple[grain.MapDataset, list[SetAside]]:
    """Samples to ask a model, by number, a Sample or a SetAside each; and what was bad before.

    Args:
      names: of sources, () = all; topics: topic -> weight, {} = every sample in order, those that
        are bad among them.
      stream: the name of this stream of samples.
      endless: a topic that is through begins again; else the stream ends with the first that is.
      number: of samples wanted; 0 = every sample of the topics once, whatever their weights.
    Raises:
      ConfigError: the sources lack a topic, or have no end where all of them are asked for.
    """
    opened = open_sources(config, names, workdir)
    if not topics:
        if any(isinstance(source, SmallWorld) for source in opened):
            raise ConfigError(f"{stream}: the small world has no end; name topics and a number")
        every = [grain.MapDataset.source(source.in_order()) for source in opened]
        return grain.MapDataset.concatenate(every), []
    bad = [aside for source in opened for aside in source.bad]
    streams, weights = [], []
    for topic, weight in sorted(topics.items()):
        seed = stream_seed(config.seed, f"{stream}/{topic}")
        # The world asks the same questions in both modes: once is enough.
        direct = _pool(opened, topic, "direct", stream, seed)
        thinking = _pool(opened, topic, "thinking", stream, seed)
        parts = [part for part in direct if len(part) < ENDLESS] + thinking
        if not parts:
            raise _absent(stream, topic, "", opened)
        finite = all(len(part) < ENDLESS for part in parts)
        if not (endless or number or finite):
            raise ConfigError(f"{stream}: {topic} has no end in the small world; name a number")
        if endless or not finite:
            streams.append(_shuffled(parts, seed))
        else:
            streams.append(grain.MapDataset.concatenate(parts).seed(seed).shuffle())
        weights.append(weight)
    if not (endless or number):
        return grain.MapDataset.concatenate(streams), bad
    return grain.MapDataset.mix(streams, weights), bad


def _absent(setting: str, topic: str, mode: str, opened: list) -> ConfigError:
    """The error for a topic that no source has in that mode: says what there is."""
    there: dict[tuple[str, str], int] = {}
    for source in opened:
        if isinstance(source, SmallWorld):
            there |= dict.fromkeys((t, m) for t in source.world.topics for m in MODES)
        else:
            for key, samples in source.pools.items():
                there[key] = there.get(key, 0) + len(samples)
    names = sorted({t for t, _ in there})
    if topic in names:
        counts = ", ".join(f"{n} {m}" for (t, m), n in there.items() if t == topic)
        return ConfigError(f"{setting}: {topic} has no {mode} samples, only {counts}")
    near = difflib.get_close_matches(topic, names, n=1, cutoff=0.0)
    meant = f"; did you mean {near[0]}?" if near else ""
    return ConfigError(
        f"{setting}: no source has the topic {topic!r}, but {', '.join(names) or 'nothing'}{meant}"
    )
