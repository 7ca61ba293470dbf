"""Optimisers, frozen components, the chunked loss, and recomputation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MODEL, assert_trees_close, one_a_row, questions, with_reply

from r4b_jax import config as c
from r4b_jax.common.checkpoint import StageCheckpoints
from r4b_jax.data.examples import Packer, encode_sample, place_tiles
from r4b_jax.data.samples import Sample
from r4b_jax.models import r4b
from r4b_jax.training.losses import caption_words_loss, supervised_loss, token_logps
from r4b_jax.training.optimizer import bpo_optimizer, schedule, stage_optimizer, trainable
from r4b_jax.training.step import apply_gradients, init_state, make_train_step

WARMUP_LIKE = dict(lr_projector=1e-3)
ALIGNMENT_LIKE = dict(lr_projector=1e-3, lr_vision=4e-4)


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Three sequences, two of them with pictures."""
    examples = [with_reply(tokenizer, q, range(20, 27)) for q in questions()]
    return one_a_row(examples, 56, tokenizer.pad_id)


def random_grads(params: dict, names) -> dict:
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)),
        {name: params[name] for name in names},
    )


def first_update(params: dict, stage: c.StageConfig) -> dict:
    """What the stage's optimiser adds to the parameters at its first step, on random gradients."""
    optimizer, names = stage_optimizer(stage), trainable(stage)
    old, grads = {name: params[name] for name in names}, random_grads(params, names)
    return jax.device_get(jax.jit(lambda: optimizer.update(grads, optimizer.init(old), old)[0])())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("rates", [WARMUP_LIKE, ALIGNMENT_LIKE], ids=["warmup", "alignment"])
def test_a_component_of_rate_0_stays_bitwise_the_same_and_the_others_move(
    rates, optimizer, batch, params
):
    """Stage 1 trains the projector, stage 2 the tower too: weight decay must not leak either."""
    stage = c.StageConfig(num_steps=5, optimizer=optimizer, weight_decay=0.1, **rates)
    train_step = make_train_step(MODEL, stage)
    state = init_state(params, stage_optimizer(stage), trainable(stage))
    state, metrics = train_step(jax.tree.map(jnp.array, state), batch)
    assert int(state.step) == 1 and np.isfinite(metrics["loss"])
    assert metrics["tokens"] == (batch.segment_ids > 0).sum()
    assert metrics["loss_tokens"] == batch.loss_weights.sum() == 21
    moving = {"projector", "image_newline"} | ({"vision_tower"} if "lr_vision" in rates else set())
    for name in params:
        same = jax.tree.map(np.array_equal, params[name], state.params[name])
        assert all(jax.tree.leaves(same)) == (name not in moving), name
        assert not any(jax.tree.leaves(same)) or name not in moving, name


def test_frozen_components_have_no_optimizer_state(params):
    """Their moments would cost twice the memory of what is not even trained."""
    stage = c.StageConfig(num_steps=5, **WARMUP_LIKE)
    state = init_state(params, stage_optimizer(stage), trainable(stage))
    trained = sum(x.size for n in trainable(stage) for x in jax.tree.leaves(params[n]))
    held = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert held == 2 * trained


def test_adams_first_step_is_each_components_own_rate(params):
    """Whatever the gradient, it is the rate itself: three rates can be read off."""
    rates = dict(lr_projector=1e-3, lr_vision=4e-4, lr_language=2e-5)
    update = first_update(params, c.StageConfig(num_steps=5, max_grad_norm=1e9, **rates))
    fields = {"vision_tower": "lr_vision", "language_model": "lr_language"}
    assert set(update) == set(params)
    for name, tree in update.items():
        for x in jax.tree.leaves(tree):
            np.testing.assert_allclose(np.abs(x), rates[fields.get(name, "lr_projector")], rtol=0.1)


def test_under_muon_each_components_update_is_proportional_to_its_own_rate_alone(params):
    """Kernels and the rest alike: a rate that reached another component would bend it."""
    rates = dict(lr_projector=1e-3, lr_vision=4e-4, lr_language=2e-5)
    stage = c.StageConfig(num_steps=5, optimizer="muon", max_grad_norm=1e9, **rates)
    before = first_update(params, stage)
    after = first_update(params, dataclasses.replace(stage, lr_projector=2e-3, lr_language=6e-5))
    factors = {"vision_tower": 1, "projector": 2, "image_newline": 2, "language_model": 3}
    for name, factor in factors.items():
        for x, y in zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name])):
            np.testing.assert_allclose(y, factor * x, rtol=1e-4)
            assert np.abs(x).max() > 0


