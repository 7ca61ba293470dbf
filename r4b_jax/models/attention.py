"""Masks, rotary positions and attention. Plain XLA; every function is pure."""

import jax
import jax.numpy as jnp

from r4b_jax.common.arrays import Array

NEG_INF = -1e30  # not -inf: a row that sees nothing must stay finite


def packed_mask(segment_ids: Array, branch_ids: Array) -> Array:
    """Who sees whom in packed rows: bool[B, T, S].

    Causal within a segment, and a branch (b > 0) sees the prefix (b = 0) and itself:

        prefix prefix | branch 1 branch 1 | branch 2
        p  1 .
        p  1 1
        b1 1 1          1 .
        b1 1 1          1 1
        b2 1 1          . .                 1

    Args:
      segment_ids: int32[B, T], 0 = padding.
      branch_ids: int32[B, T].
    """
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    visible = (branch_ids[:, None, :] == 0) | (branch_ids[:, :, None] == branch_ids[:, None, :])
    return causal & same_segment & visible & (segment_ids > 0)[:, :, None]


def rope_tables(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines, float32[B, T, 1, H/2], of rotary angles position * theta^(-2i/H)."""
    freqs = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * freqs
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotate the pairs (x[i], x[i + H/2]) of [B, T, heads, H] by the angles of `rope_tables`."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.astype(x.dtype)


def attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Grouped-query attention: softmax(q k^T / sqrt(H)) v, the softmax in float32.

    Args:
      q: [B, T, N, H]; k, v: [B, S, K, H], N a multiple of K; mask: bool[B, T, S], True = seen, or
        None.
    Returns:
      [B, T, N, H].
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv = k.shape[2]
    q = q.reshape(batch, length, num_kv, num_heads // num_kv, head_dim) * head_dim**-0.5
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, NEG_INF)
    probs = jax.nn.softmax(scores, -1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", probs, v)
    return out.reshape(batch, length, num_heads, head_dim)


def attend_in_blocks(q: Array, k: Array, v: Array, mask: Array, block: int) -> Array:
    """`attend`, `block` queries at a time: scores of [B, N, block, S] exist at once, not [B, N, T,
    S], which for a prompt of 7,400 image tokens and 32 heads would be 7 GB a layer."""
    batch, length, *heads = q.shape
    if length <= block:
        return attend(q, k, v, mask)
    padding = -length % block
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    mask = jnp.pad(mask, ((0, 0), (0, padding), (0, 0)))
    blocks = (
        q.reshape(batch, -1, block, *heads).swapaxes(0, 1),
        mask.reshape(batch, -1, block, mask.shape[-1]).swapaxes(0, 1),
    )
    out = jax.lax.map(lambda part: attend(part[0], k, v, part[1]), blocks)
    return out.swapaxes(0, 1).reshape(batch, -1, *heads)[:, :length]


def attend_shared_prefix(q: Array, k: Array, v: Array, prefix, suffix, masks) -> Array:
    """One decoding step: R rollouts of each of Q queries attend to the query's prefix, which is
    stored once, to their own suffix, and to themselves. One softmax over the three parts.

    Args:
      q: [Q*R, 1, N, H]; k, v: [Q*R, 1, K, H], of the token itself.
      prefix: keys and values of the prompt, each [Q, S, K, H].
      suffix: keys and values generated so far, each [Q*R, U, K, H].
      masks: (bool[Q, S], bool[U]): prompt places that are real, suffix places already written.
    Returns:
      [Q*R, 1, N, H].
    """
    (prefix_k, prefix_v), (suffix_k, suffix_v) = prefix, suffix
    prefix_mask, suffix_mask = masks
    rows, _, num_heads, head_dim = q.shape
    num_queries, prefix_len, num_kv, _ = prefix_k.shape
    rollouts, group = rows // num_queries, num_heads // num_kv
    q = q.reshape(rows, num_kv, group, head_dim) * head_dim**-0.5
    by_query = q.reshape(num_queries, rollouts, num_kv, group, head_dim)
    f32 = jnp.float32
    on_prefix = jnp.einsum("qrkgh,qskh->qrkgs", by_query, prefix_k, preferred_element_type=f32)
    on_prefix = jnp.where(prefix_mask[:, None, None, None], on_prefix, NEG_INF)
    on_suffix = jnp.einsum("bkgh,bukh->bkgu", q, suffix_k, preferred_element_type=f32)
    on_suffix = jnp.where(suffix_mask, on_suffix, NEG_INF)
    on_self = jnp.einsum("bkgh,bkh->bkg", q, k[:, 0], preferred_element_type=f32)[..., None]
    on_prefix = on_prefix.reshape(rows, num_kv, group, prefix_len)
    probs = jax.nn.softmax(jnp.concatenate([on_prefix, on_suffix, on_self], -1), -1).astype(v.dtype)
    p_prefix = probs[..., :prefix_len].reshape(num_queries, rollouts, num_kv, group, prefix_len)
    out = jnp.einsum("qrkgs,qskh->qrkgh", p_prefix, prefix_v).reshape(rows, num_kv, group, head_dim)
    out += jnp.einsum("bkgu,bukh->bkgh", probs[..., prefix_len:-1], suffix_v)
    out += probs[..., -1:] * v[:, 0, :, None]
    return out.reshape(rows, 1, num_heads, head_dim)
