"""Where parameters lie when there are several devices."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def spread(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """A parameter split over all devices along its largest axis that they divide, else whole on
    each. A stack's layer axis is not split: a scan goes over it."""
    count = jax.device_count()
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    first = 1 if "layers" in path else 0
    axes = [axis for axis in range(first, len(shape)) if shape[axis] % count == 0]
    spec = [None] * len(shape)
    if axes:
        spec[max(axes, key=lambda axis: shape[axis])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))
