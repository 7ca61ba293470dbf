"""A sample -> arrays, and many of them packed into one Batch.

Packing is first fit: each example goes into the first row that has room for its tokens and its
tiles; one that finds none waits for the next batch, where it goes first. No sequence is ever cut.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from r4b_jax.common.arrays import Batch, ImagePlan
from r4b_jax.config import VisionConfig
from r4b_jax.data import dialogue, images
from r4b_jax.data.conversation import prompt_ids
from r4b_jax.data.samples import Sample
from r4b_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """One unpacked sequence of n tokens; its pictures are decoded when `tiles` are asked for."""

    tokens: np.ndarray  # int32[n]
    positions: np.ndarray  # int32[n]
    branch_ids: np.ndarray  # int32[n]
    predecessors: np.ndarray  # int32[n], places in this sequence
    loss_weights: np.ndarray  # float32[n]
    plan_index: np.ndarray  # int32[n, 4], into this example's own i*P patches, or images.NEWLINE
    plan_weight: np.ndarray  # float32[n, 4]
    pictures: tuple[images.Prepared, ...]
    vision: VisionConfig
    id: str = ""

    @property
    def num_tiles(self) -> int:
        return sum(picture.num_tiles for picture in self.pictures)

    @functools.cached_property
    def tiles(self) -> np.ndarray:
        """uint8[num_tiles, image_size, image_size, 3]. Raises ImageError: see images.read."""
        size = self.vision.image_size
        none = np.zeros((0, size, size, 3), np.uint8)
        return np.concatenate([none, *(picture.tiles for picture in self.pictures)])


def encode(
    tokenizer: Tokenizer,
    vision: VisionConfig,
    tokens,
    loss,
    pictures: Sequence[images.Prepared],
    id: str = "",
) -> Example:
    """Ids with image placeholders + the pictures they stand for, in order -> a plain Example.

    Raises:
      ValueError: the number of placeholders is not the number of the pictures' features.
    """
    count = np.arange(len(tokens), dtype=np.int32)
    rendered = dialogue.Rendered(
        np.asarray(tokens, np.int32),
        count,
        np.zeros_like(count),
        np.maximum(count - 1, 0),
        np.asarray(loss, np.float32),
    )
    return _with_pictures(tokenizer, vision, rendered, pictures, id)


def _with_pictures(tokenizer, vision, rendered: dialogue.Rendered, pictures, id) -> Example:
    """The same of a rendered conversation."""
    index = np.zeros((len(rendered.tokens), 4), np.int32)
    weight = np.zeros((len(rendered.tokens), 4), np.float32)
    places = np.flatnonzero(rendered.tokens == tokenizer.image_id)
    num_features = sum(len(picture.index) for picture in pictures)
    if len(places) != num_features:
        raise ValueError(f"{len(places)} image tokens for {num_features} image features")
    first, first_tile = 0, 0
    for picture in pictures:
        span = places[first : first + len(picture.index)]
        shifted = picture.index + first_tile * vision.num_patches
        index[span] = np.where(picture.index == images.NEWLINE, images.NEWLINE, shifted)
        weight[span] = picture.weight
        first, first_tile = first + len(span), first_tile + picture.num_tiles
    return Example(*rendered, index, weight, tuple(pictures), vision, id)


def encode_sample(
    tokenizer: Tokenizer,
    vision: VisionConfig,
    sample: Sample,
    *,
    mask_empty_block: bool = False,
    length_power: float = 0.0,
) -> Example:
    """A training example of a conversation; its pictures are not decoded yet.

    Its n loss tokens weigh n^-length_power each: 0 = every token alike, 1 = every example alike.

    Raises:
      ImageError: a picture has no readable header.
      ValueError: the chat template cannot show it.
    """
    pictures = images.prepare(sample.images, vision)
    lengths = [len(picture.index) for picture in pictures]
    rendered = dialogue.render(tokenizer, sample, lengths, mask_empty_block=mask_empty_block)
    loss = rendered.loss * rendered.loss.sum() ** -length_power
    return _with_pictures(tokenizer, vision, rendered._replace(loss=loss), pictures, sample.id)


def encode_prompt(tokenizer: Tokenizer, vision: VisionConfig, sample: Sample) -> Example:
    """The prompt of a sample up to `<think>`, for generation, its pictures decoded.

    Raises:
      ImageError: a picture cannot be read.
    """
    pictures = images.prepare(sample.images, vision)
    lengths = [len(picture.index) for picture in pictures]
    tokens = prompt_ids(tokenizer, sample.turns, lengths, sample.system)
    example = encode(tokenizer, vision, tokens, np.zeros(len(tokens)), pictures, sample.id)
    _ = example.tiles
    return example


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
    """Write `example` into a numpy Batch: `place_tokens`, and its pixels."""
    place_tokens(batch, row, start, tile, segment, example, patches)
    batch.tiles[row, tile : tile + example.num_tiles] = example.tiles


def place_tokens(
    batch: Batch, row: int, start: int, tile: int, segment: int, example: Example, patches: int
):
    """Write `example` but its pixels into a numpy Batch at (row, start), its tiles to be from
    `tile` on, as segment `segment`.

    Args:
      patches: feature rows a tile gives; the example's plan is shifted by those of the tiles
        before it.
    """
    span = slice(start, start + len(example.tokens))
    batch.tokens[row, span] = example.tokens
    batch.positions[row, span] = example.positions
    batch.segment_ids[row, span] = segment
    batch.branch_ids[row, span] = example.branch_ids
    batch.loss_weights[row, span] = example.loss_weights
    batch.predecessors[row, span] = start + example.predecessors
    batch.plan.weight[row, span] = example.plan_weight
    batch.plan.index[row, span] = plan_index(example, tile, batch.tiles.shape[1], patches)


def place_tiles(batch: Batch, row: int, tile: int, example: Example):
    """Decode the pictures of `example` into a numpy Batch, at black tiles; they are not kept in
    `example`. Raises ImageError: see images.read."""
    for picture in example.pictures:
        picture.draw(batch.tiles[row, tile : tile + picture.num_tiles])
        tile += picture.num_tiles


def blank(batch: Batch, row: int, start: int, length: int):
    """Take a placed example out again, as if its tokens were padding of its segment: they carry no
    loss and show no picture, and nothing else sees them."""
    span = slice(start, start + length)
    batch.loss_weights[row, span] = 0
    batch.plan.weight[row, span] = 0
    batch.plan.index[row, span] = 0


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a packer put an example."""

    example: Example
    row: int
    start: int
    tile: int


