"""A question with its answer -> arrays, and many of them packed into one Batch.

Packing is first fit: each example goes into the first row that has room for its tokens and its
tiles. The example that fits nowhere closes the batch and opens the next, so a batch is a function
of the position of its first example alone: that one number is all a resumed run needs.
"""

import dataclasses

import numpy as np

from r4b_jax.common.arrays import Batch, ImagePlan
from r4b_jax.config import VisionConfig
from r4b_jax.data import dialogue, images
from r4b_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Question:
    """One task: a picture or none, what is asked, what is right, and an honest working."""

    topic: str
    image: np.ndarray | None  # uint8[h, w, 3]
    text: str
    answer: str
    trace: str


@dataclasses.dataclass(frozen=True)
class Example:
    """One unpacked sequence."""

    tokens: np.ndarray  # int32[n]
    loss_weights: np.ndarray  # float32[n]
    tiles: np.ndarray  # uint8[i, image_size, image_size, 3]
    plan_index: np.ndarray  # int32[n, 4], into this example's own i*P patches, or images.NEWLINE
    plan_weight: np.ndarray  # float32[n, 4]


def encode(
    tokenizer: Tokenizer, vision: VisionConfig, tokens, loss, pictures: list[images.Prepared]
) -> Example:
    """Ids with image placeholders + the pictures they stand for, in order -> an Example.

    Raises:
      ValueError: the number of placeholders is not the number of the pictures' features.
    """
    tokens = np.asarray(tokens, np.int32)
    index = np.zeros((len(tokens), 4), np.int32)
    weight = np.zeros((len(tokens), 4), np.float32)
    tiles = [np.zeros((0, vision.image_size, vision.image_size, 3), np.uint8)]
    places = np.flatnonzero(tokens == tokenizer.image_id)
    num_features = sum(len(picture.index) for picture in pictures)
    if len(places) != num_features:
        raise ValueError(f"{len(places)} image tokens for {num_features} image features")
    first, first_tile = 0, 0
    for picture in pictures:
        span = places[first : first + len(picture.index)]
        shifted = picture.index + first_tile * vision.num_patches
        index[span] = np.where(picture.index == images.NEWLINE, images.NEWLINE, shifted)
        weight[span] = picture.weight
        first, first_tile = first + len(span), first_tile + len(picture.tiles)
        tiles.append(picture.tiles)
    tiles = np.concatenate(tiles)
    return Example(tokens, np.asarray(loss, np.float32), tiles, index, weight)


def encode_question(
    tokenizer: Tokenizer,
    vision: VisionConfig,
    question: Question,
    thinks: bool,
    *,
    mask_empty_block: bool,
    length_power: float,
) -> Example:
    """A training example of a question, answered with its trace or directly.

    Its n loss tokens weigh n^-length_power each: 0 = every token alike, 1 = every example alike.
    """
    pictures = _pictures(question, vision)
    tokens, loss = dialogue.render(
        tokenizer,
        question.text,
        [len(picture.index) for picture in pictures],
        question.answer,
        question.trace if thinks and question.trace else None,
        mask_empty_block=mask_empty_block,
    )
    loss = loss * loss.sum() ** -length_power
    return encode(tokenizer, vision, tokens, loss, pictures)


def encode_prompt(tokenizer, vision, question: Question) -> Example:
    """The prompt of a question up to `<think>`, for generation."""
    pictures = _pictures(question, vision)
    tokens = dialogue.prompt_ids(tokenizer, question.text, [len(p.index) for p in pictures])
    return encode(tokenizer, vision, tokens, np.zeros(len(tokens)), pictures)


def _pictures(question: Question, vision: VisionConfig) -> list[images.Prepared]:
    return [] if question.image is None else images.prepare([question.image], vision)


def plan_index(example: Example, first_tile: int, tiles: int, patches: int) -> np.ndarray:
    """The example's plan in a row of `tiles` tiles, its own from `first_tile` on: int32[n, 4].

    Row tiles*P of the feature table is the newline; entries of weight 0 point to row 0.
    """
    index = example.plan_index + first_tile * patches
    index = np.where(example.plan_index == images.NEWLINE, tiles * patches, index)
    return np.where(example.plan_weight != 0, index, 0)


def empty_batch(rows: int, length: int, tiles: int, vision: VisionConfig, pad_id: int) -> Batch:
    """A numpy Batch with nothing in it."""
    size = vision.image_size
    ints = {
        name: np.zeros((rows, length), np.int32)
        for name in ("positions", "segment_ids", "branch_ids", "predecessors")
    }
    return Batch(
        tokens=np.full((rows, length), pad_id, np.int32),
        loss_weights=np.zeros((rows, length), np.float32),
        tiles=np.zeros((rows, tiles, size, size, 3), np.uint8),
        plan=ImagePlan(
            np.zeros((rows, length, 4), np.int32), np.zeros((rows, length, 4), np.float32)
        ),
        **ints,
    )


def place(
    batch: Batch, row: int, start: int, tile: int, segment: int, example: Example, patches: int
):
    """Write `example` into a numpy Batch at (row, start), its tiles from `tile` on, as segment
    `segment`.

    Args:
      patches: feature rows a tile gives; the example's plan is shifted by those of the tiles
        before it.
    """
    length = len(example.tokens)
    span = slice(start, start + length)
    batch.tokens[row, span] = example.tokens
    batch.positions[row, span] = np.arange(length)
    batch.segment_ids[row, span] = segment
    batch.loss_weights[row, span] = example.loss_weights
    batch.predecessors[row, span] = np.maximum(np.arange(start - 1, start + length - 1), start)
    batch.tiles[row, tile : tile + len(example.tiles)] = example.tiles
    batch.plan.weight[row, span] = example.plan_weight
    batch.plan.index[row, span] = plan_index(example, tile, batch.tiles.shape[1], patches)


class Packer:
    """First-fit packing of examples into a Batch of fixed shape.

    Args:
      rows, length, tiles: B, T and I of the Batch.
    """

    def __init__(self, rows: int, length: int, tiles: int, vision: VisionConfig, pad_id: int):
        self.length, self.tiles, self.patches = length, tiles, vision.num_patches
        self.batch = empty_batch(rows, length, tiles, vision, pad_id)
        self.used = np.zeros(rows, int)
        self.tiles_used = np.zeros(rows, int)
        self.segments = np.zeros(rows, int)

    def fits_empty(self, example: Example) -> bool:
        """Whether the example fits an empty row at all."""
        return len(example.tokens) <= self.length and len(example.tiles) <= self.tiles

    def add(self, example: Example) -> bool:
        """Place the example; False if no row has room."""
        room = (self.used + len(example.tokens) <= self.length) & (
            self.tiles_used + len(example.tiles) <= self.tiles
        )
        row = int(np.argmax(room))
        if not room[row]:
            return False
        self.segments[row] += 1
        place(
            self.batch,
            row,
            self.used[row],
            self.tiles_used[row],
            self.segments[row],
            example,
            self.patches,
        )
        self.used[row] += len(example.tokens)
        self.tiles_used[row] += len(example.tiles)
        return True
