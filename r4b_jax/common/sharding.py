"""Where arrays lie when there are several devices: the only file that names mesh axes.

A mesh has three axes. `data`: copies of the parameters. `fsdp`: parameters, gradients and moments
are split, and a layer's kernels are gathered when it is their turn; rows are split over both.
`tensor`: heads and hidden units are split, for rows or caches too large for one device.

Models name logical axes, the table says what becomes of them. Training and generation share the
table and differ in the mesh: `training_mesh` splits the parameters, `rollout_mesh` holds them whole
or over `tensor`, and spreads the queries. A function that is traced under `jax.set_mesh` sees its
mesh; without one, or on one device, every function here leaves its argument as it is.
"""

import contextlib
import functools
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from r4b_jax.common.arrays import Array
from r4b_jax.config import STAGES, Config, ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
# Logical axis -> mesh axes. An axis that does not divide, or is taken by an axis to the left,
# splits nothing.
TABLE = {
    "rows": ("data", "fsdp"),  # packed rows, queries
    "sequence": ("tensor",),  # places of a row, between layers
    "vocab": ("fsdp", "tensor"),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}
ROWS, DATA, FSDP, TENSOR = TABLE["rows"], "data", "fsdp", "tensor"
SLACK = 64 * 2**20  # bytes a device may hold beyond its share before that is refused ...
LARGE = 2**20  # ... and parameters below so many bytes are never named for it


