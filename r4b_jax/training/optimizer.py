"""AdamW or Muon, one learning rate a component; a component of rate 0 is frozen and has no
state."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from r4b_jax.config import BPOConfig, ConfigError, StageConfig

# The setting with each component's learning rate.
RATES = {
    "vision_tower": "lr_vision",
    "projector": "lr_projector",
    "image_newline": "lr_projector",
    "language_model": "lr_language",
}


def trainable(stage: StageConfig) -> tuple[str, ...]:
    """The components a stage trains: those with a learning rate above 0."""
    return tuple(name for name, field in RATES.items() if getattr(stage, field) > 0)


def schedule(peak: float, stage: StageConfig) -> optax.Schedule:
    """Linear warm-up, then cosine to `final_lr_ratio` of the peak, or constant."""
    if stage.schedule == "cosine":
        return _cosine(peak, stage)
    if stage.schedule == "constant":
        warmup = optax.linear_schedule(0.0, peak, stage.warmup_steps)
        return optax.join_schedules([warmup, optax.constant_schedule(peak)], [stage.warmup_steps])
    raise ConfigError(f"schedule is cosine or constant, not {stage.schedule!r}")


def stage_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """The optimiser of a supervised stage, over the dict of its trainable components."""
    by_component = {
        name: _component_optimizer(schedule(getattr(stage, RATES[name]), stage), stage)
        for name in trainable(stage)
    }
    return optax.chain(
        optax.clip_by_global_norm(stage.max_grad_norm),
        optax.multi_transform(by_component, lambda params: {name: name for name in params}),
    )


def bpo_optimizer(bpo: BPOConfig) -> optax.GradientTransformation:
    """The optimiser of BPO, over all components: a warm-up, then cosine to `final_lr_ratio`."""
    rate = _cosine(bpo.learning_rate, bpo)
    return optax.chain(optax.clip_by_global_norm(bpo.max_grad_norm), _adamw(rate, bpo))


def _cosine(peak: float, settings: StageConfig | BPOConfig) -> optax.Schedule:
    """Linear warm-up, then cosine to `final_lr_ratio` of the peak at `num_steps`."""
    steps = max(settings.num_steps, settings.warmup_steps + 1)
    end = peak * settings.final_lr_ratio
    return optax.warmup_cosine_decay_schedule(0.0, peak, settings.warmup_steps, steps, end)


def _component_optimizer(rate: optax.Schedule, stage: StageConfig):
    if stage.optimizer == "adamw":
        return _adamw(rate, stage)
    return muon(
        rate,
        weight_decay=stage.weight_decay,
        adam_b2=stage.b2,
        mu_dtype=stage.moment_dtype,
        adam_weight_decay=stage.weight_decay,
        adam_learning_rate=lambda step: rate(step) * stage.adam_lr_ratio,
        muon_weight_dimension_numbers=_muon_matrices,
    )


def _muon_matrices(params):
    """Muon's share: the kernels [.., in, out] of linear layers; tables, norms and biases are
    AdamW's."""

    def is_kernel(path, x):
        name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else ""
        return MuonDimensionNumbers(x.ndim - 2, x.ndim - 1) if name == "kernel" else None

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def _adamw(rate: optax.Schedule, settings) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=0.9,
        b2=settings.b2,
        weight_decay=settings.weight_decay,
        mu_dtype=settings.moment_dtype,
    )
