"""What a step of BPO learns from its packed rollouts: loss, gradients and their application."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r4b_jax.common import sharding
from r4b_jax.common.arrays import Array
from r4b_jax.config import COMPONENTS, BPOConfig, Config
from r4b_jax.models import r4b
from r4b_jax.models.layers import logical_axes
from r4b_jax.rl.objectives import clipped_objective, importance, old_logps
from r4b_jax.rl.rollout import RolloutBatch
from r4b_jax.training.losses import token_logps
from r4b_jax.training.optimizer import bpo_optimizer
from r4b_jax.training.step import TrainState

MODES = ("thinking", "non-thinking")


class Update(NamedTuple):
    """The jitted parts of an update."""

    reference: object  # (parameters, RolloutBatch) -> log-probabilities float32[B, T]
    gradients: object  # of one micro-batch, added to those before: see `make_update`
    apply: object  # (trained, optimiser state, gradients) -> new ones and the gradient norm


def trained_names(bpo: BPOConfig) -> tuple[str, ...]:
    """The components BPO trains."""
    return tuple(name for name in COMPONENTS if name not in bpo.frozen)


def make_update(config: Config, never: tuple[int, ...]) -> Update:
    """Compile-once functions of an update.

    Args:
      never: ids the sampler could not produce; the trainer bans them too.
    """
    bpo, sizes = config.bpo, config.model
    optimizer = bpo_optimizer(bpo)

    def logps_of(params, rollouts: RolloutBatch) -> Array:
        return token_logps(r4b.bind(sizes, params), rollouts.batch, sizes.loss_chunk, never)

    @functools.partial(jax.jit, donate_argnames="total")
    def gradients(
        trained,
        frozen,
        rollouts,
        advantages,
        reference_logps,
        stored,
        is_first,
        num_rollouts,
        total=None,
    ):
        """Of one micro-batch, with respect to the components `trained`.

        Args:
          advantages: float32[Q * R]; reference_logps, stored: float32[B, T], the first or None.
          total: the gradients of the micro-batches before, or None; donated.
        Returns:
          (gradients, log-probabilities float32[B, T], metric sums).
        """

        def loss_fn(trained):
            logps = logps_of(frozen | trained, rollouts)
            args = (rollouts, advantages, reference_logps, stored, is_first, num_rollouts)
            loss, sums = bpo_loss(bpo, logps, *args)
            still = jax.lax.stop_gradient(logps)
            push = jnp.abs(jax.grad(lambda x: bpo_loss(bpo, x, *args)[0])(still))
            sums |= {"push": push.sum(), "mode_push": (push * rollouts.is_mode).sum()}
            return loss, (logps, sums)

        grads, (logps, sums) = jax.grad(loss_fn, has_aux=True)(trained)
        if total is not None:
            grads = jax.tree.map(jnp.add, total, grads)
        return sharding.pin(grads, logical_axes), logps, sums

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def apply(trained, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        new = optax.apply_updates(trained, updates)
        return *sharding.pin((new, opt_state), logical_axes), optax.tree.norm(grads)

    return Update(jax.jit(logps_of), gradients, apply)


def bpo_loss(
    bpo: BPOConfig, logps, rollouts, advantages, reference_logps, stored, is_first, num_rollouts
):
    """Minus the objective, summed over the micro-batch's tokens with their weights, over all
    rollouts' number.

    Returns:
      loss, metric sums: over weighted tokens, to be divided by `sums["tokens"]`, and maxima.
    """
    weights = rollouts.batch.loss_weights
    real = weights > 0
    # What has no weight may hold anything: its ratio could overflow.
    logps, stored, sampler_logps = (
        jnp.where(real, x, 0) for x in (logps, stored, rollouts.sampler_logps)
    )
    if reference_logps is not None:
        reference_logps = jnp.where(real, reference_logps, 0)
    old = old_logps(logps, stored, is_first, rollouts.is_mode, bpo.mode_tokens)
    objective, parts = clipped_objective(
        logps, old, reference_logps, advantages[rollouts.rollout], bpo.clip_eps, bpo.kl_beta
    )
    if bpo.int8_rollouts:
        sampled_for = jnp.where(is_first, jax.lax.stop_gradient(logps), stored)
        share, capped = importance(sampled_for, sampler_logps, rollouts.is_mode, bpo.max_importance)
        objective = objective * share
        parts |= {"importance": share, "importance_squared": share**2, "importance_capped": capped}
    loss = -jnp.sum(jnp.where(real, objective * weights, 0)) / num_rollouts
    sums = {name: jnp.sum(jnp.where(real, value, 0)) for name, value in parts.items()}
    gap = jnp.abs(logps - sampler_logps)
    for mode, chosen in zip(MODES, (rollouts.thinks, ~rollouts.thinks)):
        sums[f"gap/{mode}"] = jnp.sum(jnp.where(chosen, gap, 0))
        sums[f"gap_max/{mode}"] = jnp.max(jnp.where(chosen, gap, 0))
        sums[f"tokens/{mode}"] = jnp.sum(real & chosen)
    return loss, sums | {"tokens": jnp.sum(real), "loss": loss}


def reference_pass(config: Config, parts: Update, reference: dict, batches) -> list:
    """The reference's log-probabilities of every micro-batch; without a KL there is nothing to do.

    Args:
      reference: parameters; their kernels may be cast.

    The device computes them after this returns.
    """
    if config.bpo.kl_beta == 0:
        return [None] * len(batches)
    return [parts.reference(reference, batch) for batch in batches]


def update(
    config: Config,
    parts: Update,
    state: TrainState,
    batches: list[RolloutBatch],
    advantages: np.ndarray,
    reference_logps: list,
) -> tuple[TrainState, dict]:
    """`updates_per_rollout` optimiser steps on the same rollouts.

    Args:
      advantages: float32[Q, R].
      reference_logps: of each micro-batch, as `reference_pass` gave them.
    Returns:
      the new state, one step on, and metrics as floats: of the last update, but for the gap
      between sampler and trainer, which is that of the first.
    Raises:
      FloatingPointError: the loss or its gradient is not finite; the message names the step.
    """
    bpo, names = config.bpo, trained_names(config.bpo)
    trained = {name: state.params[name] for name in names}
    frozen = {name: state.params[name] for name in bpo.frozen}
    opt_state = state.opt_state
    stored, gaps = [batch.sampler_logps for batch in batches], {}
    for index in range(bpo.updates_per_rollout):
        on_policy = index == 0 and not bpo.overlap_rewards
        total, sums = None, []
        for i, batch in enumerate(batches):
            total, logps, part = parts.gradients(
                trained,
                frozen,
                batch,
                advantages.ravel(),
                reference_logps[i],
                stored[i],
                on_policy,
                float(advantages.size),
                total,
            )
            if on_policy:
                stored[i] = logps
            sums.append(part)
        trained, opt_state, grad_norm = parts.apply(trained, opt_state, total)
        sums = jax.device_get(sums)
        gaps = gaps or _gaps(sums)  # of the policy that sampled, before it moves
        metrics = _update_metrics(sums, float(grad_norm)) | gaps
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            raise FloatingPointError(f"bpo, step {int(state.step) + 1}: loss {metrics['loss']}")
    return TrainState(state.step + 1, state.params | trained, opt_state), metrics


def _update_metrics(parts: list[dict], grad_norm: float) -> dict:
    """Means over the weighted tokens of all micro-batches, and maxima."""
    total = {name: float(sum(part[name] for part in parts)) for name in parts[0]}
    tokens = total["tokens"]
    metrics = {
        "loss": total["loss"],
        "grad_norm": grad_norm,
        "tokens": tokens,
        "ratio": total["ratio"] / tokens,
        "clip_fraction": total["clipped"] / tokens,
        "kl": total["kl"] / tokens,
        # Of the loss's gradient with respect to log-probabilities, summed without signs.
        "mode_token_share": total["mode_push"] / max(total["push"], 1e-30),
    }
    if "importance" in total:
        first, second = total["importance"] / tokens, total["importance_squared"] / tokens
        metrics["importance/mean"] = first
        metrics["importance/capped"] = total["importance_capped"] / tokens
        metrics["importance/effective_share"] = first**2 / second  # of the tokens, as Kish counts
    return metrics


def _gaps(parts: list[dict]) -> dict:
    """|log-probability of the trainer - of the sampler| over weighted tokens, mode by mode."""
    metrics = {}
    for mode in MODES:
        if count := float(sum(part[f"tokens/{mode}"] for part in parts)):
            total = float(sum(part[f"gap/{mode}"] for part in parts))
            metrics[f"logp_gap/{mode}/mean"] = total / count
            metrics[f"logp_gap/{mode}/max"] = float(max(p[f"gap_max/{mode}"] for p in parts))
    return metrics
