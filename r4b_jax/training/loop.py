"""A supervised stage from its first batch to its checkpoint: the only supervised `for step` loop.

The order: restore or start; then for each step take a batch, update, log, save. A stage ends with
its last step or with its data; one that is already done returns its parameters at once.
"""

import contextlib
import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from r4b_jax.common import cost, processes, sharding
from r4b_jax.common.arrays import Batch
from r4b_jax.common.checkpoint import StageCheckpoints
from r4b_jax.common.metrics import MetricWriter, Progress, StepClock, StepLog, Trace, warn
from r4b_jax.config import Config, ConfigError
from r4b_jax.data.loader import Loader, Packed, Position
from r4b_jax.data.samples import SetAside
from r4b_jax.data.tokenizer import Tokenizer
from r4b_jax.training.optimizer import stage_optimizer, trainable
from r4b_jax.training.step import init_state, make_train_step

TRACED_FROM = 3  # steps after the first one: by then all is compiled


def run_stage(
    config: Config,
    name: str,
    params: dict,
    tokenizer: Tokenizer,
    workdir: str,
    trace_steps: int = 0,
) -> dict:
    """Train the stage `config.<name>` from `params`, or from its newest checkpoint in
    `workdir`/<name>.

    Args:
      params: given away: their memory is the state's, or free.
      trace_steps: steps whose profile is written to `workdir`/trace.
    Returns:
      the parameters after the stage.
    Raises:
      FloatingPointError: the loss is not finite; the message names stage and step.
    """
    stage = getattr(config, name)
    checkpoints = StageCheckpoints(os.path.join(workdir, name))
    state = init_state(params, stage_optimizer(stage), trainable(stage))
    data = {"counter": 0, "waiting": [], "set_aside": 0}
    if checkpoints.latest is not None:
        state, data = checkpoints.restore(state)
        sharding.release(params)
    first = int(state.step)
    if first < stage.num_steps and not data.get("ended"):
        state = jax.tree.map(jnp.asarray, state)
        trace = Trace(os.path.join(workdir, "trace"), first + TRACED_FROM, trace_steps)
        state = _train(config, name, state, data, tokenizer, checkpoints, workdir, trace)
    checkpoints.close()
    return state.params


def _train(config, name, state, data, tokenizer, checkpoints, workdir, trace):
    """The loop itself, from state.step to stage.num_steps."""
    stage, first = getattr(config, name), int(state.step)
    writer = MetricWriter(workdir, name, first)
    loader = Loader(config, name, tokenizer, workdir)
    aside = AsideLog(loader, workdir, name, first, data["set_aside"])
    batches = loader.batches(Position(data["counter"], tuple(data["waiting"])))
    packed = next(batches, None)
    train_step = make_train_step(config.model, stage)
    clock = StepClock()
    with Progress(name, stage.num_steps, first) as progress, contextlib.closing(trace):
        for step in range(first + 1, stage.num_steps + 1):
            trace.step(step, state)
            if packed is None:  # a stage without any step: a resumed one ends in its last
                raise ConfigError(f"config.{name}: its data hold no sample that can be used")
            host_batch = packed.batch
            state, metrics = train_step(state, sharding.place_rows(host_batch))
            clock.step(int(np.sum(host_batch.segment_ids > 0)))
            aside.write(step, packed)
            position = packed.position
            if step < stage.num_steps:
                with clock.waiting():
                    packed = next(batches, None)
            ended = step < stage.num_steps and packed is None
            last = step == stage.num_steps or ended
            log = step % config.log_every == 0 or last
            save = step % config.checkpoint_every == 0 or last
            if log or save:
                values = {key: float(value) for key, value in jax.device_get(metrics).items()}
                if not math.isfinite(values["loss"]):
                    raise FloatingPointError(
                        f"stage {name}, step {step}: the loss is {values['loss']}"
                    )
            if log:
                values |= clock.record(_flops_per_token(config, name, host_batch))
                values["set_aside"] = aside.total()
                values["packed"] = values["tokens"] / host_batch.tokens.size
                writer.write(step, values)
                shown = {"tokens/s": values["tokens_per_second"]}
                shown |= {"mfu": values["mfu"]} if "mfu" in values else {}
                progress.advance(0, loss=values["loss"], **shown)
            if save:
                counters = dataclasses.asdict(position) | {"set_aside": aside.total()}
                checkpoints.save(state, counters | {"ended": ended})
            progress.advance()
            if ended:
                warn(f"stage {name}: the data end after step {step} of {stage.num_steps}")
                break
    batches.close()
    writer.close()
    return state


class AsideLog:
    """The samples that were set aside: `workdir`/set_aside.jsonl, and how many they are."""

    def __init__(self, loader: Loader, workdir: str, name: str, resume_step: int, before: int):
        self.log = StepLog(workdir, "set_aside.jsonl", name, resume_step)
        self.common, self.own = before, 0  # of all processes, of this one's rows since the start
        if resume_step == 0:
            self._add(0, loader.bad, [])

    def write(self, step: int, packed: Packed):
        """Those of a step's batch."""
        self._add(step, packed.set_aside, packed.undecoded)

    def total(self) -> int:
        """How many they are in all processes; all of them must ask."""
        return self.common + processes.total(self.own)

    def _add(self, step: int, common: list[SetAside], own: list[SetAside]):
        self.common, self.own = self.common + len(common), self.own + len(own)
        told = own if jax.process_index() else [*common, *own]
        self.log.write(step, [dataclasses.asdict(one) for one in told])


def _flops_per_token(config: Config, name: str, batch: Batch) -> float:
    """What the formula says a real token of such a batch costs, pictures and attention included."""
    tokens = int(np.sum(batch.segment_ids > 0))
    patches = config.model.vision.num_patches
    used = np.where(batch.plan.weight != 0, batch.plan.index // patches, -1)
    used = used.reshape(len(used), -1)
    tiles = sum(len(np.setdiff1d(row, [-1, batch.tiles.shape[1]])) for row in used)
    loss_tokens = int(np.sum(batch.loss_weights > 0))
    pairs = int(np.sum((batch.positions + 1) * (batch.segment_ids > 0)))  # plain documents
    trained = trainable(getattr(config, name))
    parts = cost.train_flops(config.model, tokens, tiles, loss_tokens, pairs, trained)
    return sum(parts.values()) / max(tokens, 1)
