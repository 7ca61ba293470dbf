"""A packed batch to look at: its rows and segments, what carries loss, its text and its tiles."""

import numpy as np
import rich.table
from PIL import Image, ImageDraw
from rich.text import Text

from r4b_jax.common.arrays import Batch
from r4b_jax.config import StageConfig
from r4b_jax.data.loader import Packed
from r4b_jax.data.tokenizer import Tokenizer

LEARNED, GIVEN, MASKED, PICTURE = "bold green", "white", "yellow", "cyan"
SEGMENT_COLOURS = ("blue", "magenta", "green", "red", "yellow", "bright_blue", "bright_magenta")
BAR = 100  # characters a row's drawing
MARGIN = 6  # pixels between tiles


def legend() -> Text:
    """What the colours mean."""
    return Text.assemble(
        ("carries loss", LEARNED),
        ", ",
        ("given", GIVEN),
        ", ",
        ("of the reply, but masked", MASKED),
        ", ",
        ("a picture", PICTURE),
    )


def mixture(stage: StageConfig) -> rich.table.Table:
    """What a stage's mixture weighs, as shares."""
    table = rich.table.Table("topic", "direct", "thinking", box=None)
    total = sum(map(sum, stage.mixture.values()))
    for topic, weights in sorted(stage.mixture.items()):
        table.add_row(topic, *(f"{weight / total:.1%}" for weight in weights))
    return table


def segments(batch: Batch) -> list[tuple[int, int]]:
    """(row, segment) of all of a batch."""
    return [
        (row, one) for row, ids in enumerate(batch.segment_ids) for one in range(1, ids.max() + 1)
    ]


def counts(packed: Packed, patches: int) -> rich.table.Table:
    """How full each row is."""
    batch = packed.batch
    table = rich.table.Table("row", "segments", "tokens", "full", "with loss", "tiles", box=None)
    for row, ids in enumerate(batch.segment_ids):
        real, learned = int((ids > 0).sum()), int((batch.loss_weights[row] > 0).sum())
        tiles = f"{num_tiles(batch, row, patches)}/{batch.tiles.shape[1]}"
        cells = (row, ids.max(), real, f"{real / len(ids):.1%}", learned, tiles)
        table.add_row(*map(str, cells))
    return table


def num_tiles(batch: Batch, row: int, patches: int) -> int:
    """How many of a row's tiles its plan uses, or passes over.

    Args:
      patches: feature rows a tile gives.
    """
    used = batch.plan.index[row][batch.plan.weight[row] != 0]
    used = used[used < batch.tiles.shape[1] * patches]
    return int(used.max()) // patches + 1 if len(used) else 0


def bar(batch: Batch, row: int) -> Text:
    """A row from left to right: a colour a segment, pictures hatched, loss full, padding dots."""
    length, text = batch.tokens.shape[1], Text()
    for cell in np.array_split(np.arange(length), min(BAR, length)):
        ids = batch.segment_ids[row][cell]
        segment = int(np.median(ids))
        if segment == 0:
            text.append("·", "dim")
            continue
        seen = batch.plan.weight[row][cell].any(-1).mean()
        learned = (batch.loss_weights[row][cell] > 0).mean()
        mark = "▒" if seen > 0.5 else "█" if learned > 0.3 else "▂"
        text.append(mark, SEGMENT_COLOURS[segment % len(SEGMENT_COLOURS)])
    return text


def segment(batch: Batch, row: int, number: int, tokenizer: Tokenizer) -> Text:
    """One segment's text: in runs of one kind, pictures as their number of tokens; a reply that
    later turns do not see is indented behind a bar."""
    places = np.flatnonzero(batch.segment_ids[row] == number)
    tokens, branches = batch.tokens[row][places], batch.branch_ids[row][places]
    kinds = [_kind(batch, row, place, tokenizer) for place in places]
    text, start = Text(), 0
    for i in range(1, len(places) + 1):
        if i < len(places) and (kinds[i], branches[i]) == (kinds[start], branches[start]):
            continue
        run = tokens[start:i]
        if kinds[start] == PICTURE:
            text.append(f"[{len(run)} tokens of a picture]", PICTURE)
        else:
            text.append(tokenizer.decode(run), kinds[start])
        if i < len(places) and branches[i] != branches[start]:
            text.append("\n      | " if branches[i] else "\n      ", "dim")
        start = i
    return text


def _kind(batch: Batch, row: int, place: int, tokenizer: Tokenizer) -> str:
    """The colour of a token."""
    if batch.plan.weight[row, place].any():
        return PICTURE
    if batch.loss_weights[row, place] > 0:
        return LEARNED
    before = batch.tokens[row, max(place - 2, 0) : place].tolist()
    token = int(batch.tokens[row, place])
    opened = before[-1:] == [tokenizer.think_id] and token == tokenizer.direct_id
    closed = before == [tokenizer.think_id, tokenizer.direct_id]
    return MASKED if opened or (closed and token == tokenizer.end_think_id) else GIVEN


def tiles_picture(batch: Batch, patches: int, side: int = 128) -> Image.Image:
    """Every tile of a batch, a line a row, with its number; `side` pixels each."""
    rows = [num_tiles(batch, row, patches) for row in range(len(batch.tiles))]
    width, height = max(max(rows), 1) * (side + MARGIN) + MARGIN, side + 3 * MARGIN
    canvas = Image.new("RGB", (width, max(1, len(rows)) * height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for row, count in enumerate(rows):
        top = row * height + MARGIN
        for tile in range(count):
            left = MARGIN + tile * (side + MARGIN)
            picture = Image.fromarray(batch.tiles[row, tile])
            way = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
            canvas.paste(picture.resize((side, side), way), (left, top + 2 * MARGIN))
            draw.text((left, top), f"row {row}, tile {tile}", fill="black")
    return canvas
