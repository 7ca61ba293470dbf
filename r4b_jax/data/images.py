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
      tiles uint8[1, image_size, image_size, 3], plan index int32[P, 4], plan weight float32[P, 4]:
      image token p is patch p, with weight 1.
    """
    size, patches = vision.image_size, vision.num_patches
    if image.shape[:2] != (size, size):
        resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    index = np.zeros((patches, 4), np.int32)
    index[:, 0] = np.arange(patches)
    weight = np.zeros((patches, 4), np.float32)
    weight[:, 0] = 1
    return image[None], index, weight
