"""The TPU kernels, run in Pallas' interpreter, against attention under the packed mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r4b_jax.models import tpu_attention
from r4b_jax.models.attention import NEG_INF, attend, packed_mask
from r4b_jax.models.tpu_attention import BLOCK, FIRST, LAST

LENGTH, HEADS, KV_HEADS, WIDTH = 37, 6, 2, 8
visits = jax.jit(tpu_attention.visits, static_argnums=2)


def packing(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments and branches, int32[2, LENGTH] each: segments with and without branches and
    prefixes, padding of any length; every third seed's second row is all padding."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((2, LENGTH, 2), np.int32)
    for row in ids[: 1 if seed % 3 == 2 else 2]:
        real, at = LENGTH - rng.integers(0, 20) * rng.integers(0, 2), 0
        for segment in range(1, LENGTH):
            start = rng.integers(0, 2)
            for branch in range(start, start + rng.integers(1, 5)):
                end = min(at + rng.integers(1, 13), real)
                row[at:end] = segment, branch
                at = end
    return ids[..., 0], ids[..., 1]


def run(q, k, v, d_out, segments, branches, block):
    """out, log_total and the gradients of q, k and v; q not yet multiplied by H^-0.5."""
    seen, scale = visits(segments, branches, block), q.shape[-1] ** -0.5
    out, log_total = tpu_attention.forward(q * scale, k, v, seen, interpret=True)
    d_q, d_k, d_v = tpu_attention.backward(
        q * scale, k, v, out, log_total, d_out, seen, interpret=True
    )
    return out, log_total, (d_q * scale, d_k, d_v)


@jax.jit
def plain(q, k, v, d_out, mask):
    """The same by `attend`."""
    out, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
    scores = jnp.einsum("btkgh,bskh->btkgs", q.reshape(*q.shape[:2], KV_HEADS, -1, WIDTH), k)
    scores = jnp.where(mask[:, :, None, None], scores * WIDTH**-0.5, NEG_INF)
    return out, jax.nn.logsumexp(scores, -1).reshape(q.shape[:3]), back(d_out)


@pytest.mark.parametrize("block", [8, 16])
def test_the_kernels_are_attention_under_the_packed_mask(block):
    """The chip must train the model that the rest of the suite tests, whatever is packed."""
    rng = np.random.default_rng(block)
    program = jax.jit(functools.partial(run, block=block))
    for seed in range(9):
        segments, branches = packing(seed)
        real = segments > 0
        q, k, v, d_out = (
            rng.standard_normal((2, LENGTH, heads, WIDTH), np.float32)
            for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
        )
        d_out *= real[..., None, None]  # what stands in padding is nobody's business
        mask = packed_mask(jnp.asarray(segments), jnp.asarray(branches))
        out, log_total, gradients = program(q, k, v, d_out, segments, branches)
        expected, expected_total, back = plain(q, k, v, d_out, mask)
        np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-5)
        np.testing.assert_allclose(
            np.asarray(log_total)[real], np.asarray(expected_total)[real], atol=1e-5
        )
        assert not np.asarray(out)[~real].any() and np.isfinite(log_total).all()
        for a, b in zip(gradients, back):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert program._cache_size() == 1  # a new packing is no reason to compile


def test_results_have_the_dtypes_of_what_they_belong_to():
    """A float32 gradient of a bfloat16 array would double the memory of the backward pass."""
    q, k, v = (
        jax.ShapeDtypeStruct((2, LENGTH, heads, WIDTH), dtype)
        for heads, dtype in ((HEADS, jnp.bfloat16), (KV_HEADS, jnp.bfloat16), (KV_HEADS, "float32"))
    )
    ids = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    out, log_total, gradients = jax.eval_shape(
        functools.partial(run, block=8), q, k, v, q, ids, ids
    )
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (log_total.shape, log_total.dtype) == (q.shape[:3], jnp.float32)
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in (q, k, v)]


def met(pairs) -> list[tuple[int, int]]:
    """The visits of a list, (own, other) each, after checking their order and their edges."""
    count = int(pairs.count[0])
    listed = list(zip(pairs.own[:count].tolist(), pairs.other[:count].tolist()))
    assert listed == sorted(set(listed))
    own = [a for a, _ in listed]
    for n, edge in enumerate(pairs.edge[:count].tolist()):
        assert (edge & FIRST != 0) == (n == 0 or own[n - 1] != own[n])
        assert (edge & LAST != 0) == (n == count - 1 or own[n + 1] != own[n])
    return listed


@pytest.mark.parametrize("seed", range(6))
def test_only_blocks_that_see_something_are_visited(seed):
    """A visit too many is time lost in every layer; one too few, or a block never written, is a
    wrong result."""
    segments, branches = packing(seed)
    mask = np.asarray(packed_mask(jnp.asarray(segments), jnp.asarray(branches)))
    count = -(-LENGTH // 8)
    mask = np.pad(mask, ((0, 0), *[(0, count * 8 - LENGTH)] * 2))
    needed = mask.reshape(2, count, 8, count, 8).any((2, 4)) | np.eye(count, dtype=bool)
    expected = [(b * count + x, b * count + y) for b, x, y in np.argwhere(needed).tolist()]
    listed = visits(segments, branches, 8)
    assert met(listed.queries) == expected
    assert met(listed.keys) == sorted((y, x) for x, y in expected)


@pytest.mark.parametrize("length", [2048, 2047])
def test_eight_documents_cost_little_more_than_their_own_triangles(length):
    """What packing saves must be saved on the chip too, wherever the documents begin."""
    segments = np.zeros((1, 16384), np.int32)
    segments[0, : 8 * length] = np.repeat(np.arange(1, 9), length)
    listed = visits(segments, np.zeros_like(segments), BLOCK)
    assert listed.queries.count[0] == listed.keys.count[0]
    area = int(listed.queries.count[0]) * BLOCK**2
    assert area <= 1.5 * 8 * length * (length + 1) / 2


def test_the_visits_of_rows_are_those_of_each_row_alone():
    """Devices list the visits of their own rows: together they must do the same work."""
    segments, branches = packing(1)
    together = visits(segments, branches, 8)
    alone = [visits(segments[i : i + 1], branches[i : i + 1], 8) for i in range(2)]
    count = -(-LENGTH // 8)
    for side in ("queries", "keys"):
        shifted = [
            (a + i * count, b + i * count)
            for i, one in enumerate(alone)
            for a, b in met(getattr(one, side))
        ]
        assert met(getattr(together, side)) == shifted
    np.testing.assert_array_equal(together.ids, np.concatenate([x.ids for x in alone]))