def test_muon_takes_the_kernels_and_leaves_tables_norms_and_biases_to_adamw(params):
    """An embedding row of a rare token must not be orthogonalised with the others."""
    stage = c.StageConfig(num_steps=5, optimizer="muon", adam_lr_ratio=0.0, lr_language=1e-3)
    change = first_update(params, stage)["language_model"]
    for path, x in jax.tree_util.tree_leaves_with_path(change):
        assert np.any(x) == (path[-1].key == "kernel"), jax.tree_util.keystr(path)


def test_muon_treats_each_layer_of_a_stack_on_its_own(params):
    """Stacked kernels are [L, in, out]: as one matrix, layers would be mixed with each other."""
    stage = c.StageConfig(num_steps=5, optimizer="muon", lr_language=1e-3, max_grad_norm=1e9)
    update = first_update(params, stage)["language_model"]["layers"]["layers"]
    for layer in update["mlp"]["up_proj"]["kernel"]:
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.min() / values.max() > 0.4  # Newton-Schulz is only near orthogonal


def test_schedules_warm_up_and_end_where_they_should():
    """Cosine from the peak to its share of it, constant, both after a linear warm-up."""
    cosine = schedule(2.0, c.StageConfig(num_steps=110, warmup_steps=10, final_lr_ratio=0.25))
    constant = schedule(
        2.0, c.StageConfig(num_steps=110, warmup_steps=10, schedule="constant", final_lr_ratio=0.25)
    )
    for step, value in ((5, 1.0), (10, 2.0), (60, 2 * (0.25 + 0.75 / 2)), (110, 0.5), (999, 0.5)):
        np.testing.assert_allclose(cosine(step), value, rtol=1e-5)
        np.testing.assert_allclose(constant(step), min(2.0, 0.2 * step), rtol=1e-5)
    no_warmup = schedule(2.0, c.StageConfig(num_steps=10))
    np.testing.assert_allclose([no_warmup(0), no_warmup(10)], [2.0, 0.2], rtol=1e-5)
    with pytest.raises(c.ConfigError, match="cosin"):
        schedule(2.0, c.StageConfig(schedule="cosin"))


@pytest.mark.parametrize(
    "field, value", [("b2", 0.5), ("weight_decay", 0.3), ("max_grad_norm", 1e-9)]
)
@pytest.mark.parametrize("make", ["stage-adamw", "stage-muon", "bpo"])
def test_every_setting_of_an_optimizer_changes_its_update(make, field, value):
    """A setting that does not reach the optimiser is a silent lie."""
    small = {"projector": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}

    def change(**settings):
        if make == "bpo":
            optimizer = bpo_optimizer(c.BPOConfig(learning_rate=1e-2, warmup_steps=0, **settings))
        else:
            optimizer = stage_optimizer(
                c.StageConfig(
                    num_steps=9, lr_projector=1e-2, optimizer=make.split("-")[1], **settings
                )
            )
        state, p = optimizer.init(small), small
        for step in (1.0, -0.3):
            grads = jax.tree.map(lambda x, step=step: jnp.cos(jnp.arange(x.size) * step), p)
            grads = jax.tree.map(lambda g, x: g.reshape(x.shape), grads, p)
            updates, state = optimizer.update(grads, state, p)
            p = optax.apply_updates(p, updates)
        return jax.device_get(p["projector"]["bias"])

    assert np.abs(change(**{field: value}) - change()).max() > 1e-5


@pytest.mark.parametrize(
    "ratio, expected", [(1.0, [0, 5, 10, 10, 10, 10]), (0.2, [0, 5, 10, 8, 4, 2])]
)
def test_the_bpo_rate_is_constant_after_its_warm_up_unless_it_is_to_end_lower(ratio, expected):
    """Read off Adam's steps on a constant gradient, in thousandths."""
    settings = c.BPOConfig(
        learning_rate=1e-2, warmup_steps=2, num_steps=5, final_lr_ratio=ratio, max_grad_norm=1e9
    )
    optimizer, params = bpo_optimizer(settings), {"x": jnp.zeros(3)}
    state, sizes = optimizer.init(params), []
    for _ in range(6):
        updates, state = optimizer.update({"x": jnp.ones(3)}, state, params)
        sizes.append(-1e3 * float(updates["x"][0]))
    np.testing.assert_allclose(sizes, expected, rtol=1e-4, atol=1e-6)


