"""Pictures to tiles, and to the plan that places their features in the sequence.

AnyRes as in LLaVA-OneVision (PAPER.md section 2): a picture alone in its prompt becomes one base
tile of the whole and a grid of tiles of its parts; several pictures in a prompt become one base
tile each. Padding is left out again, a grid over budget is scaled down bilinearly, and each row of
features ends in the learned newline. All of that is arithmetic on indices, done here on the host:
the device gathers up to four feature rows a token and adds them up by their weights.

A picture's plan depends on its size alone, which its header tells; pixels are decoded when they
are asked for, so a batch can be packed before any of its pictures is.

Pixels equal those of transformers' `LlavaOnevisionImageProcessorPil`, counts those of its
processor.
"""

import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from r4b_jax.config import VisionConfig
from r4b_jax.data.samples import RecordError

ORIENTATION = 0x0112  # the EXIF tag
# What people have pictures in; not what runs an interpreter, such as EPS.
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
    if name in Image.OPEN
)
NEWLINE = -1  # in a plan's index: the newline, wherever the batch keeps it


class ImageError(RecordError):
    """A picture that cannot be used; the message names it."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One picture, ready for the sequence."""

    source: Any
    size: tuple[int, int]  # height, width
    grid: tuple[int, int] | None  # rows and columns of tiles after the base tile; None = base alone
    square: bool  # the base tile is padded to a square, not stretched
    index: np.ndarray  # int32[n, 4], into this picture's own i*P patches, or NEWLINE
    weight: np.ndarray  # float32[n, 4]
    vision: VisionConfig

    @property
    def num_tiles(self) -> int:
        return 1 + (math.prod(self.grid) if self.grid else 0)

    @property
    def tiles(self) -> np.ndarray:
        """uint8[num_tiles, image_size, image_size, 3]. Raises ImageError as `read` does."""
        size = self.vision.image_size
        out = np.zeros((self.num_tiles, size, size, 3), np.uint8)
        self.draw(out)
        return out

    def draw(self, out: np.ndarray):
        """Decode into `out`, which is as `tiles` and black. Raises ImageError as `read` does."""
        picture, side = read(self.source), self.vision.image_size
        if (picture.height, picture.width) != self.size:
            name = _name(self.source)
            raise ImageError(f"the image {name} is not as large as its header says: {picture.size}")
        if self.grid:
            _draw_grid(out[1:], picture, self.grid)
        elif self.square:
            picture = _square(picture, self.vision)
        out[0] = _resize(picture, side, side)


def read(source) -> Image.Image:
    """A picture from a path, bytes, an array uint8[h, w(, 1, 3 or 4)] or a PIL image, upright and
    in RGB.

    As transformers' `load_image`: turned as its EXIF says, palettes and greys to RGB, transparency
    dropped, the first frame of an animation, greys of 16 bits cut off at 255.

    Raises:
      ImageError: no such file, or not a picture; the message names it.
    """
    with _told(source):
        if isinstance(source, np.ndarray):
            return Image.fromarray(source).convert("RGB")
        return ImageOps.exif_transpose(_open(source)).convert("RGB")


def size(source) -> tuple[int, int]:
    """(height, width) of what `read` gives, from the header alone. Raises ImageError as it does."""
    with _told(source):
        if isinstance(source, np.ndarray):
            return source.shape[0], source.shape[1]
        picture = _open(source)
        width, height = picture.size
        # Where a PNG does not begin with its EXIF, Pillow would decode it all to look for one.
        exif = picture.getexif() if picture.format != "PNG" or "exif" in picture.info else {}
        return (width, height) if exif.get(ORIENTATION, 1) >= 5 else (height, width)


def _open(source) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    file = io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source
    return Image.open(file, formats=FORMATS)


def _name(source) -> str:
    named = isinstance(source, (str, os.PathLike))
    return os.fspath(source) if named else f"<{type(source).__name__}>"


@contextlib.contextmanager
def _told(source):
    """Whatever a broken file makes Pillow raise, as an ImageError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise ImageError(f"there is no image file {_name(source)}") from None
    except Exception as error:  # Pillow's readers raise all kinds: struct.error, IndexError ...
        raise ImageError(f"cannot read the image {_name(source)}: {error}") from None


def prepare(sources: Sequence, vision: VisionConfig) -> list[Prepared]:
    """The pictures of one prompt, in order. Raises ImageError as `read` does."""
    sizes = [size(source) for source in sources]
    alone = len(sources) == 1 or not vision.grid_pinpoints
    for source, (height, width) in zip(sources, sizes):
        pixels = height * width if alone else max(height, width) ** 2  # padded to a square
        if pixels > Image.MAX_IMAGE_PIXELS:
            raise ImageError(
                f"the image {_name(source)} of {width} x {height} pixels takes {pixels} in memory, "
                f"and may take {Image.MAX_IMAGE_PIXELS}"
            )
    if len(sources) == 1 and vision.grid_pinpoints:
        return [_any_resolution(sources[0], sizes[0], vision)]
    newline = bool(vision.grid_pinpoints)
    rows = np.arange(vision.num_patches)
    plan = _plain_plan(np.append(rows, NEWLINE) if newline else rows)
    return [
        Prepared(source, size, None, newline, *plan, vision) for source, size in zip(sources, sizes)
    ]


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


def _square(picture: Image.Image, vision: VisionConfig) -> Image.Image:
    """Padded to a square with the mean colour, the picture in the middle."""
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), tuple(int(x * 255) for x in vision.image_mean))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


def _any_resolution(source, size: tuple[int, int], vision: VisionConfig) -> Prepared:
    """Base tile and grid."""
    target = best_resolution(size, vision.grid_pinpoints)
    grid = target[0] // vision.image_size, target[1] // vision.image_size
    base = _plain_plan(np.arange(vision.num_patches))
    plan = (np.concatenate(pair) for pair in zip(base, _grid_plan(size, grid, vision)))
    return Prepared(source, size, grid, False, *plan, vision)


def _draw_grid(out: np.ndarray, picture: Image.Image, grid: tuple[int, int]):
    """The tiles of a grid, row by row; the picture in its middle, black around it."""
    size = out.shape[1]
    target = grid[0] * size, grid[1] * size
    scale = target[0] / picture.height, target[1] / picture.width
    if scale[1] < scale[0]:
        inner = min(math.ceil(picture.height * scale[1]), target[0]), target[1]
    else:
        inner = target[0], min(math.ceil(picture.width * scale[0]), target[1])
    scaled = _resize(picture, *inner)
    top, left = (target[0] - inner[0]) // 2, (target[1] - inner[1]) // 2
    for tile, (row, column) in zip(out, np.ndindex(grid)):
        y, x = row * size - top, column * size - left  # of the tile's corner in the picture
        part = scaled[max(y, 0) : max(y + size, 0), max(x, 0) : max(x + size, 0)]
        tile[max(-y, 0) :, max(-x, 0) :][: part.shape[0], : part.shape[1]] = part


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
