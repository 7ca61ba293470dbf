"""Attention, positions, images and parameters of the model; every setting of it does something."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODEL, one_a_row, picture, questions, with_reply

from r4b_jax import config as c
from r4b_jax.data.examples import encode_prompt
from r4b_jax.models import r4b
from r4b_jax.models.attention import (
    attend,
    attend_shared_prefix,
    packed_mask,
    rope_tables,
    rotate,
)
from r4b_jax.models.block_attention import layout
from r4b_jax.models.layers import RMSNorm
from r4b_jax.models.packed_attention import attend_by_cudnn, attend_packed, packing
from r4b_jax.training.losses import token_logps

PATCHES = MODEL.vision.num_patches


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Three sequences with random replies, two of them with pictures."""
    rng = np.random.default_rng(0)
    examples = [with_reply(tokenizer, q, rng.integers(6, 290, 5)) for q in questions()]
    return one_a_row(examples, 56, tokenizer.pad_id)


def arrays(seed: int, *shapes) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


# Attention


def test_attention_is_the_loop_over_heads_that_it_stands_for():
    """Query head n reads key-value head n // 3: another grouping has the same shapes."""
    q, k, v = arrays(0, (2, 4, 6, 8), (2, 5, 2, 8), (2, 5, 2, 8))
    mask = np.random.default_rng(1).random((2, 4, 5)) < 0.6
    mask[..., 0] = True
    out = np.asarray(jax.jit(attend)(q, k, v, mask))
    for b, t, n in np.ndindex(2, 4, 6):
        scores = np.where(mask[b, t], k[b, :, n // 3] @ q[b, t, n] / np.sqrt(8), -np.inf)
        probs = np.exp(scores - scores.max())
        np.testing.assert_allclose(
            out[b, t, n], probs / probs.sum() @ v[b, :, n // 3], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("block", [3, 8, 16, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_attention_in_blocks_is_attention_under_the_packed_mask(block, seed):
    """What is skipped must be what nobody sees: any packing, any block, padding at any place."""
    rng = np.random.default_rng(seed)
    rows = []
    for segments in (rng.integers(1, 4), 3):
        ids = []
        for segment in range(1, segments + 1):
            lengths = rng.integers(1, 9, rng.integers(1, 5))
            ids += [(segment, b) for b, n in enumerate(lengths) for _ in range(n)]
        rows.append(ids)
    length = max(map(len, rows)) + 2
    ids = np.array([r + [(0, 0)] * (length - len(r)) for r in rows], np.int32)
    segments, branches = ids[..., 0], ids[..., 1]
    q, k, v, d_out = arrays(
        seed, (2, length, 6, 8), (2, length, 2, 8), (2, length, 2, 8), (2, length, 6, 8)
    )
    d_out *= (segments > 0)[..., None, None]  # what stands in padding is nobody's business

    def plain(q, k, v):
        return attend(q, k, v, packed_mask(segments, branches))

    def in_blocks(q, k, v):
        blocks = dataclasses.replace(
            packing(segments, branches), layout=layout(segments, branches, block)
        )
        return attend_packed(q, k, v, blocks)

    expected, back = jax.vjp(plain, q, k, v)
    out, back_in_blocks = jax.jit(lambda *x: jax.vjp(in_blocks, *x))(q, k, v)
    real = segments > 0
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-5)
    assert not np.asarray(out)[~real].any()
    for a, b in zip(back(d_out), back_in_blocks(d_out)):
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_what_a_gpu_is_asked_for_is_attention_under_the_packed_mask():
    """The same call with cuDNN's implementation runs there; here it is XLA's."""
    segments = np.array([[1] * 7 + [2] * 10 + [0] * 3])
    branches = np.array([[0] * 5 + [1] * 2 + [0] * 4 + [1] * 3 + [2] * 3 + [0] * 3])
    q, k, v, d_out = arrays(4, (1, 20, 6, 8), (1, 20, 2, 8), (1, 20, 2, 8), (1, 20, 6, 8))
    d_out *= (segments > 0)[..., None, None]
    mask = packed_mask(segments, branches)
    expected, back = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
    out, other_back = jax.vjp(lambda *x: attend_by_cudnn(*x, (segments, branches)), q, k, v)
    real = segments > 0
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-5)
    for a, b in zip(back(d_out), other_back(d_out)):
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_blocks_that_nobody_sees_are_not_visited():
    """A branch visits its prefix and itself: the cost of a group grows by its branches alone."""
    segments = jnp.array([[1] * 32 + [2] * 8])
    branches = jnp.array([[0] * 16 + [1] * 8 + [2] * 8 + [0] * 8])
    blocks = layout(segments, branches, 8)
    visited = [sorted(k[:n].tolist()) for k, n in zip(blocks.keys, blocks.counts)]
    assert visited == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [4]]


def test_two_parts_merged_equal_attention_on_a_copy_of_the_prefix():
    """What decoding attends to must be what training attends to, prefix stored once or not."""
    queries, rollouts, prefix_len, suffix_len = 2, 3, 5, 4
    rows = queries * rollouts
    q, prefix_k, prefix_v, suffix_k, suffix_v = arrays(
        2,
        (rows, 1, 6, 8),
        *[(queries, 2, prefix_len, 8)] * 2,
        *[(rows, 2, suffix_len, 8)] * 2,
    )
    prefix_mask = np.arange(prefix_len) < np.array([[5], [3]])
    written = np.arange(suffix_len) < np.array([[1], [2], [3], [4], [2], [1]])
    out = jax.jit(attend_shared_prefix)(
        q, (prefix_k, prefix_v), (suffix_k, suffix_v), prefix_mask, written
    )
    mask = np.concatenate([prefix_mask.repeat(rollouts, 0), written], 1)[:, None]
    whole = [
        np.concatenate([p.repeat(rollouts, 0), s], 2).swapaxes(1, 2)
        for p, s in ((prefix_k, suffix_k), (prefix_v, suffix_v))
    ]
    np.testing.assert_allclose(out, jax.jit(attend)(q, *whole, mask), rtol=1e-5, atol=1e-6)


def test_the_packed_mask_is_the_drawing_in_its_docstring():
    """A branch sees the prefix and itself; another segment and padding see nothing of it."""
    segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0]])
    branches = jnp.array([[0, 0, 1, 1, 2, 0, 1, 0]])
    drawing = """
        1.......
        11......
        111.....
        1111....
        11..1...
        .....1..
        .....11.
        ........
    """
    expected = [[c == "1" for c in line] for line in drawing.split()]
    np.testing.assert_array_equal(packed_mask(segments, branches)[0], expected)


