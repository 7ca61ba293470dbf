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
    # By halves that change places, not cut out and joined: the gradient of a cut is a padding, and
    # libtpu 0.0.52 dies of one between a product and its reshape.
    cos, sin = (table[..., None, :] for table in rope)
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    turned = halves[..., ::-1, :] * jnp.array([-1.0, 1.0])[:, None]
    return (halves * cos + turned * sin).reshape(x.shape).astype(x.dtype)


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


def attend_shared_prefix(q: Array, prefix, suffix, prefix_mask: Array, suffix_mask: Array) -> Array:
    """One decoding step: R rollouts of each of Q queries attend to the query's prefix, which is
    stored once, and to their own suffix; the two parts are merged by log-sum-exp.

    The R rollouts and the G query heads of a key-value head read the prefix together: one
    [R*G, H] x [H, S] product for each query and key-value head.

    Args:
      q: [Q*R, 1, N, H].
      prefix: keys and values of the prompts, each [Q, K, S, H].
      suffix: keys and values of the new tokens, this one's included, each [Q*R, K, U, H].
      prefix_mask: bool[Q, S], the prompt's real places; suffix_mask: bool[Q*R, U].
    Returns:
      [Q*R, 1, N, H].
    """
    rows, _, num_heads, head_dim = q.shape
    num_queries, num_kv = prefix[0].shape[:2]
    rollouts, group = rows // num_queries, num_heads // num_kv
    q = q.reshape(rows, num_kv, group, head_dim) * head_dim**-0.5
    together = q.reshape(num_queries, rollouts, num_kv, group, head_dim).swapaxes(1, 2)
    together = together.reshape(num_queries, num_kv, rollouts * group, head_dim)

    def apart(x):
        """[Q, K, R*G, ...] -> [Q*R, K, G, ...]."""
        x = x.reshape(num_queries, num_kv, rollouts, group, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(rows, num_kv, group, *x.shape[4:])

    on_prefix = [apart(x) for x in _part(together, *prefix, prefix_mask)]
    on_suffix = _part(q, *suffix, suffix_mask)
    top = jnp.maximum(on_prefix[0], on_suffix[0])
    total, out = 0.0, 0.0
    for part_top, part_total, part_out in (on_prefix, on_suffix):
        share = jnp.exp(part_top - top)
        total += part_total * share
        out += part_out * share[..., None]
    out = (out / total[..., None]).astype(q.dtype)
    return out.reshape(rows, 1, num_heads, head_dim)


def _part(q: Array, k: Array, v: Array, mask: Array):
    """A softmax not yet divided by its sum: q [B, K, A, H], k and v [B, K, S, H], mask bool[B, S]
    -> top score [B, K, A], sum of exp(score - top) [B, K, A], sum of that times v [B, K, A, H]."""
    scores = jnp.einsum("bkah,bksh->bkas", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, NEG_INF)
    top = scores.max(-1)
    probs = jnp.exp(scores - top[..., None])
    out = jnp.einsum(
        "bkas,bksh->bkah", probs.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return top, probs.sum(-1), out
