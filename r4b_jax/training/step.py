"""The state of a run and one jitted supervised step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from r4b_jax.common import sharding
from r4b_jax.common.arrays import Array, Batch
from r4b_jax.config import ModelConfig, StageConfig
from r4b_jax.models import r4b
from r4b_jax.models.layers import logical_axes
from r4b_jax.training.losses import caption_words_loss, supervised_loss
from r4b_jax.training.optimizer import stage_optimizer, trainable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything an update changes."""

    step: Array  # int32[]
    params: dict  # component -> parameters, all of them
    opt_state: optax.OptState  # over the trainable components only


def init_state(params: dict, optimizer: optax.GradientTransformation, names) -> TrainState:
    """A fresh state that trains the components `names` of `params`, which it shares; the rest lies
    on the mesh as they do."""

    def rest(params: dict):
        opt_state = optimizer.init({name: params[name] for name in names})
        return sharding.pin((jnp.int32(0), opt_state), logical_axes)

    step, opt_state = jax.jit(rest)(params)
    return TrainState(step, params, opt_state)


def apply_gradients(state: TrainState, grads: dict, optimizer) -> TrainState:
    """One optimiser step on the components that `grads` holds; the others stay as they are."""
    old = {name: state.params[name] for name in grads}
    updates, opt_state = optimizer.update(grads, state.opt_state, old)
    new, opt_state = sharding.pin((optax.apply_updates(old, updates), opt_state), logical_axes)
    return TrainState(state.step + 1, state.params | new, opt_state)


def make_train_step(config: ModelConfig, stage: StageConfig):
    """One jitted update of a supervised stage: (state, batch) -> (state, metrics).

    The state is donated. Metrics: `loss` (weighted mean a token), `grad_norm`, `loss_tokens`,
    `tokens`.
    """
    names, optimizer = trainable(stage), stage_optimizer(stage)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        def loss_of(trained: dict, batch: Batch) -> tuple[Array, Array]:
            model = r4b.bind(config, state.params | trained)
            if stage.objective == "caption_words":
                return caption_words_loss(model, batch)
            return supervised_loss(model, batch, config.loss_chunk)

        trained = {name: state.params[name] for name in names}
        rows = batch.tokens.shape[0] // sharding.row_shards()  # of each device
        parts = rows // (stage.micro_rows or rows)
        grads, loss, weight = accumulate(loss_of, trained, batch, parts)
        weight = jnp.maximum(weight, 1e-6)
        grads = jax.tree.map(lambda x: x / weight, grads)
        metrics = {
            "loss": loss / weight,
            "grad_norm": optax.tree.norm(grads),
            "loss_tokens": jnp.sum(batch.loss_weights > 0),
            "tokens": jnp.sum(batch.segment_ids > 0),
        }
        return apply_gradients(state, grads, optimizer), metrics

    return train_step


def accumulate(loss_of, trained: dict, batch: Batch, parts: int) -> tuple[dict, Array, Array]:
    """Gradient of a sum over the batch, the sum and its weight, in micro-batches one by one.

    Row r of the batch is in micro-batch r % parts, so that each device's rows stay where they are.

    Args:
      loss_of: function (trained, micro-batch) -> (sum, weight).
    """
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if parts == 1:
        (loss, weight), grads = value_and_grad(trained, batch)
        return sharding.pin(grads, logical_axes), loss, weight

    def micro(x):
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(x, None, "rows", *[None] * (x.ndim - 2))

    def add(total, batch):
        (loss, weight), grads = value_and_grad(trained, batch)
        grads = sharding.pin(grads, logical_axes)
        return jax.tree.map(jnp.add, total, (grads, loss, weight)), None

    zeros = jax.tree.map(jnp.zeros_like, trained), jnp.float32(0), jnp.float32(0)
    return jax.lax.scan(add, zeros, jax.tree.map(micro, batch))[0]