def test_rotary_scores_depend_on_the_distance_alone():
    """Positions restart in each segment, which is only right if their origin does not matter."""
    q, k = arrays(3, (1, 4, 1, 8), (1, 4, 1, 8))

    def scores(offset):
        rope = rope_tables(jnp.arange(4)[None] + offset, 8, 700.0)
        return jnp.einsum("btnh,bsnh->bts", rotate(q, rope), rotate(k, rope))

    np.testing.assert_allclose(scores(0), scores(23), rtol=1e-4, atol=1e-4)
    assert not np.allclose(scores(0), jnp.einsum("btnh,bsnh->bts", q, k), atol=0.1)


def test_rotary_angles_are_position_times_theta_to_a_power():
    """Halves, not neighbours, are rotated together: Qwen3's layout, or no checkpoint would fit."""
    x = jnp.arange(1.0, 9.0).reshape(1, 1, 1, 8)
    out = np.asarray(rotate(x, rope_tables(jnp.array([[5]]), 8, 700.0)))[0, 0, 0]
    for i in range(4):
        angle = 5 * 700.0 ** (-2 * i / 8)
        expected = (i + 1 + 1j * (i + 5)) * np.exp(1j * angle)
        np.testing.assert_allclose([out[i], out[i + 4]], [expected.real, expected.imag], rtol=1e-5)


def test_the_norm_divides_by_the_root_mean_square_in_float32():
    """bfloat16 squares would lose the digits the norm is there to keep."""
    norm = RMSNorm(4, 1e-6)
    x = jnp.array([[3.0, 4.0, 0.0, 0.0]])
    np.testing.assert_allclose(norm(x), x / 2.5, rtol=1e-5)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


# The whole model


def test_a_token_depends_on_no_later_one_and_on_every_earlier_one(batch, params, logps_of):
    """Causality end to end; a leak would make the training loss a lie."""
    place = int((batch.segment_ids > 0).sum(1).min()) - 3
    tokens = batch.tokens.copy()
    tokens[:, place] = tokens[:, place] % 290 + 1
    before = np.asarray(logps_of(params, batch))
    after = np.asarray(logps_of(params, dataclasses.replace(batch, tokens=tokens)))
    np.testing.assert_array_equal(before[:, :place], after[:, :place])
    assert np.all((before != after)[:, place:][batch.segment_ids[:, place:] > 0])


