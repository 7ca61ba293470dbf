"""Rollouts of both modes, the packed rows they are trained on, and the update on them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIG, MODEL, assert_trees_close, one_a_row, questions, with_reply

from r4b_jax import config as c
from r4b_jax.data import dialogue
from r4b_jax.data.examples import encode_prompt
from r4b_jax.decoding.generate import Generation
from r4b_jax.models import block_attention, packed_attention, r4b
from r4b_jax.models.layers import in_int8
from r4b_jax.rl.objectives import group_advantages
from r4b_jax.rl.rollout import (
    Rollouts,
    collect_rollouts,
    launch_rollouts,
    pack_rollouts,
    rollout_modes,
    token_weights,
)
from r4b_jax.rl.update import make_update, reference_pass, update
from r4b_jax.training.losses import token_logps
from r4b_jax.training.optimizer import bpo_optimizer
from r4b_jax.training.step import init_state

BPO = dataclasses.replace(CONFIG.bpo, packed_len=80, packed_tiles=2, micro_rows=2, g=2)
MODE_WEIGHT = 0.7


def config_with(**changes) -> c.Config:
    return dataclasses.replace(CONFIG, bpo=dataclasses.replace(BPO, **changes))


def invented(tokenizer, algorithm: str = "bpo") -> Rollouts:
    """Replies of known lengths and random tokens to three questions, in place of generate's."""
    rng = np.random.default_rng(0)
    modes = rollout_modes(dataclasses.replace(BPO, algorithm=algorithm))
    lengths = rng.integers(4, 11, (3, len(modes)))
    lengths[1, 0] = 1  # ended, or was cut off, at once
    tokens = np.full((3, len(modes), 12), tokenizer.pad_id, np.int32)
    logps = np.zeros((3, len(modes), 12), np.float32)
    for q, r in np.ndindex(3, len(modes)):
        n = lengths[q, r]
        tokens[q, r, :n] = rng.integers(6, 280, n)
        begin = dialogue.forced_ids(tokenizer, modes[r])[:n]
        tokens[q, r, : len(begin)] = begin
        logps[q, r, :n] = -rng.random(n)
    generation = Generation(tokens, logps, lengths, np.zeros((3, 2), np.float32), 12, 1.0)
    prompts = [encode_prompt(tokenizer, MODEL.vision, q) for q in questions()]
    replies = [
        [dialogue.split_reply(tokenizer, tokens[q, r, : lengths[q, r]]) for r in range(len(modes))]
        for q in range(3)
    ]
    return Rollouts(questions(), prompts, modes, generation, replies)


@pytest.fixture(scope="module")
def rollouts(tokenizer) -> Rollouts:
    return invented(tokenizer)


@pytest.fixture(scope="module")
def advantages() -> np.ndarray:
    """A different number for each rollout, so that each can be told by its own."""
    return np.arange(1, 13, dtype=np.float32).reshape(3, 4)


def packed(tokenizer, rollouts, **changes):
    return pack_rollouts(config_with(**changes), tokenizer, rollouts)


def branches(batches):
    """Every branch as (micro-batch, row, places, prompt tokens, reply tokens)."""
    for i, micro in enumerate(batches):
        b = micro.batch
        for row in range(b.tokens.shape[0]):
            for segment in range(1, b.segment_ids[row].max() + 1):
                inside = b.segment_ids[row] == segment
                prompt = b.tokens[row][inside & (b.branch_ids[row] == 0)]
                for branch in range(1, b.branch_ids[row][inside].max() + 1):
                    places = np.flatnonzero(inside & (b.branch_ids[row] == branch))
                    yield i, row, places, prompt, b.tokens[row][places]


def expected_replies(rollouts):
    """(q, r) -> prompt tokens and reply tokens, as hashable keys."""
    return {
        (q, r): (
            tuple(rollouts.prompts[q].tokens),
            tuple(rollouts.generation.tokens[q, r, : rollouts.generation.lengths[q, r]]),
        )
        for q, r in np.ndindex(rollouts.generation.lengths.shape)
    }