class Packer:
    """First-fit packing of examples into a Batch of fixed shape, all but their pixels.

    Args:
      rows, length, tiles: B, T and I of the Batch.
    """

    def __init__(self, rows: int, length: int, tiles: int, vision: VisionConfig, pad_id: int):
        self.length, self.tiles, self.patches = length, tiles, vision.num_patches
        self.batch = empty_batch(rows, length, tiles, vision, pad_id)
        self.used = np.zeros(rows, int)
        self.tiles_used = np.zeros(rows, int)
        self.segments = np.zeros(rows, int)
        self.placements: list[Placement] = []

    def fits_empty(self, example: Example) -> bool:
        """Whether the example fits an empty row at all."""
        return len(example.tokens) <= self.length and example.num_tiles <= self.tiles

    def add(self, example: Example) -> bool:
        """Place the example; False if no row has room."""
        room = (self.used + len(example.tokens) <= self.length) & (
            self.tiles_used + example.num_tiles <= self.tiles
        )
        row = int(np.argmax(room))
        if not room[row]:
            return False
        self.segments[row] += 1
        start, tile = int(self.used[row]), int(self.tiles_used[row])
        place_tokens(self.batch, row, start, tile, self.segments[row], example, self.patches)
        self.placements.append(Placement(example, row, start, tile))
        self.used[row] += len(example.tokens)
        self.tiles_used[row] += example.num_tiles
        return True
