"""Attention over packed rows as TPU kernels: what `block_attention` computes, on the chip's terms.

One step of a kernel's grid is one visit: a block of queries, all G query heads of a key-value head
together, meets a block of keys. The list of visits is read off the ids on the device and the grid
is as long as the list, so what nobody sees costs nothing and one program serves every packing.
The visits of a block follow each other: its sums stay in the chip's fast memory until the last.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from r4b_jax.common.arrays import Array
from r4b_jax.models.attention import NEG_INF
from r4b_jax.models.block_attention import layout

BLOCK = 256  # tokens a block
LANES = 128  # the width of a vector register; a column of numbers is kept with a copy in each lane
FIRST, LAST = 1, 2  # bits of Pairs.edge
VMEM = 32 * 2**20  # bytes a kernel may use: the compiler's own limit is too low for G = 16
ROWS = (((1,), (1,)), ((), ()))  # contract the last axes: x @ y.T
PLAIN = (((1,), (0,)), ((), ()))  # x @ y


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Who meets whom, in the order of a grid; L = B * n (n + 1) / 2, the most that there can be.

    Every block is the own block of a visit, so that all of a result is written.
    """

    own: Array  # int32[L], the block whose sums are kept, ascending; 0 beyond `count`
    other: Array  # int32[L], the block that it meets, ascending among one block's visits
    edge: Array  # int32[L], FIRST | LAST visit of the own block
    count: Array  # int32[1], the visits that there are


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """What the kernels know of packed rows; X = B * n blocks of c tokens, n = ceil(T / c).

    Blocks are counted from the rows that `visits` was given: where those are a device's own, every
    array may be sharded along its first axis, and a device finds its own part there.
    """

    ids: Array  # int32[X, 2, c], segments (0 = padding) and branches
    queries: Pairs  # own = queries, other = keys
    keys: Pairs  # own = keys, other = queries


def visits(segment_ids: Array, branch_ids: Array, block: int) -> Visits:
    """The visits of packed rows.

    Args:
      segment_ids, branch_ids: int32[B, T], as in `layout`.
      block: c, tokens a block; on a TPU a multiple of LANES.
    """
    blocks = layout(segment_ids, branch_ids, block)
    rows, count = segment_ids.shape[0], blocks.keys.shape[1]
    # A row of `keys` is an order of its blocks: sorting it again tells where each of them stands.
    seen = jnp.argsort(blocks.keys, -1) < blocks.counts[:, None]
    seen = seen.reshape(rows, count, count) | jnp.eye(count, dtype=bool)  # padding meets itself
    ids = jnp.stack([blocks.segment_ids, blocks.branch_ids], 1)
    return Visits(ids, _pairs(seen), _pairs(seen.swapaxes(1, 2)))


def _pairs(seen: Array) -> Pairs:
    """The list of a drawing, bool[B, own, other] by blocks of a row."""
    rows, count, _ = seen.shape
    length = rows * count * (count + 1) // 2
    row, own, other = jnp.nonzero(seen, size=length, fill_value=0)
    own, other = own + row * count, other + row * count
    # The last block's last visit, too, has another block after it: block 0, which fills the list.
    changes, end = own[1:] != own[:-1], jnp.ones(1, bool)
    edge = jnp.concatenate([end, changes]) * FIRST + jnp.concatenate([changes, end]) * LAST
    return Pairs(*(x.astype(jnp.int32) for x in (own, other, edge, seen.sum()[None])))


def forward(q: Array, k: Array, v: Array, visits: Visits, *, interpret=False):
    """`attend` with the mask of `packed_mask`.

    Args:
      q: [B, T, N, H], multiplied by H^-0.5; k, v: [B, T, K, H], N a multiple of K.
      visits: `visits` of the rows' ids.
      interpret: run without a TPU.
    Returns:
      out, [B, T, N, H] in q's dtype, 0 at padding; log_total, float32[B, T, N], the log of the sum
      of exp(score), finite everywhere.
    """
    batch, length, num_heads, width = q.shape
    block, group = visits.ids.shape[2], num_heads // k.shape[2]
    queries, keys, numbers, *ids = _specs(group, block, width, 0, 1)
    many = group * block
    inputs = [_heads_first(x, block) for x in (q, k, v)]
    column = pltpu.VMEM((many, LANES), jnp.float32)
    results = [
        (inputs[0].shape, q.dtype),
        ((k.shape[2], visits.ids.shape[0], 1, many), jnp.float32),
    ]
    out, log_total = _call(
        functools.partial(_forward, block),
        visits.queries,
        (*inputs, visits.ids, visits.ids),
        (queries, keys, keys, *ids),
        results,
        (queries, numbers),
        [_id_columns(block), column, column, pltpu.VMEM((many, width), jnp.float32)],
        interpret,
    )
    log_total = log_total.reshape(k.shape[2], batch, -1, group, block).transpose(1, 2, 4, 0, 3)
    log_total = log_total.reshape(batch, -1, num_heads)[:, :length]
    return _rows_first(out, batch, length), log_total


