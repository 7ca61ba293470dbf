"""Pictures to tiles and to the plan that places their features in the sequence."""

import numpy as np
from PIL import Image

from r4b_jax.config import VisionConfig


def tile_image(image: np.ndarray, vision: VisionConfig):
    """One picture as one base tile.

    Args:
      image: uint8[h, w, 3], any size; resized (bicubic, as SigLIP's processor does) to the tile's
        square.
    Returns:
      tiles uint8[1, image_size, image_size, 3], and for n = `vision.num_image_tokens` tokens the
      plan's index int32[n, 4] and weight float32[n, 4]: a token is the mean of pool x pool patches.
    """
    size, pool = vision.image_size, vision.pool
    if image.shape[:2] != (size, size):
        resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    side = size // vision.patch_size
    patches = np.arange(side * side).reshape(side // pool, pool, side // pool, pool)
    index = np.zeros((vision.num_image_tokens, 4), np.int32)
    index[:, : pool * pool] = patches.swapaxes(1, 2).reshape(-1, pool * pool)
    weight = np.zeros((vision.num_image_tokens, 4), np.float32)
    weight[:, : pool * pool] = 1 / pool**2
    return image[None], index, weight
