"""BPO from its first query to its checkpoint: the only reinforcement `for step` loop.

One step: draw queries; answer each 2g times, g thinking and g direct, from one prefill; reward the
maths; advantages over the merged group; pack prompts and replies with the prompt shared; update on
clipped ratios with a KL to the annealed model.
"""

import collections
import dataclasses
import functools
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r4b_jax.common.checkpoint import StageCheckpoints
from r4b_jax.common.metrics import MetricWriter, Progress
from r4b_jax.config import BPOConfig, Config
from r4b_jax.data.examples import Question
from r4b_jax.data.loader import pick_topic, stream_seed
from r4b_jax.data.tokenizer import Tokenizer
from r4b_jax.data.worlds import World
from r4b_jax.decoding.generate import p_think
from r4b_jax.evaluation.evaluate import evaluate, summarize, test_questions
from r4b_jax.models import r4b
from r4b_jax.rl.objectives import clipped_objective, group_advantages, old_logps
from r4b_jax.rl.rewards import maths_reward
from r4b_jax.rl.rollout import RolloutBatch, Rollouts, pack_rollouts, sample_rollouts
from r4b_jax.training.losses import token_logps
from r4b_jax.training.optimizer import bpo_optimizer
from r4b_jax.training.step import TrainState, init_state


def run_bpo(config: Config, reference: dict, tokenizer: Tokenizer, workdir: str) -> dict:
    """Train by BPO from the annealed parameters `reference`, or from the newest checkpoint in
    `workdir`/bpo.

    Returns:
      the parameters after BPO.
    """
    checkpoints = StageCheckpoints(os.path.join(workdir, "bpo"))
    state = init_state(reference, bpo_optimizer(config.bpo), tuple(reference))
    if checkpoints.latest is not None:
        state, _ = checkpoints.restore(state)
    if int(state.step) < config.bpo.num_steps:
        state = jax.tree.map(jnp.array, state)  # a copy of our own: the update donates it
        state = _train(config, state, reference, tokenizer, checkpoints, workdir)
    checkpoints.close()
    return state.params


def _train(config, state, reference, tokenizer, checkpoints, workdir) -> TrainState:
    """The loop itself, from state.step to bpo.num_steps."""
    bpo, first = config.bpo, int(state.step)
    writer = MetricWriter(workdir, "bpo", first)
    world = World(config.world, "train")
    gradients, apply = make_update(config, tuple(tokenizer.never_sampled))
    questions = test_questions(config, bpo.eval_questions)
    key = jax.random.key(stream_seed(config.seed, "bpo/rollouts"))
    with Progress("bpo", bpo.num_steps, first) as progress:
        if first == 0:
            _small_evaluation(config, state.params, tokenizer, questions, writer, 0)
        for step in range(first + 1, bpo.num_steps + 1):
            clock = [time.monotonic()]
            queries = draw_queries(config, world, step)
            rollouts = sample_rollouts(
                config, state.params, tokenizer, queries, jax.random.fold_in(key, step)
            )
            clock.append(time.monotonic())
            rewards = reward_all(rollouts)
            advantages = group_advantages(rewards)
            batches = pack_rollouts(config, tokenizer, rollouts, advantages)
            clock.append(time.monotonic())
            metrics = {"skipped": float(not advantages.any())}
            if advantages.any():
                state, values = update(
                    config, state, reference, batches, rewards.size, gradients, apply
                )
                metrics |= values
            else:  # every group is degenerate: nothing to learn from
                state = dataclasses.replace(state, step=state.step + 1)
            clock.append(time.monotonic())
            metrics |= rollout_metrics(rollouts, rewards, advantages)
            names = ("rollout", "reward", "update")
            metrics |= {f"seconds/{n}": b - a for n, a, b in zip(names, clock, clock[1:])}
            writer.write(step, metrics)
            progress.advance(reward=metrics["reward/mean"], p_think=metrics["p_think"])
            last = step == bpo.num_steps
            if step % bpo.eval_every == 0 or last:
                _small_evaluation(config, state.params, tokenizer, questions, writer, step)
            if step % config.checkpoint_every == 0 or last:
                checkpoints.save(state, {"position": step * bpo.num_queries})
    writer.close()
    return state


def draw_queries(config: Config, world: World, step: int) -> list[Question]:
    """The queries of a step: query i is a function of (seed, step, i)."""
    bpo, seed = config.bpo, stream_seed(config.seed, "bpo/queries")
    queries = []
    for i in range(bpo.num_queries):
        rng = np.random.default_rng((seed, step, i))
        queries.append(world.question(pick_topic(bpo.topics, rng), rng))
    return queries


def reward_all(rollouts: Rollouts) -> np.ndarray:
    """float64[Q, R], NaN where a rollout has no reward."""
    rewards = [
        [maths_reward(question, reply.answer) for reply in replies]
        for question, replies in zip(rollouts.questions, rollouts.replies)
    ]
    return np.array(rewards, np.float64)  # None -> NaN