def test_every_rollout_is_packed_exactly_once_behind_its_own_prompt(
    tokenizer, rollouts, advantages
):
    """A rollout lost or doubled in packing would bend the advantages, which sum to zero."""
    batches = packed(tokenizer, rollouts)
    found = [(tuple(prompt), tuple(reply)) for *_, prompt, reply in branches(batches)]
    assert sorted(found) == sorted(expected_replies(rollouts).values())
    # The groups are split: more prompts were written than there are questions.
    segments = sum(int(m.batch.segment_ids.max(1).sum()) for m in batches)
    assert segments > 3 and len(batches) > 1
    tiles = [int((m.batch.tiles.any((2, 3, 4))).sum(1).max()) for m in batches]
    assert max(tiles) <= BPO.packed_tiles


def test_each_token_knows_its_rollout_and_the_log_probability_it_was_sampled_with(
    tokenizer, rollouts
):
    """One place off, and every update would push the wrong token."""
    batches = packed(tokenizer, rollouts)
    keys = {value: key for key, value in expected_replies(rollouts).items()}
    weighted = 0
    for i, row, places, prompt, reply in branches(batches):
        q, r = keys[tuple(prompt), tuple(reply)]
        micro, n = batches[i], len(places)
        np.testing.assert_array_equal(micro.rollout[row][places], [q * 4 + r] * n)
        np.testing.assert_array_equal(
            micro.sampler_logps[row][places], rollouts.generation.logps[q, r, :n]
        )
        assert micro.is_mode[row][places].tolist() == [True] + [False] * (n - 1)
        assert micro.thinks[row][places].tolist() == [rollouts.replies[q][r].thinks] * n
        weighted += n
    assert weighted == rollouts.generation.lengths.sum()
    assert sum(np.count_nonzero(m.is_mode) for m in batches) == 12


@pytest.mark.parametrize("mode_tokens", ["mask", "policy", "behaviour"])
def test_weights_are_those_of_the_modules_drawing(tokenizer, rollouts, advantages, mode_tokens):
    """m for the mode token, nothing for a forced `</think>`, 1 / count for what was sampled."""
    batches = packed(tokenizer, rollouts, mode_tokens=mode_tokens, mode_weight=MODE_WEIGHT)
    m = 0.0 if mode_tokens == "mask" else MODE_WEIGHT
    for i, row, places, _, reply in branches(batches):
        n = len(reply)
        if reply[0] == tokenizer.direct_id:
            assert reply[1] == tokenizer.end_think_id
            expected = [m, 0] + [1 / (n - 2)] * (n - 2)
        else:
            assert reply[0] == tokenizer.thinking_id
            expected = [m] + [1 / (n - 1)] * (n - 1) if n > 1 else [m]
        np.testing.assert_allclose(batches[i].batch.loss_weights[row][places], expected, rtol=1e-6)
    for micro in batches:  # prompts and padding weigh nothing
        assert not micro.batch.loss_weights[micro.batch.branch_ids == 0].any()


def test_grpo_forces_nothing_so_its_mode_token_is_a_token_like_the_others(tokenizer, advantages):
    """Vanilla GRPO is the baseline: a weight or an old probability of its own would rig it."""
    rollouts = invented(tokenizer, "grpo")
    assert rollouts.modes == ["auto"] * 4
    batches = packed(
        tokenizer,
        rollouts,
        algorithm="grpo",
        mode_tokens="behaviour",
        mode_weight=MODE_WEIGHT,
    )
    for i, row, places, _, reply in branches(batches):
        weights = batches[i].batch.loss_weights[row][places]
        np.testing.assert_allclose(weights, [1 / len(reply)] * len(reply), rtol=1e-6)
    assert not any(m.is_mode.any() for m in batches)


def test_a_bpo_query_has_as_many_thinking_as_direct_rollouts():
    """The halves are equal, or the mean advantages of the two modes would not be opposite."""
    assert rollout_modes(c.BPOConfig(g=3)) == ["thinking"] * 3 + ["non-thinking"] * 3
    assert rollout_modes(c.BPOConfig(g=3, algorithm="grpo")) == ["auto"] * 6