# The loss


def everywhere(batch):
    """The batch with a loss weight at every place."""
    return dataclasses.replace(batch, loss_weights=np.ones(batch.tokens.shape, np.float32))


def test_log_probabilities_do_not_depend_on_the_chunk(batch, params):
    """Chunks bound the memory of the logits; the last one is padded and must not show."""
    count, batch = batch.tokens.size, everywhere(batch)
    results = [
        np.asarray(
            jax.jit(lambda p, chunk=chunk: token_logps(r4b.bind(MODEL, p), batch, chunk))(params)
        )
        for chunk in (17, count, 10 * count)
    ]
    assert count % 17
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-5, atol=1e-5)


def test_log_probabilities_are_a_distribution_with_the_banned_ids_left_out(
    batch, params, logits_of
):
    """Sampler and trainer must mean the same distribution, or the ratio is not one."""
    never = (3, 5, 299)
    logits = np.asarray(logits_of(params, batch))
    allowed = np.setdiff1d(np.arange(300), never)
    norm = np.log(np.exp(logits[..., allowed].astype(np.float64)).sum(-1))
    expected = np.take_along_axis(logits, batch.tokens[..., None], -1)[..., 0] - norm
    batch = everywhere(batch)
    logps = jax.jit(lambda p: token_logps(r4b.bind(MODEL, p), batch, 64, never))(params)
    fine = ~np.isin(batch.tokens, never)
    np.testing.assert_allclose(np.asarray(logps)[fine], expected[fine], atol=1e-5)
    assert np.all(np.asarray(logps)[~fine] < -1e9)


def test_places_that_carry_no_loss_cost_no_logits_and_change_nothing(batch, params):
    """A picture's thousands of tokens carry none: chunks without loss are skipped, and what they
    would have been is 0."""
    assert 0 < (batch.loss_weights > 0).sum() < batch.tokens.size / 4

    def loss(params, chunk):
        logps = token_logps(r4b.bind(MODEL, params), batch, chunk)
        return -jnp.sum(logps * batch.loss_weights), logps

    results = [
        jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(params, n))
        for n in (8, batch.tokens.size)
    ]
    ((skipping, logps), grads), ((whole, all_logps), whole_grads) = results
    np.testing.assert_allclose(skipping, whole, rtol=1e-6)
    assert_trees_close(grads, whole_grads, 1e-5)
    assert (logps == 0).mean() > 0.6 and (all_logps != 0).all()
    # And costs no copies of the head either: kept for every chunk, they would fill a TPU.
    gradient = jax.make_jaxpr(jax.grad(lambda p: loss(p, 8)[0]))(params)
    sizes = {math.prod(aval.shape) for aval in all_avals(gradient.jaxpr)}
    table = params["language_model"]["embed_tokens"].size
    assert table in sizes and max(sizes) < batch.tokens.size / 8 * table


