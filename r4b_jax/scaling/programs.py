"""The project's own jitted programs, on shapes alone: what `python -m r4b_jax.plan` compiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from r4b_jax.common import sharding
from r4b_jax.common.arrays import ImagePlan
from r4b_jax.config import STAGES, Config, ConfigError
from r4b_jax.data.dialogue import MODES
from r4b_jax.data.examples import empty_batch
from r4b_jax.decoding.generate import MAX_FORCED, Ids, generate
from r4b_jax.decoding.prompts import Prompts
from r4b_jax.decoding.sampling import Sampling
from r4b_jax.models import r4b
from r4b_jax.models.layers import cast_kernels, logical_axes
from r4b_jax.rl.rollout import RolloutBatch
from r4b_jax.rl.update import make_update, trained_names
from r4b_jax.training.optimizer import bpo_optimizer, stage_optimizer, trainable
from r4b_jax.training.step import init_state, make_train_step

IDS = Ids(end=1, pad=0, thinking=2, direct=3, end_think=4, never=(5,))  # any


@dataclasses.dataclass(frozen=True)
class Program:
    """One compilation."""

    name: str
    traced: object  # jax.stages.Traced: has .jaxpr and .lower()
    mesh: jax.sharding.Mesh
    resident: int  # bytes a device holds beside the arguments while it runs
    rows: int = 0  # packed rows it computes, over all devices
    queries: int = 0  # or queries it answers, each so many times
    rollouts: int = 0


def programs(config: Config, name: str, devices) -> list[Program]:
    """The programs of a part of the recipe: `train` is the last stage that has steps, `bpo` all
    that a step runs, `rollout` its generation alone, with nothing trained beside it.

    Raises:
      ConfigError: the settings do not fit the devices, or name nothing to compile.
    """
    mesh = sharding.training_mesh(config.mesh, devices)
    sharding.check_work(config, mesh)
    if name == "train":
        return [_train(config, mesh)]
    if name == "bpo":
        return _bpo(config, mesh)
    if name == "rollout":
        return [_rollouts(config, mesh, name, resident=0)]
    held = _bytes(sharding.abstract(model_params(config), logical_axes, mesh))
    mesh = sharding.rollout_mesh(mesh, config.generate.tensor)
    return [_generate(config, mesh, name, config.generate.batch_size, len(MODES), 0.0, held)]


def stage_of(config: Config) -> str:
    """The last stage that has steps.

    Raises:
      ConfigError: none has.
    """
    names = [name for name in STAGES if getattr(config, name).num_steps > 0]
    if not names:
        raise ConfigError("no stage has steps: set num_steps, of annealing say")
    return names[-1]


def model_params(config: Config) -> dict:
    """The shapes of the parameters."""
    return jax.eval_shape(lambda: r4b.init(config.model, jax.random.key(0)))


def _on_rows(tree, mesh):
    """Shapes with a row, or a query, first."""
    return sharding.abstract(tree, lambda path, n: ("rows", *[None] * (n - 1)), mesh)


def _whole(tree, mesh):
    """Shapes that each device has whole."""
    return sharding.abstract(tree, lambda path, n: (None,) * n, mesh)


def _bytes(tree) -> int:
    """Bytes of placed shapes on one device."""
    return sum(
        functools.reduce(lambda a, b: a * b, x.sharding.shard_shape(x.shape), x.dtype.itemsize)
        for x in jax.tree.leaves(tree)
    )


def _train(config: Config, mesh) -> Program:
    """A supervised stage's step."""
    name = stage_of(config)
    stage, params = getattr(config, name), model_params(config)
    sharding.check_replication(sharding.abstract(params, logical_axes, mesh))
    optimizer = stage_optimizer(stage)
    state = jax.eval_shape(lambda p: init_state(p, optimizer, trainable(stage)), params)
    shape = stage.batch_rows, stage.packed_len, stage.packed_tiles
    batch = jax.eval_shape(lambda: empty_batch(*shape, config.model.vision, 0))
    with jax.set_mesh(mesh):
        step = make_train_step(config.model, stage)
        state = sharding.abstract(state, logical_axes, mesh)
        return Program(name, step.trace(state, _on_rows(batch, mesh)), mesh, 0, stage.batch_rows)