@pytest.mark.parametrize("length", [2, 3, 9])
def test_the_weights_of_a_rollouts_sampled_tokens_sum_to_one(length):
    """Per-sequence averaging: a long trace weighs as much as a short answer."""
    for mode, forced in (("thinking", 1), ("non-thinking", 2), ("auto", 0)):
        weights = token_weights(c.BPOConfig(mode_tokens="mask"), mode, length, forced)
        assert abs(weights.sum() - 1) < 1e-6 or length == forced


def test_shared_prefixes_equal_repeated_ones(
    tokenizer, rollouts, advantages, params, logps_of, logits_of
):
    """The prompt is computed once for its rollouts: each must score as if it stood alone."""
    never = tuple(tokenizer.never_sampled)
    batches = packed(tokenizer, rollouts)
    keys = {value: key for key, value in expected_replies(rollouts).items()}
    alone = {}
    for q, r in keys.values():
        reply = rollouts.generation.tokens[q, r, : rollouts.generation.lengths[q, r]]
        alone[q, r] = with_reply(tokenizer, questions()[q], reply)
    batch = one_a_row(list(alone.values()), 60, tokenizer.pad_id)
    rows = dict(zip(alone, np.asarray(logps_of(params, batch, never=never))))
    inside = [np.asarray(logps_of(params, m.batch, never=never)) for m in batches]
    for i, row, places, prompt, reply in branches(batches):
        q, r = keys[tuple(prompt), tuple(reply)]
        expected = rows[q, r][len(prompt) : len(prompt) + len(reply)]
        np.testing.assert_allclose(inside[i][row][places], expected, rtol=1e-4, atol=2e-5)


def test_a_poisoned_branch_changes_nothing_in_the_other_branches(
    tokenizer, rollouts, advantages, params, logps_of
):
    """Rollouts of one query share a row and must not read each other's answers."""
    never = tuple(tokenizer.never_sampled)
    micro = packed(tokenizer, rollouts)[0]
    row, places = next((row, places) for _, row, places, *_ in branches([micro]))
    tokens = micro.batch.tokens.copy()
    tokens[row, places] = 7
    poisoned = dataclasses.replace(micro.batch, tokens=tokens)
    before, after = (np.asarray(logps_of(params, b, never=never)) for b in (micro.batch, poisoned))
    others = (micro.batch.branch_ids > 0) & (tokens == micro.batch.tokens)
    np.testing.assert_array_equal(before[others], after[others])
    assert others.sum() > 10 and np.any(before != after)


def test_a_reply_that_fits_no_row_is_refused(tokenizer, rollouts, advantages):
    """Cutting it would train on something that was never sampled."""
    with pytest.raises(ValueError, match="packed_len"):
        packed(tokenizer, rollouts, packed_len=30)


@pytest.mark.parametrize("int8", [False, True])
def test_sampled_rollouts_come_apart_into_the_modes_they_were_forced_to(tokenizer, params, int8):
    """From the questions to packed rows in one go, as the loop does it."""
    config = config_with(int8_rollouts=int8)
    queries = [(q, encode_prompt(tokenizer, MODEL.vision, q)) for q in questions()]
    launched = launch_rollouts(config, params, tokenizer, queries, jax.random.key(0))
    sampled = collect_rollouts(tokenizer, launched)
    assert sampled.generation.tokens.shape == (3, 4, config.generate.max_new_tokens)
    for replies in sampled.replies:
        assert [reply.thinks for reply in replies] == [True, True, False, False]
    batches = pack_rollouts(config, tokenizer, sampled)
    assert len(list(branches(batches))) == 12


