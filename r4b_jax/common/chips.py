"""What the chips are said to do: the vendors' figures, which nobody reaches.

TPUs: peak, bandwidth and links from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "System
architecture", read in 2026. GPUs: NVIDIA's data sheets of the H100 SXM and the H200 SXM, without
sparsity.

The memory of a TPU is what its compiler allows a program: the "available HBM" of the error that
libtpu 0.0.52 gives for a program that is too large. That of a GPU is the data sheet's.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    peak: float  # FLOP/s of bfloat16 products
    hbm: float  # bytes a program may hold
    bandwidth: float  # bytes/s to and from them
    # bytes/s that leave the chip over all its links together, half the vendor's "bidirectional"; a
    # collective over one axis of a torus has only some of the links
    links: float

    def share(self, devices: int) -> "Chip":
        """What one of so many equal devices of a chip has: jax sees two in a tpu7x, and in a v4
        unless the topology is asked for with chip_config_name="megacore"."""
        parts = (x / devices for x in (self.peak, self.hbm, self.bandwidth, self.links))
        return Chip(self.name, *parts)


CHIPS = (
    Chip("v4", peak=275e12, hbm=30.75 * GIB, bandwidth=1200e9, links=300e9),  # 32 GiB in all
    Chip("v5e", peak=197e12, hbm=15.75 * GIB, bandwidth=819e9, links=200e9),  # 16
    Chip("v5p", peak=459e12, hbm=95.73 * GIB, bandwidth=2765e9, links=600e9),  # 95 by the docs
    Chip("v6e", peak=918e12, hbm=31.24 * GIB, bandwidth=1638e9, links=400e9),  # 32
    Chip("tpu7x", peak=2307e12, hbm=2 * 94.74 * GIB, bandwidth=7380e9, links=600e9),  # 192
    Chip("h100", peak=989e12, hbm=80e9, bandwidth=3350e9, links=450e9),
    Chip("h200", peak=989e12, hbm=141e9, bandwidth=4800e9, links=450e9),
)


# What jax calls a device -> the chip above.
KINDS = (
    ("v5 lite", "v5e"),
    ("v5e", "v5e"),
    ("v5", "v5p"),
    ("v6", "v6e"),
    ("v4", "v4"),
    ("7x", "tpu7x"),
    ("H100", "h100"),
    ("H200", "h200"),
)


def chip_of_device(kind: str) -> Chip | None:
    """The chip of a jax device by its `device_kind`, or None: a CPU, or a chip not listed here."""
    name = next((name for part, name in KINDS if part in kind), None)
    chip = None if name is None else chip_of(name)
    return chip.share(2) if name == "tpu7x" else chip


def chip_of(topology_name: str) -> Chip:
    """The chip of a topology: `v5e:16x16` -> v5e, `h200:8` -> h200.

    Raises:
      ValueError: none of that name is known; the message names those that are.
    """
    name = topology_name.partition(":")[0]
    for chip in CHIPS:
        if chip.name == name:
            return chip
    known = ", ".join(chip.name for chip in CHIPS)
    raise ValueError(f"{topology_name!r} is of no known chip; known are {known}")
