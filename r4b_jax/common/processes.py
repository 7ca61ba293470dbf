"""Several processes, one a host of a pod: who writes files, and what all must agree on.

Every process runs the same program on the same settings and packs the same batches, but decodes
the pictures of its own rows alone. Files are written by the first process.
"""

import contextlib

import jax
import numpy as np
from jax.experimental import multihost_utils


def start(coordinator: str | None, count: int | None, number: int | None):
    """Join the other processes (`jax.distributed`); to be called before anything uses a device.

    Args: None where the cluster's own environment tells (TPU pods, SLURM, Kubernetes, MPI).
      coordinator: "host:port" of the first process.
      count, number: how many processes there are, and which of them this is.
    """
    jax.distributed.initialize(coordinator, count, number)


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_goes_first(what: str):
    """The first process does the block; the others follow, and find what it wrote.

    Raises:
      RuntimeError: the first process failed; it tells why itself.
    """
    if is_first():
        done = False
        try:
            yield
            done = True
        finally:
            agree(np.array(done))
        return
    if not agree(np.array(False)):
        raise RuntimeError(f"the first process failed: {what}")
    yield


def agree(value: np.ndarray) -> np.ndarray:
    """The first process's array, on all."""
    if jax.process_count() == 1:
        return value
    return np.asarray(multihost_utils.broadcast_one_to_all(value))


def total(count: int) -> int:
    """The sum of what each process counted, on all."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.process_allgather(np.array(count)).sum())


def fetch(tree):
    """Device arrays -> numpy, whole, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