def test_eight_bit_kernels_are_near_the_kernels_and_give_near_log_probabilities(
    params, tokenizer, rollouts, logps_of
):
    """Near, or importance weights could not mend it; not equal, or nothing was quantised."""
    small = in_int8(params)
    kernel = params["language_model"]["layers"]["layers"]["mlp"]["up_proj"]["kernel"]
    quantised = small["language_model"]["layers"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert quantised.values.dtype == jnp.int8 and quantised.values.shape == kernel.shape
    error = np.abs(quantised.values * quantised.scale - kernel)
    assert np.all(error <= quantised.scale / 2 * 1.001) and error.max() > 0
    batch = packed(tokenizer, rollouts)[0].batch
    real = batch.segment_ids > 0
    gap = np.abs(logps_of(params, batch) - logps_of(small, batch))[real]
    assert 0 < gap.mean() < 0.05


# The update


OFF_POLICY = dict(updates_per_rollout=2, learning_rate=1e-2, warmup_steps=0, kl_beta=0.1)
NO_KL = dict(learning_rate=1e-3, warmup_steps=0, kl_beta=0.0)


@functools.cache
def update_of(never, **changes):
    """The config with changes in `bpo`, and the jitted parts of its update."""
    config = config_with(**changes)
    return config, make_update(config, never)


def run_update(tokenizer, rollouts, advantages, params, settings):
    """One call of `update`, from a fresh optimiser: the new state and the metrics."""
    config, parts = update_of(tuple(tokenizer.never_sampled), **settings)
    copy = jax.tree.map(jnp.array, params)
    names = [name for name in params if name not in config.bpo.frozen]
    state = init_state(copy, bpo_optimizer(config.bpo), names)
    batches = pack_rollouts(config, tokenizer, rollouts)
    reference = reference_pass(config, parts, params, batches)
    return update(config, parts, state, batches, advantages, reference)


def gradients_of(tokenizer, rollouts, advantages, params, **settings):
    """Each micro-batch's (gradients, log-probabilities, metric sums) at the first update."""
    config, parts = update_of(tuple(tokenizer.never_sampled), **settings)
    batches = pack_rollouts(config, tokenizer, rollouts)
    reference = reference_pass(config, parts, params, batches)
    return [
        parts.gradients(
            params, {}, batch, advantages.ravel(), logps, batch.sampler_logps, True, 12.0
        )
        for batch, logps in zip(batches, reference)
    ]


def test_micro_batches_add_up_to_the_gradient_of_one_batch(tokenizer, rollouts, advantages, params):
    """How many rows fit the memory must not change what is learned."""
    totals = []
    for more in ({}, {"micro_rows": 6}):
        found = gradients_of(tokenizer, rollouts, advantages, params, **NO_KL, **more)
        totals.append(jax.tree.map(lambda *x: sum(x), *[grads for grads, *_ in found]))
        loss = sum(float(sums["loss"]) for *_, sums in found)
        # At ratio 1 the loss is -mean of advantage * (mode weight 1 + token weights 1).
        per_rollout = [
            (1 + (n > forced)) * a
            for n, a, forced in zip(
                rollouts.generation.lengths.ravel(), advantages.ravel(), [1, 1, 2, 2] * 3
            )
        ]
        np.testing.assert_allclose(loss, -sum(per_rollout) / 12, rtol=1e-5)
    assert_trees_close(*totals, 1e-4)


def test_the_first_update_has_ratio_one_and_no_kl_to_itself(
    tokenizer, rollouts, advantages, params
):
    """Right after annealing policy and reference are one; anything else is a wrong forward."""
    for _, _, sums in gradients_of(tokenizer, rollouts, advantages, params, **OFF_POLICY):
        assert sums["ratio"] == sums["tokens"] > 0
        assert sums["clipped"] == 0 and sums["kl"] < 1e-9 * sums["tokens"]


def test_without_a_kl_the_reference_is_not_run(tokenizer, rollouts, params):
    """Its pass costs a third of an update."""
    config, parts = update_of(tuple(tokenizer.never_sampled), **NO_KL)
    batches = pack_rollouts(config, tokenizer, rollouts)
    assert reference_pass(config, parts, None, batches) == [None] * len(batches)


def test_two_updates_on_the_same_rollouts_count_as_one_step_and_move_the_ratio(
    tokenizer, rollouts, advantages, params
):
    """The step counts rollouts: keys, data and checkpoints go by it."""
    state, metrics = run_update(tokenizer, rollouts, advantages, params, OFF_POLICY)
    assert int(state.step) == 1
    assert metrics["ratio"] != 1.0 and metrics["kl"] > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_frozen_components_stay_and_the_others_move_as_they_would(
    tokenizer, rollouts, advantages, params
):
    """The reference shares them, so a change would be one of the reference."""
    frozen = ("vision_tower", "projector", "image_newline")
    free, _ = run_update(tokenizer, rollouts, advantages, params, NO_KL)
    settings = NO_KL | {"frozen": frozen}
    state, _ = run_update(tokenizer, rollouts, advantages, params, settings)
    for name in frozen:
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, state.params[name], params[name])))
    moved = jax.tree.map(np.array_equal, state.params["language_model"], params["language_model"])
    assert not any(jax.tree.leaves(moved))
    # AdamW's first step is the gradient's sign: clipping by another norm does not show.
    assert_trees_close(state.params["language_model"], free.params["language_model"], 1e-3)


