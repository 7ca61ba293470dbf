"""Batches of a stage, from one global counter of samples.

The stream of samples (data/mixture.py) is read from the counter on by Grain's threads and packed.
What finds no room waits for the next batch; the counter and the numbers of those that wait are
saved with the weights, so a resumed run sees exactly the batches of an uninterrupted one. They do
not depend on the number of processes either: each packs the text of the whole batch, from the
pictures' headers alone, and decodes the pictures of its own devices' rows.
"""

import concurrent.futures
import dataclasses
import functools
import itertools

import grain

from r4b_jax.common import sharding
from r4b_jax.common.arrays import Batch
from r4b_jax.config import Config
from r4b_jax.data.examples import Example, Packer, Placement, blank, encode_sample, place_tiles
from r4b_jax.data.mixture import stage_stream
from r4b_jax.data.samples import RecordError, Sample, SetAside
from r4b_jax.data.tokenizer import Tokenizer

WAITING = 64  # samples without room that close a batch
MAX_SET_ASIDE = 1000  # samples in a row: then something is wrong with all of them


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a stage's data stands between two batches."""

    counter: int = 0  # of the first sample that was not looked at yet
    waiting: tuple[int, ...] = ()  # numbers of those that were, and go first


START = Position()


@dataclasses.dataclass(frozen=True)
class Packed:
    """A batch, and what a run must know of it."""

    batch: Batch
    position: Position  # after it
    set_aside: list[SetAside]  # of its samples; every process finds the same
    undecoded: list[SetAside]  # whose pictures broke; each process finds those of its own rows


def examples(config: Config, name: str, tokenizer: Tokenizer, workdir: str = ""):
    """(The stream of a stage's training examples or SetAsides by number, what was bad before.)"""
    stage, vision = getattr(config, name), config.model.vision

    def encode(sample: Sample | SetAside) -> Example | SetAside:
        if isinstance(sample, SetAside):
            return sample
        try:
            return encode_sample(
                tokenizer,
                vision,
                sample,
                mask_empty_block=stage.mask_empty_block,
                length_power=stage.length_power,
            )
        except ValueError as error:  # a RecordError, or what the chat template refuses
            return SetAside(sample.id, str(error))

    stream, bad = stage_stream(config, name, workdir)
    return stream.map(encode), bad


class Loader:
    """A stage's batches, one packed ahead.

    Attributes:
      bad: records that could not be read when the sources were opened.
    """

    def __init__(self, config: Config, name: str, tokenizer: Tokenizer, workdir: str = ""):
        self.examples, self.bad = examples(config, name, tokenizer, workdir)
        self.stage, self.vision = getattr(config, name), config.model.vision
        self.pad_id, self.workers = tokenizer.pad_id, config.workers

    def batches(self, position: Position = START):
        """Yields Packed from a position on, until the data end.

        Raises:
          RecordError: hardly any sample of a batch can be used.
        """
        waiting = [(number, self.examples[number]) for number in position.waiting]
        arriving = self._arriving(position.counter)
        with (
            concurrent.futures.ThreadPoolExecutor(self.workers, "decode") as decoders,
            concurrent.futures.ThreadPoolExecutor(1, "loader") as packer,
        ):
            # The mesh is that of the calling thread.
            own = sharding.own_rows(self.stage.batch_rows)
            pack = functools.partial(packer.submit, self._pack, arriving, decoders, own)
            ahead = pack(waiting, position.counter)
            while (result := ahead.result()) is not None:
                packed, decoding, waiting = result
                # The next one is packed, and its pictures queue up, while this one's are decoded.
                ahead = pack(waiting, packed.position.counter)
                broken = [aside for aside in decoding if aside is not None]
                yield dataclasses.replace(packed, undecoded=broken)

    def _arriving(self, counter: int):
        """(number, example) from a counter on, read by threads."""
        if counter >= len(self.examples):
            return iter(())
        options = grain.ReadOptions(num_threads=self.workers, prefetch_buffer_size=4 * self.workers)
        stream = self.examples[counter:].to_iter_dataset(options)
        return zip(itertools.count(counter), stream)

    def _pack(self, arriving, decoders, own, waiting: list, counter: int):
        """The next (Packed, its pictures as they are decoded, what waits), or None: no more."""
        stage = self.stage
        shape = (stage.batch_rows, stage.packed_len, stage.packed_tiles)
        packer = Packer(*shape, self.vision, self.pad_id)
        aside, still, bad_in_a_row = [], [], 0
        for number, example in itertools.chain(waiting, arriving):
            counter = max(counter, number + 1)
            reason = _unusable(example, packer)
            bad_in_a_row = 0 if reason is None else bad_in_a_row + 1
            if reason is not None:
                aside.append(reason)
                if bad_in_a_row == MAX_SET_ASIDE:
                    raise _nothing_but(aside)
            elif not packer.add(example):
                still.append((number, example))
                if len(still) == WAITING:
                    break
        if not packer.placements:
            if aside:  # there was nothing else: else those that waited would be here
                raise _nothing_but(aside)
            return None
        mine = [placed for placed in packer.placements if own[placed.row]]
        decoding = decoders.map(lambda placed: _decode(packer.batch, placed), mine)
        position = Position(counter, tuple(number for number, _ in still))
        return Packed(packer.batch, position, aside, []), decoding, still


def _nothing_but(aside: list[SetAside]) -> RecordError:
    """The error for data that are set aside throughout."""
    last = aside[-1]
    return RecordError(
        f"nothing but samples that are set aside, {len(aside)} in this batch; the last because: "
        f"{last.id}: {last.reason}"
    )


def _unusable(example: Example | SetAside, packer: Packer) -> SetAside | None:
    """Why an example cannot be in any batch, or None."""
    if isinstance(example, SetAside):
        return example
    if packer.fits_empty(example):
        return None
    return SetAside(
        example.id,
        f"takes {len(example.tokens)} tokens and {example.num_tiles} tiles; a row holds "
        f"packed_len = {packer.length} and packed_tiles = {packer.tiles}",
    )


def _decode(batch: Batch, placed: Placement) -> SetAside | None:
    """Decode an example's pictures into the batch; one that breaks leaves its place blank."""
    try:
        place_tiles(batch, placed.row, placed.tile, placed.example)
    except RecordError as error:
        blank(batch, placed.row, placed.start, len(placed.example.tokens))
        return SetAside(placed.example.id, str(error))
    return None