def _bpo(config: Config, mesh) -> list[Program]:
    """The rollouts, the reference's log-probabilities, a micro-batch's gradients added to those of
    the others, and the optimiser."""
    bpo, params = config.bpo, model_params(config)
    names = trained_names(bpo)
    state = jax.eval_shape(lambda p: init_state(p, bpo_optimizer(bpo), names), params)
    state = sharding.abstract(state, logical_axes, mesh)
    trained = {name: state.params[name] for name in names}
    frozen = {name: state.params[name] for name in bpo.frozen}
    cast = jax.eval_shape(lambda p: cast_kernels(p, config.model.compute_dtype), trained)
    cast = sharding.abstract(cast, logical_axes, mesh) if bpo.kl_beta else {}
    rows = bpo.micro_rows * sharding.row_shards(mesh)
    shape = rows, bpo.packed_len, bpo.packed_tiles
    flags, logps, numbers = (
        jax.ShapeDtypeStruct(shape[:2], dtype) for dtype in (bool, jnp.float32, jnp.int32)
    )
    batch = jax.eval_shape(lambda: empty_batch(*shape, config.model.vision, 0))
    batch = _on_rows(RolloutBatch(batch, numbers, logps, flags, flags), mesh)
    logps = _on_rows(logps, mesh)
    advantages = jax.ShapeDtypeStruct((bpo.num_queries * 2 * bpo.g,), jnp.float32)
    first, count = (jax.ShapeDtypeStruct((), dtype) for dtype in (bool, jnp.float32))
    advantages, first, count = _whole((advantages, first, count), mesh)
    moments, held = _bytes(state.opt_state), _bytes(cast)
    with jax.set_mesh(mesh):
        parts = make_update(config, IDS.never)
        known = logps if bpo.kl_beta else None
        gradients = parts.gradients.trace(
            trained, frozen, batch, advantages, known, logps, first, count, trained
        )
        apply = parts.apply.trace(trained, state.opt_state, trained)
        everything = _bytes(state.params) + moments + held
        out = [
            _rollouts(config, mesh, "bpo rollouts", everything),
            Program("bpo gradients", gradients, mesh, moments + held, rows),
            Program("bpo optimiser", apply, mesh, held + _bytes(frozen)),
        ]
        if bpo.kl_beta:
            reference = parts.reference.trace(cast | frozen, batch)
            out.append(Program("bpo reference", reference, mesh, moments + _bytes(trained), rows))
    return out


def _rollouts(config: Config, mesh, name: str, resident: int) -> Program:
    """The replies of a BPO step, on the devices of the training mesh `mesh`."""
    bpo, mesh = config.bpo, sharding.rollout_mesh(mesh, config.generate.tensor)
    work = bpo.num_queries, 2 * bpo.g, bpo.temperature
    return _generate(config, mesh, name, *work, resident)


def _generate(
    config: Config, mesh, name: str, queries: int, rollouts: int, temperature, resident: int
) -> Program:
    """Generation: all queries of a step, or of a call in evaluation."""
    sizes, shards = config.generate, sharding.row_shards(mesh)
    queries = -(-queries // shards) * shards
    params = jax.eval_shape(
        lambda p: cast_kernels(p, config.model.compute_dtype), model_params(config)
    )
    params = sharding.abstract(params, logical_axes, mesh)
    side, tiles = config.model.vision.image_size, config.bpo.packed_tiles
    plan = (queries, sizes.prompt_len, 4)
    work = (
        Prompts(
            jax.ShapeDtypeStruct((queries, sizes.prompt_len), jnp.int32),
            jax.ShapeDtypeStruct((queries,), jnp.int32),
            jax.ShapeDtypeStruct((queries, tiles, side, side, 3), jnp.uint8),
            ImagePlan(
                jax.ShapeDtypeStruct(plan, jnp.int32), jax.ShapeDtypeStruct(plan, jnp.float32)
            ),
        ),
        jax.ShapeDtypeStruct((queries, rollouts, MAX_FORCED), jnp.int32),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (queries, rollouts))),
    )
    sampling = jax.eval_shape(lambda: Sampling.of(temperature))
    with jax.set_mesh(mesh):
        traced = generate.trace(
            config.model,
            params,
            *_on_rows(work, mesh),
            IDS,
            max_new_tokens=sizes.max_new_tokens,
            sampling=_whole(sampling, mesh),
            queries_at_once=sizes.queries_at_once,
            rollouts_at_once=sizes.rollouts_at_once,
        )
    return Program(name, traced, mesh, resident, queries=queries, rollouts=rollouts)