def make_update(config: Config, never: tuple[int, ...]):
    """The two jitted halves of an update: gradients of one micro-batch, and their application."""
    bpo, model_config = config.bpo, config.model
    optimizer = bpo_optimizer(bpo)

    @jax.jit
    def gradients(params, reference, rollouts: RolloutBatch, stored, is_first, num_rollouts):
        """(gradients of the loss, log-probabilities float32[B, T], metric sums)."""
        reference_logps = None
        if bpo.kl_beta > 0:
            frozen = r4b.bind(model_config, reference)
            reference_logps = token_logps(frozen, rollouts.batch, model_config.loss_chunk, never)

        def loss_fn(params):
            model = r4b.bind(model_config, params)
            logps = token_logps(model, rollouts.batch, model_config.loss_chunk, never)
            return bpo_loss(bpo, logps, reference_logps, rollouts, stored, is_first, num_rollouts)

        grads, (logps, sums) = jax.grad(loss_fn, has_aux=True)(params)
        return grads, logps, sums

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def apply(params, opt_state, grads):
        """(new parameters, new optimiser state, gradient norm)."""
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)

    return gradients, apply


def bpo_loss(bpo: BPOConfig, logps, reference_logps, rollouts, stored, is_first, num_rollouts):
    """Minus the objective, summed over the micro-batch's tokens with their weights, over all
    rollouts' number.

    Returns:
      loss, (logps, metric sums): sums over weighted tokens, to be divided by `sums["tokens"]`, and
      maxima.
    """
    weights = rollouts.batch.loss_weights
    old = old_logps(logps, stored, is_first, rollouts.is_mode, bpo.mode_tokens)
    objective, parts = clipped_objective(
        logps, old, reference_logps, rollouts.advantages, bpo.clip_eps, bpo.kl_beta
    )
    loss = -jnp.sum(jnp.where(weights > 0, objective * weights, 0)) / num_rollouts
    real = weights > 0
    gap = jnp.where(real, jnp.abs(logps - rollouts.sampler_logps), 0)
    sums = {name: jnp.sum(jnp.where(real, value, 0)) for name, value in parts.items()}
    sums |= {"tokens": jnp.sum(real), "loss": loss, "gap": jnp.sum(gap), "gap_max": jnp.max(gap)}
    return loss, (logps, sums)


def update(config, state, reference, batches, num_rollouts, gradients, apply):
    """`updates_per_rollout` optimiser steps on the same rollouts.

    Returns:
      the new state, one step on, and metrics of the last update as floats.
    Raises:
      FloatingPointError: the loss or its gradient is not finite; the message names the step.
    """
    params, opt_state = state.params, state.opt_state
    stored = [np.zeros_like(b.sampler_logps) for b in batches]
    for index in range(config.bpo.updates_per_rollout):
        total, parts = None, []
        for i, batch in enumerate(batches):
            grads, logps, sums = gradients(
                params, reference, batch, stored[i], index == 0, float(num_rollouts)
            )
            if index == 0:
                stored[i] = logps
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
            parts.append(sums)
        params, opt_state, grad_norm = apply(params, opt_state, total)
        metrics = _update_metrics(jax.device_get(parts), float(grad_norm))
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            raise FloatingPointError(f"bpo, step {int(state.step) + 1}: loss {metrics['loss']}")
    return TrainState(state.step + 1, params, opt_state), metrics


def _update_metrics(parts: list[dict], grad_norm: float) -> dict:
    tokens = sum(p["tokens"] for p in parts)

    def mean(name: str) -> float:
        return float(sum(p[name] for p in parts) / tokens)

    return {
        "loss": float(sum(p["loss"] for p in parts)),
        "grad_norm": grad_norm,
        "tokens": float(tokens),
        "ratio": mean("ratio"),
        "clip_fraction": mean("clipped"),
        "kl": mean("kl"),
        "logp_gap/mean": mean("gap"),
        "logp_gap/max": float(max(p["gap_max"] for p in parts)),
    }


def rollout_metrics(rollouts: Rollouts, rewards: np.ndarray, advantages: np.ndarray) -> dict:
    """Reward and length by mode, think rate, degenerate and unrewarded groups."""
    by_mode = collections.defaultdict(list)
    for q, replies in enumerate(rollouts.replies):
        for r, reply in enumerate(replies):
            by_mode["thinking" if reply.thinks else "non-thinking"].append(
                (rewards[q, r], reply.num_tokens, reply.answer is None)
            )
    known = ~np.isnan(rewards)
    metrics = {
        "reward/mean": float(rewards[known].mean()) if known.any() else 0.0,
        "p_think": float(np.mean(p_think(rollouts.generation.mode_logps))),
        "think_rate": len(by_mode["thinking"]) / rewards.size,
        "degenerate_groups": float(np.mean(~np.any(advantages != 0, 1))),
        "unrewarded": float(np.mean(~known)),
    }
    for mode, rows in by_mode.items():
        if rows:
            values, lengths, cut_off = np.array(rows, np.float64).T
            metrics[f"reward/{mode}"] = float(np.nanmean(values)) if known.any() else 0.0
            metrics[f"length/{mode}"] = float(lengths.mean())
            metrics[f"cut_off/{mode}"] = float(cut_off.mean())
    return metrics


def _small_evaluation(config, params, tokenizer, questions, writer, step):
    """Think rate and accuracy of each topic in auto mode, for figures 8 and 9."""
    records = evaluate(config, params, tokenizer, questions, ("auto",), title="bpo evaluation")
    values = {}
    for topic, modes in summarize(records).items():
        for name in ("accuracy", "think_rate", "p_think", "tokens"):
            values[f"eval/{topic}/{name}"] = modes["auto"][name]
    writer.write(step, values)
