"""SigLIP2 vision tower at a fixed tile size (PAPER.md section 2): every patch's features as the
last layer leaves them, no pooling. SigLIP2's own final norm and head are not part of R-4B."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r4b_jax.common.arrays import Array
from r4b_jax.config import VisionConfig
from r4b_jax.models.attention import attend
from r4b_jax.models.layers import LayerStack, Linear


class EncoderLayer(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs, dtype):
        width, eps = config.width, config.norm_eps
        self.num_heads = config.num_heads
        self.layer_norm1 = nnx.LayerNorm(width, epsilon=eps, dtype=dtype, rngs=rngs)
        self.q_proj = Linear(width, width, rngs, dtype, bias=True)
        self.k_proj = Linear(width, width, rngs, dtype, bias=True)
        self.v_proj = Linear(width, width, rngs, dtype, bias=True)
        self.out_proj = Linear(width, width, rngs, dtype, bias=True)
        self.layer_norm2 = nnx.LayerNorm(width, epsilon=eps, dtype=dtype, rngs=rngs)
        self.fc1 = Linear(width, config.mlp_dim, rngs, dtype, bias=True)
        self.fc2 = Linear(config.mlp_dim, width, rngs, dtype, bias=True)

    def __call__(self, x: Array) -> Array:
        """[B, P, D] -> [B, P, D], every patch sees every patch of its tile."""
        y = self.layer_norm1(x)
        heads = (*y.shape[:2], self.num_heads, -1)
        q, k, v = (f(y).reshape(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.out_proj(attend(q, k, v, None).reshape(x.shape))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.layer_norm2(x)), approximate=True))


class SigLIP2(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs, dtype, *, remat: str):
        self.config = config
        self.dtype = dtype
        patch_dim = config.patch_size**2 * 3
        self.patch_embedding = Linear(patch_dim, config.width, rngs, dtype, bias=True)
        table = jax.random.normal(rngs.params(), (config.num_patches, config.width)) * 0.02
        self.position_embedding = nnx.Param(table)
        self.layers = LayerStack(
            lambda rngs: EncoderLayer(config, rngs, dtype),
            config.num_layers,
            rngs,
            dtype,
            remat=remat,
        )

    def __call__(self, tiles: Array) -> Array:
        """Tiles to features.

        Args:
          tiles: uint8[B, image_size, image_size, 3]; pixels become (x / 255 - mean) / std.
        Returns:
          [B, P, D], patches in rows from the top left.
        """
        patch, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        x = tiles[:, : side * patch, : side * patch].astype(jnp.float32)
        mean, std = np.array(self.config.image_mean), np.array(self.config.image_std)
        x = x / (255 * std).astype("float32") - (mean / std).astype("float32")
        x = x.reshape(-1, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch_embedding(x.reshape(-1, side * side, patch * patch * 3).astype(self.dtype))
        x = x + self.position_embedding[...].astype(self.dtype)
        x, _ = self.layers(x, lambda layer, x: (layer(x), None))
        return x