def all_avals(jaxpr):
    """The shapes of all values in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from all_avals(inner)


def test_the_supervised_loss_is_a_weighted_sum_and_its_weight(batch, params, logps_of):
    """Sum and weight apart, so that micro-batches and devices add up exactly."""
    weights = batch.loss_weights * np.linspace(0.5, 2, batch.tokens.shape[1], dtype=np.float32)
    weighted = dataclasses.replace(batch, loss_weights=weights)
    loss = jax.jit(lambda p: supervised_loss(r4b.bind(MODEL, p), weighted, MODEL.loss_chunk))
    total, weight = loss(params)
    logps = np.asarray(logps_of(params, batch))
    np.testing.assert_allclose(total, -(logps * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)


def test_caption_words_are_counted_weighed_by_rarity_and_named_by_the_mean_patch(tokenizer, params):
    """Worked out again in numpy: a word that every caption has teaches nothing, one said twice
    counts twice."""
    captions = [(20, 21, 20, 29), (22, 21, 29), (21, 29)]  # 29 in all: log(3/3) = 0; 21 too
    with_pictures = [questions()[0], questions()[2], questions()[0]]
    examples = [with_reply(tokenizer, q, ids) for q, ids in zip(with_pictures, captions)]
    batch = one_a_row(examples[:2], 56, tokenizer.pad_id)
    total, rows = jax.jit(lambda p: caption_words_loss(r4b.bind(MODEL, p), batch))(params)

    @jax.jit
    def head(params):
        model = r4b.bind(MODEL, params)
        patches = model.image_features(batch.tiles)[:, :-1]
        language = model.language_model
        return jax.nn.log_softmax(language.logits(language.norm(patches.sum(1) / patches.shape[1])))

    logps = np.asarray(head(params))
    # 20 twice in row 0 and nowhere else, 22 once in row 1 and nowhere else; 21 and 29 in both.
    np.testing.assert_allclose(total, -(logps[0, 20] + logps[1, 22]), rtol=1e-5)
    assert rows == 2

    batch = one_a_row(examples, 56, tokenizer.pad_id)
    total, rows = jax.jit(lambda p: caption_words_loss(r4b.bind(MODEL, p), batch))(params)
    assert np.isfinite(total) and rows == 3  # the third caption has no word of its own: no target


def test_recomputing_layers_changes_neither_loss_nor_gradients(batch, params):
    """remat trades time for memory and must trade nothing else."""
    results = []
    for remat in ("matmuls", "attention", "full", "offload"):
        model = dataclasses.replace(MODEL, remat=remat)

        @jax.jit
        def loss(params, model=model):
            def f(params):
                return supervised_loss(r4b.bind(model, params), batch, model.loss_chunk)[0]

            return jax.value_and_grad(f)(params)

        results.append(jax.device_get(loss(params)))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    assert_trees_close(results[0][1], results[1][1], 1e-5)


def test_twenty_batches_of_varying_pictures_compile_one_program(params, tokenizer):
    """Packing exists so that shapes stand still: a recompilation costs more than the step."""
    stage = c.StageConfig(num_steps=20, batch_rows=2, packed_len=90, packed_tiles=3, **WARMUP_LIKE)
    names = trainable(stage)
    state = init_state(jax.tree.map(jnp.array, params), stage_optimizer(stage), names)
    step, rng, tiles = make_train_step(MODEL, stage), np.random.default_rng(0), set()
    vision = dataclasses.replace(MODEL.vision, grid_pinpoints=((8, 8), (8, 16), (16, 8)))
    for _ in range(20):
        packer = Packer(2, 90, 3, vision, tokenizer.pad_id)
        for _ in range(rng.integers(1, 5)):
            side = int(rng.integers(3, 30)), int(rng.integers(3, 30))
            image = rng.integers(0, 256, (*side, 3), np.uint8) if rng.random() < 0.7 else None
            sample = Sample.ask("ocr", image, "Read it." * rng.integers(1, 3), "12")
            packer.add(encode_sample(tokenizer, vision, sample))
        for placed in packer.placements:
            place_tiles(packer.batch, placed.row, placed.tile, placed.example)
        tiles.add(int(packer.tiles_used.sum()))
        state, _ = step(state, packer.batch)
    assert len(tiles) > 2 and step._cache_size() == 1


# Checkpoints


def test_a_checkpoint_gives_back_every_bit_and_the_position(params, tmp_path):
    """State, moments and data position together: without one of them a run would not go on."""
    stage = c.StageConfig(num_steps=5, **WARMUP_LIKE)
    optimizer = stage_optimizer(stage)
    state = init_state(params, optimizer, trainable(stage))
    grads = random_grads(params, trainable(stage))
    checkpoints = StageCheckpoints(str(tmp_path), keep=2)
    assert checkpoints.latest is None
    step, states = jax.jit(lambda s: apply_gradients(s, grads, optimizer)), []
    for position in (11, 22, 33):
        states.append(state := step(state))
        checkpoints.save(state, {"position": position, "dropped": position // 11})
    checkpoints.close()

    again = StageCheckpoints(str(tmp_path))
    assert again.latest == 3
    restored, data = again.restore(init_state(params, optimizer, trainable(stage)))
    assert data == {"position": 33, "dropped": 3}
    same = jax.tree.map(np.array_equal, restored, states[2])
    assert all(jax.tree.leaves(same)) and len(jax.tree.leaves(same)) > 50
    from_numpy, _ = again.restore(jax.device_get(states[0]))  # placed on the default device
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, from_numpy, states[2])))
    only = again.restore_params()
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, only, states[2].params)))
    again.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "3"]