def test_the_order_of_image_tokens_and_the_picture_matter(batch, params, logps_of):
    """A plan that gathered the wrong patches would still train, on the wrong picture."""
    base = np.asarray(logps_of(params, batch))
    answers = batch.loss_weights > 0
    index = np.where(batch.plan.weight > 0, PATCHES - 1 - batch.plan.index, 0)
    reordered = dataclasses.replace(batch, plan=dataclasses.replace(batch.plan, index=index))
    flipped = dataclasses.replace(batch, tiles=batch.tiles[:, :, :, ::-1].copy())
    for other in (reordered, flipped):
        changed = np.abs(np.asarray(logps_of(params, other)) - base)
        for row, has_picture in enumerate([True, False, True]):
            if has_picture:
                assert changed[row][answers[row]].min() > 1e-5
            else:
                assert changed[row][answers[row]].max() == 0


def test_image_tokens_take_their_features_and_not_their_embedding(batch, params, tokenizer):
    """The placeholder's own embedding must play no part, and text must play no part in images."""
    model = r4b.bind(MODEL, params)
    table = np.asarray(model.image_features(jnp.asarray(batch.tiles)))
    assert table.shape == (3, PATCHES + 1, MODEL.language.width)
    np.testing.assert_array_equal(table[0, -1], params["image_newline"])
    x = np.asarray(model.embed(batch.tokens, batch.tiles, batch.plan))
    places = batch.tokens == tokenizer.image_id
    assert places.sum(1).tolist() == [PATCHES, 0, PATCHES]
    for row in (0, 2):
        np.testing.assert_allclose(x[row][places[row]], table[row, :-1], atol=1e-5)
    embedding = np.asarray(params["language_model"]["embed_tokens"])
    np.testing.assert_array_equal(x[~places], embedding[batch.tokens[~places]])


def test_patches_are_counted_in_rows_from_the_top_left(params):
    """The plan and the position table count on it; a transposed tile would train, but worse."""
    tower = params["vision_tower"]
    alone = tower | {"layers": jax.tree.map(jnp.zeros_like, tower["layers"])}  # no patch mixes
    model = r4b.bind(MODEL, params | {"vision_tower": alone})
    tiles = np.stack([picture(1)] * 2)
    tiles[1, 4:8, 0:4] = 255 - tiles[1, 4:8, 0:4]  # second row, first column
    before, after = np.asarray(jax.jit(model.vision_tower)(tiles))
    changed = np.flatnonzero(np.any(before != after, -1))
    assert changed.tolist() == [1 * 2 + 0]


def test_a_plan_mixes_features_by_its_weights_and_reaches_the_newline(batch, params):
    """AnyRes needs it: bilinear weights over four rows, and the learned newline as a row."""
    model = r4b.bind(MODEL, params)
    table = np.asarray(model.image_features(jnp.asarray(batch.tiles)))
    index, weight = batch.plan.index.copy(), batch.plan.weight.copy()
    place = int(np.flatnonzero(weight[0, :, 0])[0])
    index[0, place], weight[0, place] = [2, 0, 3, PATCHES], [0.1, 0.2, 0.3, 0.4]
    plan = dataclasses.replace(batch.plan, index=index, weight=weight)
    x = np.asarray(model.embed(batch.tokens, batch.tiles, plan))
    np.testing.assert_allclose(x[0, place], weight[0, place] @ table[0][index[0, place]], atol=1e-5)


def test_parameters_are_named_by_component_and_float32():
    """Learning rates, freezing and conversion all go by the names of the top level."""
    shapes = jax.eval_shape(lambda: r4b.init(MODEL, jax.random.key(0)))
    assert set(shapes) == {"vision_tower", "projector", "image_newline", "language_model"}
    bfloat16 = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    for config in (MODEL, bfloat16):
        shapes = jax.eval_shape(lambda config=config: r4b.init(config, jax.random.key(0)))
        assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_layers_start_different_from_one_another_and_keys_decide():
    """Stacked layers drawn from one key would be copies; the seed must reach all of them."""
    init = jax.jit(lambda key: r4b.init(MODEL, key))
    a, b, again = (jax.device_get(init(jax.random.key(k))) for k in (0, 1, 0))
    for component in ("vision_tower", "language_model"):
        for layer in jax.tree.leaves(a[component]["layers"]["layers"]):
            assert layer.shape[0] == 2
            assert not np.array_equal(layer[0], layer[1]) or np.ptp(layer) == 0
    same = jax.tree.map(np.array_equal, a, again)
    assert all(jax.tree.leaves(same))
    drawn = jax.tree.map(lambda x, y: np.ptp(x) == 0 or not np.array_equal(x, y), a, b)
    assert all(jax.tree.leaves(drawn))


