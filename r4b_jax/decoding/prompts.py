"""Queries as `generate` takes them: padded to few shapes, so that few programs are compiled."""

import dataclasses

import jax
import numpy as np

from r4b_jax.common.arrays import Array, ImagePlan
from r4b_jax.data.examples import Example, plan_index

TILE_BUCKETS = (0, 1, 2, 3, 5, 7, 10, 13, 17, 21, 26, 31, 37)  # tiles a prompt is padded to


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Queries, padded on the right."""

    tokens: Array  # int32[Q, S]
    lengths: Array  # int32[Q]
    tiles: Array  # uint8[Q, I, image_size, image_size, 3]
    plan: ImagePlan


def pad_prompts(
    prompts: list[Example], longest: int, pad_id: int, patches: int, tiles: int | None = None
) -> Prompts:
    """Stack prompts, padded to a `bucket`; those with fewer tiles than others get empty ones.

    Args:
      longest: the most tokens a prompt may have.
      patches: feature rows a tile gives.
      tiles: tiles to pad to; None = the first of `TILE_BUCKETS` that holds each prompt's.
    Raises:
      ValueError: a prompt is longer than `longest`.
    """
    prompt_len = bucket(max(len(p.tokens) for p in prompts), longest)
    count, most = len(prompts), max(len(p.tiles) for p in prompts)
    tiles = next((n for n in TILE_BUCKETS if n >= most), most) if tiles is None else tiles
    out = Prompts(
        tokens=np.full((count, prompt_len), pad_id, np.int32),
        lengths=np.array([len(p.tokens) for p in prompts], np.int32),
        tiles=np.zeros((count, tiles, *prompts[0].tiles.shape[1:]), np.uint8),
        plan=ImagePlan(
            np.zeros((count, prompt_len, 4), np.int32), np.zeros((count, prompt_len, 4), np.float32)
        ),
    )
    for i, prompt in enumerate(prompts):
        length = len(prompt.tokens)
        out.tokens[i, :length] = prompt.tokens
        out.tiles[i, : len(prompt.tiles)] = prompt.tiles
        out.plan.index[i, :length] = plan_index(prompt, 0, tiles, patches)
        out.plan.weight[i, :length] = prompt.plan_weight
    return out


def bucket(needed: int, longest: int) -> int:
    """The shortest of longest, longest/2, longest/4 that holds `needed`: few shapes to compile.

    Raises:
      ValueError: none does.
    """
    if needed > longest:
        raise ValueError(f"a prompt of {needed} tokens exceeds generate.prompt_len = {longest}")
    return min(n for n in (longest, -(-longest // 2), -(-longest // 4)) if n >= needed)
