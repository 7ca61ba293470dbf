"""Batches of a stage, from one global sample counter.

Sample i of a stage is a pure function of (seed, stage, i): Grain's random access over an endless
range. A batch packs the samples from a counter on; the counter after it is saved with the weights,
so a resumed run sees exactly the batches of an uninterrupted one.
"""

import concurrent.futures
import zlib

import grain
import numpy as np

from r4b_jax.common.arrays import Batch
from r4b_jax.config import Config, StageConfig
from r4b_jax.data.examples import Example, Packer, encode_question
from r4b_jax.data.tokenizer import Tokenizer
from r4b_jax.data.worlds import World

ENDLESS = 2**40
MAX_DROPPED = 1000  # samples of one batch that fit no row: then the shape is wrong


def stream_seed(seed: int, name: str) -> int:
    """The seed of a named stream of samples: streams of other names or seeds are independent."""
    return zlib.crc32(f"{seed}/{name}".encode())


def pick_topic(weights: dict[str, float], rng: np.random.Generator) -> str:
    """A topic, with a chance in proportion to its weight."""
    draw = rng.random() * sum(weights.values())
    for topic, weight in sorted(weights.items()):
        draw -= weight
        if draw < 0:
            return topic
    return topic  # rounding left a crumb


def examples(config: Config, name: str, tokenizer: Tokenizer) -> grain.MapDataset:
    """The endless stream of a stage's training examples, by index."""
    stage: StageConfig = getattr(config, name)
    world = World(config.world, "train")

    def example(_, rng: np.random.Generator) -> Example:
        topic = pick_topic(stage.topics, rng)
        question = world.question(topic, rng)
        thinks = stage.format == "thinking" or (
            stage.format == "bimode" and world.thinks(topic, rng)
        )
        return encode_question(
            tokenizer,
            config.model.vision,
            question,
            thinks,
            mask_empty_block=stage.format == "direct",
            length_power=stage.length_power,
        )

    seed = stream_seed(config.seed, name)
    return grain.MapDataset.range(ENDLESS).seed(seed).random_map(example)


class Loader:
    """Iterates over a stage's batches, one packed ahead in a thread.

    Attributes:
      position: counter of the first sample of the next batch; set it before iterating to resume.
      dropped: samples that fit no empty row, since the start.
    """

    def __init__(self, config: Config, name: str, tokenizer: Tokenizer, position=0, dropped=0):
        self.examples = examples(config, name, tokenizer)
        self.stage, self.vision = getattr(config, name), config.model.vision
        self.pad_id = tokenizer.pad_id
        self.position, self.dropped = position, dropped

    def pack(self, position: int) -> tuple[Batch, int, int]:
        """The batch that starts at sample `position`, the next position, and samples dropped."""
        stage, dropped = self.stage, 0
        packer = Packer(
            stage.batch_rows, stage.packed_len, stage.packed_tiles, self.vision, self.pad_id
        )
        while True:
            example = self.examples[position]
            if not packer.fits_empty(example):
                dropped += 1
                if dropped == MAX_DROPPED:
                    raise ValueError(
                        f"{dropped} samples of one batch fit no row: raise packed_len "
                        f"({stage.packed_len}) or packed_tiles ({stage.packed_tiles})"
                    )
            elif not packer.add(example):
                return packer.batch, position, dropped
            position += 1

    def __iter__(self):
        with concurrent.futures.ThreadPoolExecutor(1, "loader") as pool:
            ahead = pool.submit(self.pack, self.position)
            while True:
                batch, position, dropped = ahead.result()
                ahead = pool.submit(self.pack, position)
                self.position, self.dropped = position, self.dropped + dropped
                yield batch