def backward(q, k, v, out, log_total, d_out, visits: Visits, *, interpret=False):
    """Gradients of q, k and v, in their dtypes; the scores are computed again.

    Args:
      q, k, v, visits: what `forward` got; out, log_total: what it gave.
      d_out: the gradient of out.
    """
    batch, length, num_heads, width = q.shape
    num_kv, block = k.shape[2], visits.ids.shape[2]
    group = num_heads // num_kv
    many = group * block
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)

    def cut(x):
        """float32[B, T, N] -> [K, X, 1, G * c]."""
        x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0)))
        x = x.reshape(-1, block, num_kv, group).transpose(2, 0, 3, 1)
        return x.reshape(num_kv, -1, 1, many)

    arrays = [_heads_first(x, block) for x in (q, k, v, d_out.astype(q.dtype))]
    arrays += [cut(log_total), cut(delta), visits.ids, visits.ids]

    def run(kernel, pairs, sides, results, scratch):
        queries, keys, numbers, *ids = _specs(group, block, width, *sides)
        return _call(
            functools.partial(kernel, block),
            pairs,
            arrays,
            (queries, keys, keys, queries, numbers, numbers, *ids),
            [(arrays[i].shape, arrays[i].dtype) for i in results],
            [queries if i == 0 else keys for i in results],
            [_id_columns(block)] + [pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            interpret,
        )

    (d_q,) = run(_d_q, visits.queries, (0, 1), [0], [(many, LANES)] * 2 + [(many, width)])
    d_k, d_v = run(_d_k_d_v, visits.keys, (1, 0), [1, 2], [(block, width)] * 2)
    return tuple(_rows_first(x, batch, length) for x in (d_q, d_k, d_v))


# From rows to the kernels and back


def _heads_first(x: Array, block: int) -> Array:
    """[B, T, heads, H] -> [heads, X * c, H]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
    return x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, x.shape[3])


def _rows_first(x: Array, batch: int, length: int) -> Array:
    """[heads, X * c, H] -> [B, T, heads, H]."""
    x = x.reshape(x.shape[0], batch, -1, x.shape[2])
    return x.transpose(1, 2, 0, 3)[:, :length]


def _specs(group: int, block: int, width: int, query_side: int, key_side: int):
    """What a visit reads and writes of queries, of keys, of one number a query, and of the ids of
    the queries and the keys; the sides tell which is the own block (0) and which the other (1)."""

    def spec(shape, side, per_head=True):
        def index(head, visit, *lists):
            start = (head,) * per_head + (lists[side][visit],)
            return start + (0,) * (len(shape) - len(start))

        return pl.BlockSpec(shape, index)

    return (
        spec((group, block, width), query_side),
        spec((None, block, width), key_side),
        spec((None, None, 1, group * block), query_side),
        spec((None, 2, block), query_side, False),
        spec((None, 2, block), key_side, False),
    )


def _call(kernel, pairs: Pairs, arrays, in_specs, results, out_specs, scratch, interpret):
    """Run a kernel for every key-value head and every pair; results: (shape, dtype) each."""
    vary = jax.typeof(arrays[0]).manual_axis_type  # inside shard_map a result varies as q does
    call = pl.pallas_call(
        kernel,
        [jax.ShapeDtypeStruct(*x, manual_axis_type=vary) for x in results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(arrays[1].shape[0], pairs.count[0]),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
    )
    return call(pairs.own, pairs.other, pairs.edge, *arrays)


# The kernels: c tokens a block, A = G * c query places, all G heads of a block one after another


def _id_columns(block: int):
    """Memory for the ids of the own block as columns."""
    return pltpu.VMEM((2, block, LANES), jnp.int32)


def _column(row: Array) -> Array:
    """[1, A] -> [A, LANES], a number in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _wide(column: Array, width: int) -> Array:
    """[A, LANES] of `_column` -> [A, width]."""
    return jnp.tile(column, (1, -(-width // LANES)))[:, :width]


def _flat(x: Array) -> Array:
    """[G, c, H] -> [A, H]."""
    return x.reshape(-1, x.shape[2])


def _dot(x: Array, y: Array, axes) -> Array:
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _at_first(edge, columns, own_ids):
    """At a block's first visit, turn its ids (a row each) into columns."""

    @pl.when(edge & FIRST != 0)
    def _():
        columns[0] = _column(own_ids[0:1])
        columns[1] = _column(own_ids[1:2])


def _hide(columns, other_ids, distance, queries_own: bool) -> Array:
    """What to add to the scores, float32[own, other]: 0 where a query sees a key, else NEG_INF.

    Args:
      columns: of the own block; other_ids: int32[2, c].
      distance: from the first key to the first query, in places of the row.
      queries_own: whether the own block is the queries.
    """
    block = other_ids.shape[1]
    own = [_wide(columns[i], block) for i in range(2)]
    other = [other_ids[i : i + 1] for i in range(2)]
    (q_segment, q_branch), (k_segment, k_branch) = (own, other) if queries_own else (other, own)
    q_axis = 0 if queries_own else 1
    place = [jax.lax.broadcasted_iota(jnp.int32, (block, block), axis) for axis in (0, 1)]
    seen = place[q_axis] + distance >= place[1 - q_axis]
    seen &= (q_segment == k_segment) & (q_segment > 0)
    seen &= (k_branch == 0) | (q_branch == k_branch)
    return jnp.where(seen, 0.0, NEG_INF)


def _forward(block, own, other, edges, q, k, v, q_ids, k_ids, out, log_total, *scratch):
    """A visit of the forward pass: q and out [G, c, H], k and v [c, H], log_total [1, A]."""
    columns, top, total, sums = scratch
    visit, group = pl.program_id(1), q.shape[0]
    edge = edges[visit]
    _at_first(edge, columns, q_ids)

    @pl.when(edge & FIRST != 0)
    def _():
        # Above NEG_INF: a query that sees nothing gets probabilities of 0, not of 1.
        top[...] = jnp.full_like(top, NEG_INF / 2)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    hide = _hide(columns, k_ids, (own[visit] - other[visit]) * block, True)
    scores = _dot(_flat(q[...]), k[...], ROWS) + jnp.tile(hide, (group, 1))
    old_top = top[...]
    new_top = jnp.maximum(old_top, scores.max(-1, keepdims=True))
    probs = jnp.exp(scores - _wide(new_top, block))
    shrink = jnp.exp(old_top - new_top)
    value = _dot(probs.astype(v.dtype), v[...], PLAIN)
    top[...] = new_top
    total[...] = total[...] * shrink + probs.sum(-1, keepdims=True)
    sums[...] = sums[...] * _wide(shrink, value.shape[1]) + value

    @pl.when(edge & LAST != 0)
    def _():
        sure = jnp.maximum(total[...], 1e-30)
        mean = sums[...] / _wide(sure, value.shape[1])
        out[...] = mean.reshape(out.shape).astype(out.dtype)
        log_total[...] = (top[...] + jnp.log(sure)).T[0:1]


def _d_q(block, own, other, edges, q, k, v, d_out, log_total, delta, q_ids, k_ids, d_q, *scratch):
    """A visit for d_q [G, c, H]; d_out like q; log_total and delta [1, A]."""
    columns, log_totals, deltas, sums = scratch
    visit, group = pl.program_id(1), q.shape[0]
    edge = edges[visit]
    _at_first(edge, columns, q_ids)

    @pl.when(edge & FIRST != 0)
    def _():
        log_totals[...] = _column(log_total[...])
        deltas[...] = _column(delta[...])
        sums[...] = jnp.zeros_like(sums)

    hide = _hide(columns, k_ids, (own[visit] - other[visit]) * block, True)
    scores = _dot(_flat(q[...]), k[...], ROWS) + jnp.tile(hide, (group, 1))
    probs = jnp.exp(scores - _wide(log_totals[...], block))
    d_probs = _dot(_flat(d_out[...]), v[...], ROWS)
    d_scores = probs * (d_probs - _wide(deltas[...], block))
    sums[...] += _dot(d_scores.astype(k.dtype), k[...], PLAIN)

    @pl.when(edge & LAST != 0)
    def _():
        d_q[...] = sums[...].reshape(d_q.shape).astype(d_q.dtype)


def _d_k_d_v(block, own, other, edges, q, k, v, d_out, log_total, delta, q_ids, k_ids, *rest):
    """A visit for d_k and d_v [c, H]. Keys are the rows of the scores here: what is summed over
    queries comes out of a plain product, and log_total and delta stay rows."""
    d_k, d_v, columns, k_sums, v_sums = rest
    visit, group = pl.program_id(1), q.shape[0]
    edge = edges[visit]
    _at_first(edge, columns, k_ids)

    @pl.when(edge & FIRST != 0)
    def _():
        k_sums[...] = jnp.zeros_like(k_sums)
        v_sums[...] = jnp.zeros_like(v_sums)

    hide = _hide(columns, q_ids, (other[visit] - own[visit]) * block, False)
    queries, d_outs = _flat(q[...]), _flat(d_out[...])
    scores = _dot(k[...], queries, ROWS) + jnp.tile(hide, (1, group))
    probs = jnp.exp(scores - log_total[...])
    v_sums[...] += _dot(probs.astype(v.dtype), d_outs, PLAIN)
    d_probs = _dot(v[...], d_outs, ROWS)
    d_scores = probs * (d_probs - delta[...])
    k_sums[...] += _dot(d_scores.astype(q.dtype), queries, PLAIN)

    @pl.when(edge & LAST != 0)
    def _():
        d_k[...] = k_sums[...].astype(d_k.dtype)
        d_v[...] = v_sums[...].astype(d_v.dtype)