def training_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The mesh of training: data x fsdp x tensor devices; one size of 0 takes what is left.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(n for n in sizes if n)
    sizes = [n or len(devices) // known for n in sizes]
    if sizes.count(0) or math.prod(sizes) != len(devices):
        raise ConfigError(
            f"config.mesh.data x mesh.fsdp x mesh.tensor = {config.data} x {config.fsdp} x "
            f"{config.tensor} is not the {len(devices)} devices; 0 takes what is left"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, types, devices=devices)


def rollout_mesh(mesh: Mesh, tensor: int) -> Mesh:
    """The same devices for generation: `tensor` of them hold a copy of the parameters together.

    Raises:
      ConfigError: `tensor` does not divide the number of devices.
    """
    if mesh.size % tensor:
        raise ConfigError(f"config.generate.tensor ({tensor}) does not divide {mesh.size} devices")
    return Mesh(mesh.devices.reshape(-1, 1, tensor), AXES, axis_types=mesh.axis_types)


def active(*needed):
    """The mesh under which a function is traced, or None if there is nothing left to split: one
    device, or a function that each device runs for itself.

    Args:
      needed: tuples of mesh axes without all of which the mesh is of no use.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = free_axes(mesh) if not mesh.empty else ()
    is_whole = all(axis in free for axes in needed for axis in axes)
    return mesh if size_of(mesh, free) > 1 and is_whole else None


def free_axes(mesh) -> frozenset[str]:
    """The axes that no surrounding `shard_map` has split already."""
    return frozenset(AXES) - set(getattr(mesh, "manual_axes", ()))


def size_of(mesh, axes) -> int:
    """Over how many devices mesh axes split something."""
    return math.prod(mesh.shape[axis] for axis in axes)


def row_shards(mesh=None) -> int:
    """Into how many parts rows are split on a mesh, or on the active one."""
    mesh = mesh or active()
    return 1 if mesh is None else size_of(mesh, ROWS)


def divides(mesh, *splits) -> bool:
    """Whether mesh axes divide the first axis of arrays: pairs (axes, array)."""
    return all(x.shape[0] % size_of(mesh, axes) == 0 for axes, x in splits)


def spec(axes: tuple, shape: tuple[int, ...], mesh, without: str | None = None) -> PartitionSpec:
    """Logical axes (None = not split) of an array of `shape` -> what splits it on `mesh`.

    Args:
      without: a mesh axis that is to split nothing.
    """
    free, out = set(free_axes(mesh)) - {without}, []
    for name, size in zip(axes, shape, strict=True):
        mine = tuple(a for a in TABLE.get(name, ()) if a in free and mesh.shape[a] > 1)
        if size % size_of(mesh, mine):
            mine = ()
        free -= set(mine)
        out.append(mine or None)
    return PartitionSpec(*out)


def constrain(x: Array, *axes) -> Array:
    """`x` split as its logical axes say."""
    mesh = active()
    return x if mesh is None else _pin(x, spec(axes, x.shape, mesh))


def gather(x: Array, axes: tuple) -> Array:
    """A parameter whole again over `fsdp`; its gradient is split as the parameter was."""
    mesh = active()
    if mesh is None:
        return x
    return _gather(x, spec(axes, x.shape, mesh), spec(axes, x.shape, mesh, without=FSDP))


def _pin(x: Array, where: PartitionSpec) -> Array:
    return jax.lax.with_sharding_constraint(x, where)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, split, whole):
    return _pin(x, whole)


_gather.defvjp(
    lambda x, split, whole: (_pin(x, whole), None),
    lambda split, whole, _, grad: (_pin(grad, split),),
)


def names(path) -> tuple[str, ...]:
    """A path of `jax.tree_util` as strings."""
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def placement(axes_of, mesh: Mesh):
    """Where an array lies: a function (path of strings, shape) -> sharding; `axes_of` as below."""
    return lambda path, shape: NamedSharding(mesh, spec(axes_of(path, len(shape)), shape, mesh))


def placements(tree, axes_of, mesh: Mesh):
    """The sharding of each leaf of a tree of parameters, or of an optimiser's state over them.

    Args:
      axes_of: function (path of strings, number of axes) -> logical axes.
    """

    where = placement(axes_of, mesh)
    return jax.tree_util.tree_map_with_path(lambda path, x: where(names(path), x.shape), tree)


def abstract(tree, axes_of, mesh: Mesh | None):
    """The shapes of a tree, placed on a mesh."""
    if mesh is None:
        return tree
    where = placements(tree, axes_of, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
    )


def check_replication(tree):
    """Refuse a placement (of `abstract`) that holds much more on a device than its share.

    Raises:
      ConfigError: the message names the parameters that are not split, largest first.
    """
    held, share, whole = 0, 0, []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        size = math.prod(x.shape) * x.dtype.itemsize
        own = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        best = size / size_of(x.sharding.mesh, (FSDP, TENSOR))
        held, share = held + own, share + best
        if own > 2 * best and size > LARGE:
            whole.append((size, ".".join(names(path))))
    if held > 1.1 * share + SLACK:
        named = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for size, name in sorted(whole)[::-1])
        raise ConfigError(
            f"a device would hold {held / 2**30:.2f} GiB of parameters, its share is "
            f"{share / 2**30:.2f} GiB: the mesh does not divide {named}"
        )


def check_work(config: Config, mesh: Mesh):
    """Refuse batches that the devices of a mesh cannot share equally.

    Raises:
      ConfigError: the message names the settings.
    """
    for name in STAGES:
        stage, shards = getattr(config, name), row_shards(mesh)
        if stage.num_steps and stage.batch_rows % (shards * (stage.micro_rows or 1)):
            raise ConfigError(
                f"config.{name}.batch_rows ({stage.batch_rows}) is not a multiple of mesh.data x "
                f"mesh.fsdp x {name}.micro_rows ({shards} x {stage.micro_rows or 1})"
            )
    copies, queries = row_shards(rollout_mesh(mesh, config.generate.tensor)), config.bpo.num_queries
    if config.bpo.num_steps and queries % copies:
        raise ConfigError(
            f"config.bpo.num_queries ({queries}) is not a multiple of the {copies} copies of the "
            f"parameters that generate.tensor = {config.generate.tensor} leaves"
        )


def pin(tree, axes_of):
    """Inside a jitted function: a tree of parameters, or of an optimiser's state, split as
    `placements` would."""

    def pinned(path, x):
        return constrain(x, *axes_of(names(path), x.ndim))

    return tree if active() is None else jax.tree_util.tree_map_with_path(pinned, tree)


def for_rollouts(tensor: int):
    """A context in which the current mesh is that of generation (`rollout_mesh`)."""
    mesh = current()
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(rollout_mesh(mesh, tensor))


def current() -> Mesh | None:
    """The mesh of `jax.set_mesh` with its devices, or None if one device is all there is."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def place(tree, axes_of):
    """Arrays -> the same on the current mesh; without one, as they are.

    Args:
      axes_of: function (path of strings, number of axes) -> logical axes.
    """
    mesh = current()
    return tree if mesh is None else jax.tree.map(_put, tree, placements(tree, axes_of, mesh))


def place_rows(tree):
    """Host arrays [B, ...], the same on every process -> device arrays, rows over the mesh."""
    return place(tree, lambda path, num_axes: ("rows", *[None] * (num_axes - 1)))


def own_rows(count: int) -> np.ndarray:
    """Which rows of a batch of `count` this process's devices hold: bool[count]."""
    mesh = current()
    own = np.ones(count, bool)
    if mesh is None or jax.process_count() == 1:
        return own
    own[:] = False
    where = NamedSharding(mesh, spec(("rows",), (count,), mesh))
    for (rows,) in where.addressable_devices_indices_map((count,)).values():
        own[rows] = True
    return own


def release(tree):
    """Give back the memory of arrays that nobody may use any more."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array):
            x.delete()


def _put(x, where: NamedSharding):
    """One array; every process has the whole of it, or it is on the devices already."""
    if isinstance(x, jax.Array) and (jax.process_count() == 1 or not x.is_fully_replicated):
        return jax.device_put(x, where)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(np.asarray(jax.random.key_data(x)), where))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])
