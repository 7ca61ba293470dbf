"""Compile a program for devices that are not there, and say what it needs and how fast it can be.

Memory, layout and collectives are the compiler's own; seconds are the least that the vendors'
figures allow (`cost.roofline`), not measurements.
"""

import dataclasses
import time

import jax
import numpy as np
from jax.experimental import topologies

from r4b_jax.common import cost, sharding
from r4b_jax.common.chips import GIB, Chip, chip_of
from r4b_jax.config import Config, ConfigError
from r4b_jax.models import tpu_attention
from r4b_jax.rl.update import trained_names
from r4b_jax.scaling.collectives import collectives, summary, wire_bytes
from r4b_jax.scaling.programs import Program, stage_of
from r4b_jax.training.optimizer import trainable

# No compiler for GPUs without one: the same program is compiled for a v5p of as many chips.
STAND_IN = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a device needs, and the least time of all of them together."""

    topology: str
    program: str
    arguments_gib: float
    temporaries_gib: float
    resident_gib: float  # what the device holds beside, optimiser's moments say
    host_gib: float  # of host memory a device, for what is offloaded
    peak_gib: float  # with what is resident
    hbm_gib: float
    fits: bool
    compile_seconds: float
    step_seconds: float | None = None
    bound: str | None = None  # compute, memory or links
    useful_flops: float | None = None  # of a device, by the formula
    executed_flops: float | None = None  # of a device, as traced
    mfu_ceiling: float | None = None
    tokens_per_second: float | None = None  # of all devices
    collectives: list | None = None  # of one device in a step; None: the compiler gives no text
    note: str = ""


def devices_of(topology: str) -> list:
    """The devices of "v5e:4x4", or as many TPU chips in place of "h200:8".

    Raises:
      ConfigError: no such topology.
    """
    try:
        chip = chip_of(topology).name
    except ValueError as error:
        raise ConfigError(f"--topology: {error}") from None
    name = topology
    if chip.startswith("h"):
        count = topology.partition(":")[2]
        if not count.isdigit() or int(count) not in STAND_IN:
            counts = ", ".join(map(str, STAND_IN))
            raise ConfigError(f"--topology: {topology} is {chip}: and one of {counts}")
        name = f"v5p:{STAND_IN[int(count)]}"
    more = {"chip_config_name": "megacore"} if chip == "v4" else {}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **more).devices)
    except Exception as error:  # jaxlib raises what libtpu says, under several names
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"--topology: no compiler for {topology}: {text}") from None


def estimate(config: Config, program: Program, topology: str, documents: int) -> Estimate:
    """Compile a program and estimate it.

    Args:
      documents: equal documents that a packed row of a supervised stage is taken to hold.
    """
    chip, start = chip_of(topology), time.monotonic()
    chip = chip.share(2) if chip.name == "tpu7x" else chip
    note = "memory as laid out for a v5p" if chip.name.startswith("h") else ""
    resident, hbm = program.resident / GIB, chip.hbm / GIB
    try:
        compiled = program.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return _too_large(program, topology, hbm, resident, str(error), time.monotonic() - start)
    memory = compiled.memory_analysis()
    peak = memory.peak_memory_in_bytes / GIB + resident
    memory_of = {
        "arguments_gib": memory.argument_size_in_bytes / GIB,
        "temporaries_gib": memory.temp_size_in_bytes / GIB,
        "resident_gib": resident,
        "host_gib": memory.host_temp_size_in_bytes / GIB,
        "peak_gib": peak,
        "hbm_gib": hbm,
        "fits": peak <= hbm,
        "compile_seconds": time.monotonic() - start,
    }
    found = _collectives(compiled)
    speed = _speed(config, program, chip, found, memory, documents)
    return Estimate(
        topology=topology,
        program=program.name,
        **memory_of,
        **speed,
        collectives=None if found is None else summary(found),
        note=note,
    )


def _too_large(program, topology, hbm, resident, error: str, seconds: float) -> Estimate:
    """The estimate of a program that the compiler itself refused for its size.

    Raises:
      RuntimeError: it refused for another reason.
    """
    if "RESOURCE_EXHAUSTED" not in error and "OOM" not in error:
        raise RuntimeError(f"{program.name} does not compile for {topology}: {error[:2000]}")
    nothing = float("nan")
    said = " ".join(error.split())[:300]
    return Estimate(
        topology, program.name, nothing, nothing, resident, nothing, nothing, hbm, False, seconds,
        note=said,
    )  # fmt: skip


def _collectives(compiled):
    """The collectives in the program's text; some large programs' text libtpu cannot give."""
    try:
        return collectives(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        return None


def row_ids(config: Config, program: Program, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment and branch ids of a typical packed row, int32[1, T] each: `documents` equal ones; for
    BPO a prompt of `generate.prompt_len` tokens and 2g equal replies."""
    if not program.name.startswith("bpo"):
        length = getattr(config, stage_of(config)).packed_len
        ids = np.minimum(np.arange(length) * documents // length, documents - 1) + 1
        return ids[None].astype(np.int32), np.zeros((1, length), np.int32)
    length, replies = config.bpo.packed_len, 2 * config.bpo.g
    prompt = config.generate.prompt_len
    reply = (length - prompt) // replies
    branches = np.repeat(np.arange(replies + 1), [prompt] + [reply] * replies)
    return np.ones((1, len(branches)), np.int32), branches[None].astype(np.int32)


def seen_pairs(segments: np.ndarray, branches: np.ndarray) -> int:
    """(query, key) pairs that see each other in a row."""
    pairs = 0
    for segment in np.unique(segments[segments > 0]):
        inside = branches[segments == segment]
        prefix = int((inside == 0).sum())
        pairs += cost.causal_pairs(prefix)
        for branch in np.unique(inside[inside > 0]):
            size = int((inside == branch).sum())
            pairs += cost.causal_pairs(size) + size * prefix
    return pairs


def _speed(config, program: Program, chip: Chip, found, memory, documents: int) -> dict:
    """Time and use of a program: fields of an Estimate."""
    if program.queries:
        return _decoding_speed(config, program, chip)
    if not program.rows:
        return {}
    ids, devices = row_ids(config, program, documents), program.mesh.size
    visits = tpu_attention.visits(*ids, tpu_attention.BLOCK).queries.count[0]
    rows = program.rows // sharding.row_shards(program.mesh)
    is_bpo = program.name.startswith("bpo")
    stage = config.bpo if is_bpo else getattr(config, program.name)
    parts = rows // (stage.micro_rows or rows)
    executed = cost.executed_flops(
        program.traced.jaxpr, trips={"kernel": rows / parts * int(visits)}
    )
    tokens = program.rows * int((ids[0] > 0).sum())
    tiles = program.rows * stage.packed_tiles
    pairs = program.rows * seen_pairs(*ids)
    trained = trained_names(config.bpo) if is_bpo else trainable(stage)
    useful = sum(cost.train_flops(config.model, tokens, tiles, tokens, pairs, trained).values())
    if program.name == "bpo reference":
        useful /= 3  # the forward pass alone
    wire, exposed = wire_bytes(found) if found is not None else (0.0, 0.0)
    # At the least the arguments are read and written, and each kernel is read three times a part.
    language = config.model.language
    weights = cost.layer_weights(language) + cost.vision_weights(config.model)
    weights += language.vocab_size * language.width
    kernels = 3 * parts * 2 * weights / program.mesh.shape["tensor"]
    traffic = 2 * memory.argument_size_in_bytes + kernels
    share = exposed / wire if wire else 0.0
    roof = cost.roofline(executed.total / devices, traffic, wire, chip, share)
    return {
        "step_seconds": roof.seconds,
        "bound": roof.bound,
        "useful_flops": useful / devices,
        "executed_flops": executed.total / devices,
        "mfu_ceiling": roof.utilisation(useful / devices, chip),
        "tokens_per_second": tokens / roof.seconds,
    }


def _decoding_speed(config, program: Program, chip: Chip) -> dict:
    """The time to answer all queries with replies of full length; prompts by their FLOPs, tokens
    by the bytes that a step reads."""
    sizes, mesh = config.generate, program.mesh
    copies, together = sharding.row_shards(mesh), mesh.shape["tensor"]
    queries, rollouts = program.queries // copies, program.rollouts
    slots = min(sizes.queries_at_once, queries), min(sizes.rollouts_at_once, rollouts)
    # All of the ring is read at every step.
    work = cost.Decoding(*slots, sizes.prompt_len, sizes.max_new_tokens)
    step = cost.decode_seconds(config.model, work, chip, together)
    steps = sizes.max_new_tokens * -(-queries // slots[0]) * -(-rollouts // slots[1])
    tiles = queries * config.bpo.packed_tiles
    pairs = queries * cost.causal_pairs(sizes.prompt_len)
    prompt = cost.train_flops(config.model, queries * sizes.prompt_len, tiles, queries, pairs)
    prefill = sum(prompt.values()) / 3 / chip.peak / together
    seconds = prefill + steps * step
    useful = sum(prompt.values()) / 3 + steps * cost.decode_flops(config.model, work)
    return {
        "step_seconds": seconds,
        "bound": "memory" if steps * step > prefill else "compute",
        "useful_flops": useful / together,
        "mfu_ceiling": useful / together / seconds / chip.peak,
        "tokens_per_second": copies * queries * rollouts * sizes.max_new_tokens / seconds,
    }