def test_rollouts_of_an_older_policy_have_their_ratio_to_it(
    tokenizer, rollouts, advantages, params
):
    """Sampled ahead, they are one step old: a ratio of 1 would be a false claim."""
    _, metrics = run_update(
        tokenizer, rollouts, advantages, params, NO_KL | {"overlap_rewards": True}
    )
    old = [micro.sampler_logps for micro in packed(tokenizer, rollouts)]
    ratios = [
        np.exp(logps - old)[micro.batch.loss_weights > 0]
        for (_, logps, _), micro, old in zip(
            gradients_of(tokenizer, rollouts, advantages, params, **NO_KL),
            packed(tokenizer, rollouts),
            old,
        )
    ]
    np.testing.assert_allclose(metrics["ratio"], np.concatenate(ratios).mean(), rtol=1e-4)
    assert abs(metrics["ratio"] - 1) > 0.1


def test_rollouts_of_a_quantised_sampler_are_weighed_and_told(
    tokenizer, rollouts, advantages, params
):
    """Each token's push times min(policy / sampler, cap), but for forced mode tokens; and nothing
    of it where nothing is quantised."""
    settings = NO_KL | {"int8_rollouts": True, "max_importance": 1.5}
    less_likely = dataclasses.replace(rollouts.generation, logps=rollouts.generation.logps * 12)
    rollouts = dataclasses.replace(rollouts, generation=less_likely)
    _, metrics = run_update(tokenizer, rollouts, advantages, params, settings)
    _, plain = run_update(tokenizer, rollouts, advantages, params, NO_KL)
    assert not any(name.startswith("importance") for name in plain)
    loss, shares = 0.0, []
    found = gradients_of(tokenizer, rollouts, advantages, params, **NO_KL)
    for (_, logps, _), micro in zip(found, packed(tokenizer, rollouts)):
        real, weights = micro.batch.loss_weights > 0, micro.batch.loss_weights
        ratio = np.where(micro.is_mode, 1, np.exp(logps - micro.sampler_logps))
        share = np.minimum(ratio, 1.5)
        pushes = share * advantages.ravel()[micro.rollout] * weights
        loss -= pushes[real].sum() / 12
        shares.append(share[real])
    shares = np.concatenate(shares)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["importance/mean"], shares.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["importance/capped"], (shares == 1.5).mean(), rtol=1e-4)
    effective = shares.sum() ** 2 / (shares**2).sum() / len(shares)
    np.testing.assert_allclose(metrics["importance/effective_share"], effective, rtol=1e-4)
    assert 0 < metrics["importance/capped"] < 1


def test_the_mode_tokens_share_of_the_push_is_what_their_weights_make_it(
    tokenizer, rollouts, params
):
    """Logged, since nothing else moves auto mode directly; at ratio 1 a token's push is its
    weight times its rollout's advantage."""
    ones = np.ones((3, 4), np.float32)
    for weight in (0.0, 0.5, 2.0):
        mode_tokens = "policy" if weight else "mask"
        settings = NO_KL | {"mode_weight": weight, "mode_tokens": mode_tokens}
        _, metrics = run_update(tokenizer, rollouts, ones, params, settings)
        sampled = sum(n > f for n, f in zip(rollouts.generation.lengths.ravel(), [1, 1, 2, 2] * 3))
        expected = 12 * weight / (12 * weight + sampled)
        np.testing.assert_allclose(metrics["mode_token_share"], expected, rtol=1e-4)


