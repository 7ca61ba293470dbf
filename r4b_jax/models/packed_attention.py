"""Attention over packed rows: on each platform in its own way, everywhere the same.

    TPU   kernels over the blocks that see something           tpu_attention.py
    GPU   cuDNN, under the mask; bfloat16 and float16          here
    else  XLA, block by block, what nobody sees left out       block_attention.py

Short rows are computed at once. On a mesh each device attends for its own rows and heads.
"""

import dataclasses
import functools

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from r4b_jax.common import sharding
from r4b_jax.common.arrays import Array
from r4b_jax.models import block_attention, tpu_attention
from r4b_jax.models.attention import attend, packed_mask

SHORT = 256  # rows up to this length have all their scores computed at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
    """Who sees whom, for the kernels of each platform; what a platform does not read is never
    computed. A device's own part stands along the first axis of each array."""

    layout: block_attention.Layout
    visits: tpu_attention.Visits


def packing(segment_ids: Array, branch_ids: Array) -> Packing:
    """The blocks of packed rows: int32[B, T] each, as in `block_attention.layout`."""
    return Packing(
        block_attention.layout(segment_ids, branch_ids, block_attention.BLOCK),
        tpu_attention.visits(segment_ids, branch_ids, tpu_attention.BLOCK),
    )


def packed_attention(segment_ids: Array, branch_ids: Array):
    """Attention for a decoder that runs over packed rows.

    Args:
      segment_ids: int32[B, T], ascending along a row, 0 = padding at its end.
      branch_ids: int32[B, T], 0 = a segment's prefix, in any order; ascending is fastest.
    Returns:
      function (q [B, T, N, H], k, v [B, T, K, H]) -> [B, T, N, H]; any number at padding.
    """
    if segment_ids.shape[1] <= SHORT:
        mask = packed_mask(segment_ids, branch_ids)
        return lambda q, k, v: attend(q, k, v, mask)
    if jax.default_backend() == "gpu":
        return _on_device_rows(lambda *ids: ids, attend_by_cudnn, segment_ids, branch_ids)
    return _on_device_rows(packing, attend_packed, segment_ids, branch_ids)


def _on_device_rows(prepare, attend_by, segment_ids: Array, branch_ids: Array):
    """`attend_by(q, k, v, prepare(ids))`, on a mesh by each device for its own rows and heads."""
    mesh = sharding.active()
    if mesh is None:
        prepared = prepare(segment_ids, branch_ids)
        return lambda q, k, v: attend_by(q, k, v, prepared)
    rows = sharding.spec(("rows",), segment_ids.shape[:1], mesh)
    run = functools.partial(  # no device needs another's
        jax.shard_map, axis_names=sharding.free_axes(mesh), check_vma=False
    )
    prepared = run(prepare, in_specs=(rows, rows), out_specs=rows)(segment_ids, branch_ids)

    def attend_on_mesh(q, k, v):
        split = sharding.spec(("rows", None, "heads", None), k.shape, mesh)
        specs = (split, split, split, rows)
        return run(attend_by, in_specs=specs, out_specs=split)(q, k, v, prepared)

    return attend_on_mesh


def attend_by_cudnn(q: Array, k: Array, v: Array, ids, implementation: str | None = None) -> Array:
    """`attend` under the packed mask, by cuDNN's fused attention where the dtype allows.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H]; ids: segment and branch ids, int32[B, T] each.
      implementation: of `jax.nn.dot_product_attention`; None = cudnn for 16 bits, else xla.
    """
    implementation = implementation or ("cudnn" if q.dtype.itemsize == 2 else "xla")
    mask = packed_mask(*ids)[:, None]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    return checkpoint_name(out, "attention")


def attend_packed(q: Array, k: Array, v: Array, packing: Packing) -> Array:
    """`attend` with the mask of `packed_mask`, without its [B, N, T, T] scores.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H], N a multiple of K.
    Returns:
      [B, T, N, H]; 0 at padding.
    """
    return _attend(q * q.shape[-1] ** -0.5, k, v, packing)


@jax.custom_vjp
def _attend(q, k, v, packing):
    return _attend_forward(q, k, v, packing)[0]


def _attend_forward(q, k, v, packing):
    out, log_total = jax.lax.platform_dependent(
        q,
        k,
        v,
        packing,
        tpu=lambda q, k, v, packing: tpu_attention.forward(q, k, v, packing.visits),
        default=lambda q, k, v, packing: block_attention.forward(q, k, v, packing.layout),
    )
    out, log_total = checkpoint_name(out, "attention"), checkpoint_name(log_total, "attention")
    return out, (q, k, v, out, log_total, packing)


def _attend_backward(kept, d_out):
    packing = kept[-1]
    grads = jax.lax.platform_dependent(
        *kept[:-1],
        d_out,
        packing,
        tpu=lambda *args: tpu_attention.backward(*args[:-1], args[-1].visits),
        default=lambda *args: block_attention.backward(*args[:-1], args[-1].layout),
    )
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), packing)
    return *grads, no_gradient


_attend.defvjp(_attend_forward, _attend_backward)
