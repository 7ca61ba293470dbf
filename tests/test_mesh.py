"""Eight devices compute what one does, in one process and in two; and what a mesh refuses."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from r4b_jax import config as c
from r4b_jax.common import sharding
from r4b_jax.models import r4b
from r4b_jax.models.layers import logical_axes

SCRIPT = pathlib.Path(__file__).parent / "on_mesh.py"
ALL = ("8,1,1", "1,8,1", "1,4,2", "2,2,2")


def run(*processes: list[str]):
    """Run on_mesh.py once for each list of arguments, at the same time; all must end well."""
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # More threads than cores: devices in one process wait for each other in theirs.
            env=os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "64"},
        )
        for arguments in processes
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in started]
    finally:  # one that died leaves the others waiting
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), said[0][-3000:]
    return said


@pytest.mark.parametrize(
    "step, meshes",
    [
        ("supervised", ALL),
        ("bpo", ALL),
        ("rollouts", ("8,1,1", "4,1,2")),
        ("checkpoint", ("1,8,1", "2,2,2")),
    ],
)
def test_eight_devices_compute_what_one_does(step, meshes):
    """A mesh is a matter of memory and time alone: loss, gradients, samples, and a checkpoint that
    another mesh wrote."""
    (said,) = run([step, *meshes])
    assert [line for line in said.splitlines() if line.endswith("agrees")] == [
        f"{step} {mesh} agrees" for mesh in meshes
    ]


@pytest.mark.parametrize("step", ["supervised", "bpo", "loading"])
def test_two_processes_compute_what_one_does(step):
    """A pod's hosts see their own devices alone; together they must do the same step."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    own = [step, "2,2,2", f"--port={port}"]
    for said in run([*own, "--process=0"], [*own, "--process=1"]):
        assert f"{step} 2,2,2 agrees" in said


def mesh_of(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


@pytest.mark.parametrize(
    "axes, shape, expected",
    [
        ((None, "width", "mlp"), (36, 2560, 9728), (None, ("fsdp",), ("tensor",))),
        (("vocab", "width"), (151936, 2560), (("fsdp", "tensor"), None)),  # fsdp is taken
        (("vocab", "width"), (300, 2560), (None, ("fsdp",))),  # 300 is no multiple of 8
        (("rows", "sequence", None), (16, 64, 5), (("data", "fsdp"), ("tensor",), None)),
        (("rows", "sequence", None), (16, 1, 5), (("data", "fsdp"), None, None)),
    ],
)
def test_the_table_splits_what_divides_and_no_axis_twice(axes, shape, expected):
    """An axis used twice is an error in jax, one that does not divide is padding."""
    assert sharding.spec(axes, shape, mesh_of(2, 4, 2)) == PartitionSpec(*expected)


def test_every_large_parameter_is_split_on_the_meshes_of_the_plan():
    """A kernel that no rule names would be whole on every device, and nobody would notice."""
    shapes = jax.eval_shape(lambda: r4b.init(c.ModelConfig(), jax.random.key(0)))
    for sizes in ((1, 8, 1), (8, 32, 1), (1, 2, 4)):
        mesh, held, total = mesh_of(*sizes), 0, 0
        for path, x in jax.tree_util.tree_leaves_with_path(shapes):
            names = sharding.names(path)
            where = sharding.spec(logical_axes(names, x.ndim), x.shape, mesh)
            own = jax.sharding.NamedSharding(mesh, where).shard_shape(x.shape)
            held, total = held + np.prod(own), total + x.size
        assert held < 1.01 * total / (sizes[1] * sizes[2]), sizes


def test_too_much_replication_is_refused_by_name():
    """Memory that every device spends on the same numbers is told before it runs out."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
    wide = {"language_model": {"q_proj": {"kernel": jax.ShapeDtypeStruct((4099, 8192), "float32")}}}
    placed = sharding.abstract(wide, logical_axes, mesh)
    sharding.check_replication(placed)  # one device holds all it should
    whole = jax.sharding.NamedSharding(mesh_of(1, 8, 1), PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), wide)
    with pytest.raises(c.ConfigError, match=r"language_model.q_proj.kernel \(128 MiB\)"):
        sharding.check_replication(placed)


def test_a_mesh_that_is_not_the_devices_is_refused():
    """Found at the start, not after an hour of compiling."""
    with pytest.raises(c.ConfigError, match="is not the 1 devices"):
        sharding.training_mesh(c.MeshConfig(data=3), jax.devices()[:1])
    with pytest.raises(c.ConfigError, match="does not divide 1 devices"):
        sharding.rollout_mesh(sharding.training_mesh(c.MeshConfig(), jax.devices()[:1]), 2)
    joint = c.Config(joint=c.StageConfig(num_steps=1, batch_rows=12))
    queries = c.Config(bpo=c.BPOConfig(num_steps=1, num_queries=3))
    mesh = sharding.Mesh(np.array(jax.devices()[:1] * 8).reshape(2, 4, 1), sharding.AXES)
    with pytest.raises(c.ConfigError, match="joint.batch_rows"):
        sharding.check_work(joint, mesh)
    with pytest.raises(c.ConfigError, match="bpo.num_queries"):
        sharding.check_work(queries, mesh)
