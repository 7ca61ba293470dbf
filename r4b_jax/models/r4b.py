"""R-4B: SigLIP2 tower, projector and Qwen3 decoder, with image features gathered into the sequence.

Parameters travel as a plain nested dict whose top level names the components: `vision_tower`,
`projector`, `image_newline`, `language_model`. `init` makes them, `bind` puts them back into the
module inside a transformed function; everything else is plain jax.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from r4b_jax.common import sharding
from r4b_jax.common.arrays import Array, Batch, ImagePlan
from r4b_jax.config import ModelConfig
from r4b_jax.models.packed_attention import packed_attention
from r4b_jax.models.projector import Projector
from r4b_jax.models.qwen3 import Qwen3
from r4b_jax.models.siglip2 import SigLIP2

TILES_AT_ONCE = 4  # of each row, in the tower


class R4B(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dtype, self.remat = jnp.dtype(config.compute_dtype), config.remat
        vision, language = config.vision, config.language
        self.vision_tower = SigLIP2(vision, rngs, dtype, remat=config.remat)
        eps = config.projector_norm_eps if config.projector_norm else None
        self.projector = Projector(vision.width, language.width, eps, rngs, dtype)
        self.image_newline = nnx.Param(jax.random.normal(rngs.params(), (language.width,)) * 0.02)
        self.language_model = Qwen3(language, rngs, dtype, remat=config.remat)

    def image_features(self, tiles: Array) -> Array:
        """Feature tables: uint8[B, I, h, w, 3] -> [B, I*P + 1, D], the newline last."""
        batch, num_tiles = tiles.shape[:2]
        newline = self.image_newline[...].astype(self.language_model.dtype)
        newline = jnp.broadcast_to(newline, (batch, 1, newline.shape[0]))
        if num_tiles == 0:
            return newline
        # A few tiles of each row at a time: the tower's scores and hidden units are large.
        block = max(n for n in range(1, TILES_AT_ONCE + 1) if num_tiles % n == 0)
        blocks = tiles.reshape(batch, -1, block, *tiles.shape[2:]).swapaxes(0, 1)
        features = self._features
        if self.remat in ("full", "offload"):  # else the tower's layers wait through the decoder's
            features = jax.checkpoint(features)
        patches = jax.lax.map(features, blocks).swapaxes(0, 1)
        patches = patches.reshape(batch, -1, patches.shape[-1])
        return sharding.constrain(jnp.concatenate([patches, newline], 1), "rows", None, None)

    def _features(self, tiles: Array) -> Array:
        """uint8[B, I, h, w, 3] -> [B, I, P, D]."""
        rows = ("rows", None, None)
        x = sharding.constrain(tiles.reshape(-1, *tiles.shape[2:]), "rows", None, None, None)
        patches = sharding.constrain(self.projector(self.vision_tower(x)), *rows)
        return patches.reshape(*tiles.shape[:2], *patches.shape[1:])

    def embed(self, tokens: Array, tiles: Array, plan: ImagePlan) -> Array:
        """Token embeddings, with those of image tokens mixed from the feature table: [B, T, D]."""
        table = self.image_features(tiles)
        batch, length, mixed = plan.index.shape
        rows = jnp.take_along_axis(table, plan.index.reshape(batch, -1, 1), axis=1)
        rows = rows.reshape(batch, length, mixed, -1)
        image = jnp.einsum("btmd,btm->btd", rows, plan.weight.astype(rows.dtype))
        is_image = jnp.any(plan.weight != 0, -1, keepdims=True)
        x = jnp.where(is_image, image, self.language_model.embed(tokens))
        return sharding.constrain(x, "rows", None, None)

    def hidden(self, batch: Batch) -> Array:
        """Final hidden states of packed rows: [B, T, D]."""
        x = self.embed(batch.tokens, batch.tiles, batch.plan)
        attend = packed_attention(batch.segment_ids, batch.branch_ids)
        hidden, _ = self.language_model(x, batch.positions, lambda q, k, v: (attend(q, k, v), None))
        return hidden


@functools.cache
def _graph(config: ModelConfig):
    """(graph definition, abstract state) of the model, with no memory taken."""
    return nnx.split(nnx.eval_shape(lambda: R4B(config, nnx.Rngs(0))))


def init(config: ModelConfig, key: Array) -> dict:
    """Random parameters, float32, as a nested dict."""
    return nnx.to_pure_dict(nnx.split(R4B(config, nnx.Rngs(params=key)))[1])


def bind(config: ModelConfig, params: dict) -> R4B:
    """The module with `params` in it; cheap, meant for use inside jitted functions."""
    graph, state = _graph(config)
    state = jax.tree.map(lambda x: x, state)  # a copy: the cached one stays abstract
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
