"""Pictures to tiles, and to the plan that places their features in the sequence.

AnyRes as in LLaVA-OneVision (PAPER.md section 2): a picture alone in its prompt becomes one base
tile of the whole and a grid of tiles of its parts; several pictures in a prompt become one base
tile each. Padding is left out again, a grid over budget is scaled down bilinearly, and each row of
features ends in the learned newline. All of that is arithmetic on indices, done here on the host:
the device gathers up to four feature rows a token and adds them up by their weights.

Pixels equal those of transformers' `LlavaOnevisionImageProcessorPil`, counts those of its
processor.
"""

import io
import math
import os
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from r4b_jax.config import VisionConfig

NEWLINE = -1  # in a plan's index: the newline, wherever the batch keeps it


class ImageError(ValueError):
    """A picture that cannot be used; the message names it."""


class Prepared(NamedTuple):
    """One picture, ready for the sequence."""

    tiles: np.ndarray  # uint8[i, image_size, image_size, 3]
    index: np.ndarray  # int32[n, 4], into this picture's own i*P patches, or NEWLINE
    weight: np.ndarray  # float32[n, 4]


def read(source) -> Image.Image:
    """A picture from a path, bytes, an array uint8[h, w(, 1, 3 or 4)] or a PIL image, upright and
    in RGB.

    As transformers' `load_image`: turned as its EXIF says, palettes and greys to RGB, transparency
    dropped, the first frame of an animation.

    Raises:
      ImageError: no such file, or not a picture; the message names it.
    """
    name = source if isinstance(source, (str, os.PathLike)) else f"<{type(source).__name__}>"
    try:
        if isinstance(source, np.ndarray):
            return Image.fromarray(source).convert("RGB")
        if isinstance(source, (bytes, bytearray)):
            source = Image.open(io.BytesIO(source))
        elif not isinstance(source, Image.Image):
            source = Image.open(source)
        return ImageOps.exif_transpose(source).convert("RGB")
    except FileNotFoundError:
        raise ImageError(f"there is no image file {name}") from None
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot read the image {name}: {error}") from None


def prepare(sources: list, vision: VisionConfig) -> list[Prepared]:
    """The pictures of one prompt, in order. Raises ImageError as `read` does."""
    pictures = [read(source) for source in sources]
    if not vision.grid_pinpoints:
        return [_single(picture, vision, newline=False) for picture in pictures]
    if len(pictures) == 1:
        return [_any_resolution(pictures[0], vision)]
    return [_single(_square(picture, vision), vision, newline=True) for picture in pictures]


def best_resolution(size: tuple[int, int], pinpoints) -> tuple[int, int]:
    """The (height, width) of `pinpoints` that keeps most of a picture's pixels and, among those,
    wastes the fewest; the first of equals."""
    height, width = size

    def merit(pinpoint):
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=merit)


def _resize(picture: Image.Image, height: int, width: int) -> np.ndarray:
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def _single(picture: Image.Image, vision: VisionConfig, *, newline: bool) -> Prepared:
    """The whole picture as one tile, whatever its proportions."""
    tiles = _resize(picture, vision.image_size, vision.image_size)[None]
    rows = np.arange(vision.num_patches)
    return Prepared(tiles, *_plain_plan(np.append(rows, NEWLINE) if newline else rows))


def _square(picture: Image.Image, vision: VisionConfig) -> Image.Image:
    """Padded to a square with the mean colour, the picture in the middle."""
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), tuple(int(x * 255) for x in vision.image_mean))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


def _any_resolution(picture: Image.Image, vision: VisionConfig) -> Prepared:
    """Base tile and grid; the picture in the middle of the grid, black around it."""
    size = vision.image_size
    target = best_resolution((picture.height, picture.width), vision.grid_pinpoints)
    scale = target[0] / picture.height, target[1] / picture.width
    if scale[1] < scale[0]:
        inner = min(math.ceil(picture.height * scale[1]), target[0]), target[1]
    else:
        inner = target[0], min(math.ceil(picture.width * scale[0]), target[1])
    canvas = np.zeros((*target, 3), np.uint8)
    top, left = (target[0] - inner[0]) // 2, (target[1] - inner[1]) // 2
    canvas[top : top + inner[0], left : left + inner[1]] = _resize(picture, *inner)
    grid = target[0] // size, target[1] // size
    parts = canvas.reshape(grid[0], size, grid[1], size, 3).swapaxes(1, 2)
    tiles = np.concatenate([_resize(picture, size, size)[None], parts.reshape(-1, size, size, 3)])
    plan = _grid_plan((picture.height, picture.width), grid, vision)
    base = _plain_plan(np.arange(vision.num_patches))
    return Prepared(tiles, *(np.concatenate(pair) for pair in zip(base, plan)))


def _plain_plan(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each token is one feature row: (index int32[n, 4], weight float32[n, 4])."""
    index, weight = np.zeros((len(rows), 4), np.int32), np.zeros((len(rows), 4), np.float32)
    index[:, 0], weight[:, 0] = rows, 1
    return index, weight


def _grid_plan(size: tuple[int, int], grid: tuple[int, int], vision: VisionConfig):
    """The grid's tokens, row by row, each row closed by the newline.

    Args:
      size: (height, width) of the picture as it came.
      grid: (rows, columns) of tiles, which follow the base tile.
    """
    side = vision.image_size // vision.patch_size
    y, x = np.arange(grid[0] * side)[:, None], np.arange(grid[1] * side)
    tile = 1 + y // side * grid[1] + x // side
    rows = _unpadded(tile * side**2 + y % side * side + x % side, size)
    ratio = math.sqrt(rows.size / (vision.max_grid_tiles * side**2))
    if ratio > 1.1:
        shape = int(rows.shape[0] // ratio), int(rows.shape[1] // ratio)
        index, weight = _bilinear(rows, shape)
    else:
        shape = rows.shape
        index, weight = _plain_plan(rows.ravel())
    newline = _plain_plan(np.full(shape[0], NEWLINE))
    index, weight = (
        np.concatenate([a.reshape(*shape, 4), b[:, None]], 1).reshape(-1, 4)
        for a, b in zip((index, weight), newline)
    )
    return index, weight


def _unpadded(rows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The feature rows [h, w] that show the picture and not the black around it."""
    height, width = size
    h, w = rows.shape
    if width / height > w / h:
        cut = (h - int(round(height * (w / width), 7))) // 2
        return rows[cut : h - cut]
    cut = (w - int(round(width * (h / height), 7))) // 2
    return rows[:, cut : w - cut]


def _bilinear(rows: np.ndarray, shape: tuple[int, int]):
    """Feature rows [h, w] scaled to `shape` as torch's `interpolate(mode="bilinear")` does."""
    lines = [_line(n, m) for n, m in zip(rows.shape, shape)]
    (low_y, high_y, part_y), (low_x, high_x, part_x) = lines
    corners = [rows[np.ix_(y, x)] for y in (low_y, high_y) for x in (low_x, high_x)]
    weights = [np.outer(wy, wx) for wy in (1 - part_y, part_y) for wx in (1 - part_x, part_x)]
    index = np.stack(corners, -1).reshape(-1, 4).astype(np.int32)
    return index, np.stack(weights, -1).reshape(-1, 4).astype(np.float32)


def _line(n: int, m: int):
    """Where m points lie on a line of n: (lower neighbour, upper neighbour, share of the upper)."""
    place = np.maximum((np.arange(m, dtype=np.float32) + 0.5) * np.float32(n / m) - 0.5, 0)
    low = np.minimum(place.astype(int), n - 1)
    return low, np.minimum(low + 1, n - 1), (place - low).astype(np.float32)