def test_parameters_of_the_full_model_have_the_papers_number():
    """Qwen3-4B has 4.02e9 parameters and SigLIP2-So400m 0.4e9: a wrong width would show."""
    shapes = jax.eval_shape(lambda: r4b.init(c.ModelConfig(), jax.random.key(0)))
    count = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in shapes.items()}
    # By hand: 36 layers of q, k, v, o, three MLP kernels, four norms; the table; the last norm.
    layer = 2560 * (4096 + 1024 + 1024) + 4096 * 2560 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    assert count["language_model"] == 36 * layer + 151936 * 2560 + 2560 == 4_022_468_096
    assert 0.41e9 < count["vision_tower"] < 0.42e9
    assert count["projector"] == 2 * 1152 + 1152 * 2560 + 2560 + 2560 * 2560 + 2560


# Every field does something: a changed value, and what must differ.

SHAPE, OUTPUT, PROGRAM = "shapes of the parameters", "log-probabilities", "the compiled program"
PROMPT = "image tokens of a prompt"
CHANGES = {
    "vision.image_size": (12, SHAPE),
    "vision.patch_size": (8, SHAPE),
    "vision.width": (21, SHAPE),
    "vision.num_layers": (3, SHAPE),
    "vision.num_heads": (2, OUTPUT),
    "vision.mlp_dim": (23, SHAPE),
    "vision.norm_eps": (0.3, OUTPUT),
    "vision.image_mean": ((0.4, 0.5, 0.5), OUTPUT),
    "vision.image_std": ((0.5, 0.5, 0.3), OUTPUT),
    "vision.grid_pinpoints": (((8, 16),), PROMPT),
    "vision.max_grid_tiles": (1, PROMPT),
    "language.vocab_size": (301, SHAPE),
    "language.width": (22, SHAPE),
    "language.num_layers": (3, SHAPE),
    "language.num_heads": (4, SHAPE),
    "language.num_kv_heads": (3, SHAPE),
    "language.head_dim": (10, SHAPE),
    "language.mlp_dim": (28, SHAPE),
    "language.rope_theta": (900.0, OUTPUT),
    "language.norm_eps": (0.3, OUTPUT),
    "language.tied_head": (False, SHAPE),
    "projector_norm": (False, SHAPE),
    "projector_norm_eps": (0.3, OUTPUT),
    "compute_dtype": ("bfloat16", OUTPUT),
    "remat": ("full", PROGRAM),
    "loss_chunk": (65, PROGRAM),
}


def changed(name: str, value) -> c.ModelConfig:
    group, _, field = name.rpartition(".")
    if not group:
        return dataclasses.replace(MODEL, **{field: value})
    part = dataclasses.replace(getattr(MODEL, group), **{field: value})
    return dataclasses.replace(MODEL, **{group: part})


def test_the_list_of_changes_names_every_field():
    """A new field must say below what it changes."""
    fields = {f.name for f in dataclasses.fields(c.ModelConfig)} - {"vision", "language"}
    fields |= {f"vision.{f.name}" for f in dataclasses.fields(c.VisionConfig)}
    fields |= {f"language.{f.name}" for f in dataclasses.fields(c.LanguageConfig)}
    assert set(CHANGES) == fields


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_of_the_model_changes_something(name, batch, params, tokenizer):
    """A field that can be set and changes nothing is a silent lie (tunix's rope_theta)."""
    value, what = CHANGES[name]
    config = changed(name, value)
    if what is PROMPT:
        grid = dataclasses.replace(MODEL.vision, grid_pinpoints=((16, 16),))
        vision = dataclasses.replace(grid, **{name.split(".")[1]: value})
        prompts = [encode_prompt(tokenizer, v, questions()[0]) for v in (grid, vision)]
        assert len(prompts[0].tokens) != len(prompts[1].tokens)
        return
    if what is SHAPE:
        shapes = [
            jax.tree.map(
                lambda x: x.shape, jax.eval_shape(lambda m=m: r4b.init(m, jax.random.key(0)))
            )
            for m in (MODEL, config)
        ]
        assert shapes[0] != shapes[1]
        return

    def run(model_config):
        def logps(p):
            return token_logps(r4b.bind(model_config, p), batch, model_config.loss_chunk)

        if what is PROGRAM:
            return str(jax.make_jaxpr(jax.grad(lambda p: logps(p).sum()))(params))
        return np.asarray(jax.jit(logps)(params))

    before, after = run(MODEL), run(config)
    if what is PROGRAM:
        assert before != after
        return
    answers = batch.loss_weights > 0
    assert np.abs(before - after)[answers].max() > 1e-4
    if name.startswith(("vision", "projector")):  # rows without a picture must not notice
        np.testing.assert_array_equal(before[1], after[1])
