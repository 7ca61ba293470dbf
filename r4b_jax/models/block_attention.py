"""Attention over packed rows, block by block: what no token may see is never computed.

A packed row holds segments that do not see each other, and branches that see their prefix and
themselves; of its [T, T] scores few are real. Queries and keys are cut into blocks; a block of
queries visits only the blocks of keys that it sees something of, merging them by log-sum-exp
(FlashAttention, arXiv 2205.14135; the backward pass computes the scores again). Which blocks those
are is read off the ids on the device, so every packing runs in one program.
"""

import dataclasses

import jax
import jax.numpy as jnp

from r4b_jax.common.arrays import Array
from r4b_jax.models.attention import NEG_INF

BLOCK = 128  # tokens a block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Who sees whom in packed rows, by blocks; X = B * ceil(T / block) blocks of c tokens."""

    segment_ids: Array  # int32[X, c], 0 = padding
    branch_ids: Array  # int32[X, c]
    keys: Array  # int32[X, T / c], the blocks that a block of queries visits ...
    counts: Array  # int32[X], ... and how many they are


def layout(segment_ids: Array, branch_ids: Array, block: int) -> Layout:
    """The blocks of packed rows.

    Args:
      segment_ids: int32[B, T], ascending along a row, 0 = padding at its end.
      branch_ids: int32[B, T], 0 = a segment's prefix, in any order; ascending is fastest.
      block: c, tokens a block.
    """
    rows, length = segment_ids.shape
    count = -(-length // block)
    padding = ((0, 0), (0, count * block - length))
    segment = jnp.pad(segment_ids, padding).reshape(rows, count, block)
    branch = jnp.pad(branch_ids, padding).reshape(rows, count, block)
    big = jnp.int32(2**30)
    real, prefix = segment > 0, (segment > 0) & (branch == 0)

    def span(values, where):
        """Smallest and largest of a block's values: int32[B, n] each; empty = (big, -1)."""
        return jnp.where(where, values, big).min(-1), jnp.where(where, values, -1).max(-1)

    first, last = span(segment, real)
    first_prefix, last_prefix = span(segment, prefix)
    code = segment * (branch.max() + 1) + branch  # ascending along the row's real tokens
    first_code, last_code = span(code, real)

    def meet(low, high, other_low, other_high):
        """[B, queries, keys]: whether two spans of numbers overlap."""
        return (low[:, :, None] <= other_high[:, None]) & (other_low[:, None] <= high[:, :, None])

    seen = meet(first, last, first_prefix, last_prefix)
    seen |= meet(first_code, last_code, first_code, last_code)
    seen &= jnp.tril(jnp.ones((count, count), bool))
    keys = jnp.argsort(~seen, axis=-1, stable=True) + jnp.arange(rows)[:, None, None] * count
    return Layout(
        segment.reshape(-1, block),
        branch.reshape(-1, block),
        keys.reshape(-1, count),
        seen.sum(-1).reshape(-1),
    )


def forward(q: Array, k: Array, v: Array, blocks: Layout):
    """`attend` with the mask of `packed_mask`, without its [B, N, T, T] scores.

    Args:
      q: [B, T, N, H], multiplied by H^-0.5; k, v: [B, T, K, H], N a multiple of K.
      blocks: `layout` of the rows' ids.
    Returns:
      out, [B, T, N, H] in q's dtype, 0 at padding; log_total, float32[B, T, N], the log of the sum
      of exp(score), finite everywhere.
    """
    (batch, length, num_heads, _), size = q.shape, blocks.segment_ids.shape[1]
    num_kv = k.shape[2]
    q, k, v = (_cut(x, num_kv, size) for x in (q, k, v))

    def one_block(x):
        def visit(n, carry):
            top, total, out = carry
            y = blocks.keys[x, n]
            scores = _flat(_scores(q, k, blocks, x, y))
            new_top = jnp.maximum(top, scores.max(-1))
            probs = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            value = jnp.einsum("kas,ksh->kah", probs.astype(v.dtype), v[y])
            return new_top, total * shrink + probs.sum(-1), out * shrink[..., None] + value

        shape = q.shape[1:3]
        # The top starts above NEG_INF: a row that sees nothing gets probabilities of 0, not of 1.
        start = (jnp.full(shape, NEG_INF / 2), jnp.zeros(shape), jnp.zeros(q.shape[1:]))
        top, total, out = jax.lax.fori_loop(0, blocks.counts[x], visit, start)
        total = jnp.maximum(total, 1e-30)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, log_total = jax.lax.map(one_block, jnp.arange(q.shape[0]))
    shape = (batch, length, num_heads)
    return _join(out, shape, size), _join(log_total[..., None], shape, size)[..., 0]


def backward(q, k, v, out, log_total, d_out, blocks: Layout):
    """Gradients of q, k and v, in their dtypes; the scores are computed again, block by block.

    Args:
      q, k, v, blocks: what `forward` got; out, log_total: what it gave.
      d_out: the gradient of out.
    """
    (batch, length, num_heads, _), size = q.shape, blocks.segment_ids.shape[1]
    num_kv, f32 = k.shape[2], jnp.float32
    delta = jnp.sum(d_out.astype(f32) * out.astype(f32), -1)
    log_total, delta = (_cut(x[..., None], num_kv, size)[..., 0] for x in (log_total, delta))
    q, k, v, d_out = (_cut(x, num_kv, size) for x in (q, k, v, d_out))

    def one_block(carry, x):
        def visit(n, carry):
            d_q, d_k, d_v = carry
            y = blocks.keys[x, n]
            scores = _flat(_scores(q, k, blocks, x, y))
            probs = jnp.exp(scores - log_total[x][..., None])
            d_probs = jnp.einsum("kah,ksh->kas", d_out[x], v[y], preferred_element_type=f32)
            d_scores = (probs * (d_probs - delta[x][..., None])).astype(q.dtype)
            d_q += jnp.einsum("kas,ksh->kah", d_scores, k[y], preferred_element_type=f32)
            # The narrow factor is the left one: a CPU would multiply by a transposed large one.
            more_k = jnp.einsum("kah,kas->khs", q[x], d_scores, preferred_element_type=f32)
            probs = probs.astype(v.dtype)
            more_v = jnp.einsum("kah,kas->khs", d_out[x], probs, preferred_element_type=f32)
            return d_q, d_k.at[y].add(more_k), d_v.at[y].add(more_v)

        start = (jnp.zeros(q.shape[1:], f32), *carry)
        d_q, *carry = jax.lax.fori_loop(0, blocks.counts[x], visit, start)
        return tuple(carry), d_q.astype(q.dtype)

    zeros = (jnp.zeros(k.swapaxes(2, 3).shape, f32),) * 2
    (d_k, d_v), d_q = jax.lax.scan(one_block, zeros, jnp.arange(q.shape[0]))
    of_keys = (batch, length, num_kv)
    d_k, d_v = (_join(x.swapaxes(2, 3), of_keys, size).astype(k.dtype) for x in (d_k, d_v))
    return _join(d_q, (batch, length, num_heads), size), d_k, d_v


def _cut(x: Array, num_kv: int, size: int) -> Array:
    """[B, T, heads, H] -> [X, K, heads / K * c, H]."""
    group, width = x.shape[2] // num_kv, x.shape[3]
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    x = x.reshape(-1, size, num_kv, group, width)
    return x.transpose(0, 2, 3, 1, 4).reshape(-1, num_kv, group * size, width)


def _join(x: Array, shape: tuple[int, int, int], size: int) -> Array:
    """[X, K, heads / K * c, H] -> [B, T, heads, H]."""
    batch, length, heads = shape
    x = x.reshape(x.shape[0], heads, size, x.shape[3]).transpose(0, 2, 1, 3)
    return x.reshape(batch, -1, heads, x.shape[3])[:, :length]


def _scores(q: Array, k: Array, blocks: Layout, x: Array, y: Array) -> Array:
    """Masked scores of query block x and key block y: float32[K, G, c, c]."""
    size = blocks.segment_ids.shape[1]
    scores = jnp.einsum("kah,ksh->kas", q[x], k[y], preferred_element_type=jnp.float32)
    place = jnp.arange(size)
    seen = (place[:, None] + (x - y) * size) >= place
    segment, branch = blocks.segment_ids, blocks.branch_ids
    seen &= (segment[x][:, None] == segment[y]) & (segment[x] > 0)[:, None]
    seen &= (branch[y] == 0) | (branch[x][:, None] == branch[y])
    return jnp.where(seen, scores.reshape(scores.shape[0], -1, size, size), NEG_INF)


def _flat(x: Array) -> Array:
    """[K, G, c, ...] -> [K, G * c, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])
