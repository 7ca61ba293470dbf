"""A supervised stage from its first batch to its checkpoint: the only supervised `for step` loop.

The order: restore or start; then for each step pack a batch, update, log, save. A stage that is
already done returns its parameters at once.
"""

import math
import os
import time

import jax
import jax.numpy as jnp

from r4b_jax.common.checkpoint import StageCheckpoints
from r4b_jax.common.metrics import MetricWriter, Progress
from r4b_jax.config import Config
from r4b_jax.data.loader import Loader
from r4b_jax.data.tokenizer import Tokenizer
from r4b_jax.training.optimizer import stage_optimizer, trainable
from r4b_jax.training.step import init_state, make_train_step


def run_stage(config: Config, name: str, params: dict, tokenizer: Tokenizer, workdir: str) -> dict:
    """Train the stage `config.<name>` from `params`, or from its newest checkpoint in
    `workdir`/<name>.

    Returns:
      the parameters after the stage.
    Raises:
      FloatingPointError: the loss is not finite; the message names stage and step.
    """
    stage = getattr(config, name)
    checkpoints = StageCheckpoints(os.path.join(workdir, name))
    state = init_state(params, stage_optimizer(stage), trainable(stage))
    data = {"position": 0, "dropped": 0}
    if checkpoints.latest is not None:
        state, data = checkpoints.restore(state)
    first = int(state.step)
    if first < stage.num_steps:
        state = jax.tree.map(jnp.array, state)  # a copy of our own: the step donates it
        state = _train(config, name, state, data, tokenizer, checkpoints, workdir)
    checkpoints.close()
    return state.params


def _train(config, name, state, data, tokenizer, checkpoints, workdir):
    """The loop itself, from state.step to stage.num_steps."""
    stage, first = getattr(config, name), int(state.step)
    writer = MetricWriter(workdir, name, first)
    loader = Loader(config, name, tokenizer, **data)
    batches = iter(loader)
    train_step = make_train_step(config.model, stage)
    clock = time.monotonic()
    with Progress(name, stage.num_steps, first) as progress:
        for step in range(first + 1, stage.num_steps + 1):
            batch = next(batches)
            state, metrics = train_step(state, batch)
            last = step == stage.num_steps
            log = step % config.log_every == 0 or last
            save = step % config.checkpoint_every == 0 or last
            if log or save:
                values = {key: float(value) for key, value in jax.device_get(metrics).items()}
                if not math.isfinite(values["loss"]):
                    raise FloatingPointError(
                        f"stage {name}, step {step}: the loss is {values['loss']}"
                    )
            if log:
                values["seconds"] = time.monotonic() - clock
                values["dropped"] = loader.dropped
                values["packed"] = values["tokens"] / batch.tokens.size
                writer.write(step, values)
                progress.advance(0, loss=values["loss"])
            if save:
                counters = {"position": loader.position, "dropped": loader.dropped}
                checkpoints.save(state, counters)
            progress.advance()
    batches.close()
    writer.close()
    return state
