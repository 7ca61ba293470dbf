"""The state of a run and one jitted supervised step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from r4b_jax.common.arrays import Array, Batch
from r4b_jax.config import ModelConfig, StageConfig
from r4b_jax.models import r4b
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
    """A fresh state that trains the components `names` of `params`."""
    return TrainState(jnp.int32(0), params, optimizer.init({n: params[n] for n in names}))


def apply_gradients(state: TrainState, grads: dict, optimizer) -> TrainState:
    """One optimiser step on the components that `grads` holds; the others stay as they are."""
    old = {name: state.params[name] for name in grads}
    updates, opt_state = optimizer.update(grads, state.opt_state, old)
    params = state.params | optax.apply_updates(old, updates)
    return TrainState(state.step + 1, params, opt_state)


def make_train_step(config: ModelConfig, stage: StageConfig):
    """One jitted update of a supervised stage: (state, batch) -> (state, metrics).

    The state is donated. Metrics: `loss` (weighted mean a token), `grad_norm`, `loss_tokens`,
    `tokens`.
    """
    names, optimizer = trainable(stage), stage_optimizer(stage)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        def loss_fn(trained: dict):
            model = r4b.bind(config, state.params | trained)
            if stage.objective == "caption_words":
                total, weight = caption_words_loss(model, batch)
            else:
                total, weight = supervised_loss(model, batch, config.loss_chunk)
            return total / jnp.maximum(weight, 1e-6)

        trained = {name: state.params[name] for name in names}
        loss, grads = jax.value_and_grad(loss_fn)(trained)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "loss_tokens": jnp.sum(batch.loss_weights > 0),
            "tokens": jnp.sum(batch.segment_ids > 0),
        }
        return apply_gradients(state, grads, optimizer), metrics

    return train_step