def test_the_gap_between_sampler_and_trainer_is_told_by_mode(
    tokenizer, rollouts, advantages, params
):
    """Rollouts are only on-policy if both mean the same; a mode that differs has a cause of its
    own, such as its forced beginning."""
    _, metrics = run_update(tokenizer, rollouts, advantages, params, NO_KL)
    found = gradients_of(tokenizer, rollouts, advantages, params, **NO_KL)
    gaps = {True: [], False: []}
    for (_, logps, _), micro in zip(found, packed(tokenizer, rollouts)):
        for thinks, gap in gaps.items():
            chosen = (micro.batch.loss_weights > 0) & (micro.thinks == thinks)
            gap.append(np.abs(logps - micro.sampler_logps)[chosen])
    for thinks, mode in ((True, "thinking"), (False, "non-thinking")):
        gap = np.concatenate(gaps[thinks])
        np.testing.assert_allclose(metrics[f"logp_gap/{mode}/mean"], gap.mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics[f"logp_gap/{mode}/max"], gap.max(), rtol=1e-5)


def test_an_update_raises_the_objective_it_follows(tokenizer, rollouts, params, logps_of):
    """The sign: rollouts of positive advantage must become likelier, the others less so."""
    signed = group_advantages(np.tile([1.0, 0.0, 1.0, 0.0], (3, 1)))
    state, _ = run_update(tokenizer, rollouts, signed, params, NO_KL)
    change = []
    for micro in packed(tokenizer, rollouts):
        before, after = (np.asarray(logps_of(p, micro.batch)) for p in (params, state.params))
        gain = (after - before) * np.sign(signed.ravel()[micro.rollout]) * micro.batch.loss_weights
        change.append(gain.sum())
    assert sum(change) / 12 > 0.01


def test_long_rows_have_the_loss_and_gradient_of_short_ones(
    tokenizer, rollouts, advantages, params, monkeypatch
):
    """Rows beyond a few hundred tokens are computed block by block; nothing else may change."""
    whole = gradients_of(tokenizer, rollouts, advantages, params, **NO_KL)
    monkeypatch.setattr(packed_attention, "SHORT", 0)
    monkeypatch.setattr(block_attention, "BLOCK", 16)
    config = config_with(**NO_KL)
    parts = make_update(config, tuple(tokenizer.never_sampled))  # traced anew
    for batch, (grads, logps, sums) in zip(pack_rollouts(config, tokenizer, rollouts), whole):
        args = (batch, advantages.ravel(), None, batch.sampler_logps, True, 12.0)
        in_blocks = parts.gradients(params, {}, *args)
        real = batch.batch.loss_weights > 0
        np.testing.assert_allclose(in_blocks[1][real], logps[real], atol=2e-5)
        np.testing.assert_allclose(in_blocks[2]["loss"], sums["loss"], rtol=1e-5)
        assert_trees_close(in_blocks[0], grads, 1e-4)


def test_packed_rollouts_have_the_gradient_of_unpacked_ones(
    tokenizer, rollouts, advantages, params
):
    """The prefix's gradient is the sum over its branches, though it is computed once."""
    never = tuple(tokenizer.never_sampled)

    @jax.jit
    def grads(params, batch, weights):
        def loss(params):
            logps = token_logps(r4b.bind(MODEL, params), batch, MODEL.loss_chunk, never)
            return jnp.sum(jnp.where(weights != 0, logps * weights, 0))

        return jax.grad(loss)(params)

    batches = packed(tokenizer, rollouts)
    packed_grads = [
        grads(params, m.batch, m.batch.loss_weights * advantages.ravel()[m.rollout])
        for m in batches
    ]
    alone = []
    for q, r in np.ndindex(3, 4):
        length = rollouts.generation.lengths[q, r]
        forced = len(dialogue.forced_ids(tokenizer, rollouts.modes[r]))
        weights = token_weights(BPO, rollouts.modes[r], length, forced) * advantages[q, r]
        reply = rollouts.generation.tokens[q, r, :length]
        alone.append(with_reply(tokenizer, questions()[q], reply, weights))
    batch = one_a_row(alone, 60, tokenizer.pad_id)
    assert_trees_close(
        jax.device_get(jax.tree.map(lambda *x: sum(x), *packed_grads)),
        jax.device_get(grads(params, batch, batch.loss_weights)),
        1e-4,
    )
