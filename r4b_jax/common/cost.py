"""FLOPs and bytes: what a program executes, what of it is of use, and how long that must take.

The compiler's own count sees the body of a loop once and no kernel at all, so programs are counted
from their jaxprs. A product of [M, K] and [K, N] is 2 M N K FLOPs; nothing else is counted.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping

from jax.extend import core

from r4b_jax.common.chips import Chip
from r4b_jax.config import COMPONENTS, LanguageConfig, ModelConfig

# A program, counted


@dataclasses.dataclass(frozen=True)
class Executed:
    """FLOPs of all devices together."""

    matmuls: float
    convolutions: float
    kernels: float  # inside Pallas kernels
    # Loops and kernel grids whose length only the device knows, as "folder/file.py:line function"
    # (", kernel name"), and how often each was taken to run: 1 where the caller said nothing.
    unknown_loops: dict[str, float]

    @property
    def total(self) -> float:
        return self.matmuls + self.convolutions + self.kernels


def executed_flops(
    jaxpr, platform: str = "tpu", trips: Mapping[str, float] | None = None
) -> Executed:
    """FLOPs of a closed jaxpr (`jax.make_jaxpr(f)(...)`, or `.jaxpr` of a traced function).

    What a branch does counts as if the dearest were taken, and what nothing depends on is left out.
    The body of a `shard_map` counts once for each device, also where devices repeat each other.

    Args:
      platform: whose branch of `jax.lax.platform_dependent` is counted.
      trips: how often loops of unknown length run, and how long the dynamic axis of a kernel's grid
        is: part of the loop's name in `unknown_loops` -> times. The first that fits is taken.
    """
    walk = _Walk(platform, dict(trips or {}))
    walk.visit(getattr(jaxpr, "jaxpr", jaxpr), 1.0, "matmuls")
    return Executed(**walk.flops, unknown_loops=walk.unknown)


class _Walk:
    """Adds up FLOPs, equation by equation."""

    def __init__(self, platform: str, trips: dict[str, float]):
        self.platform, self.trips = platform, trips
        self.flops = {"matmuls": 0.0, "convolutions": 0.0, "kernels": 0.0}
        self.unknown = {}

    def visit(self, jaxpr, times: float, kind: str):
        """`times` runs of a jaxpr; `kind`: where its products are counted."""
        for eqn in _needed(jaxpr):
            self._equation(eqn, times, kind)

    def _equation(self, eqn, times: float, kind: str):
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            self.flops[kind] += times * _dot_flops(eqn)
        elif name == "conv_general_dilated":
            self.flops["convolutions"] += times * _convolution_flops(eqn)
        elif name == "scan":
            self.visit(params["jaxpr"].jaxpr, times * params["length"], kind)
        elif name == "while":
            times *= self._times(eqn)
            self.visit(params["cond_jaxpr"].jaxpr, times, kind)
            self.visit(params["body_jaxpr"].jaxpr, times, kind)
        elif name == "cond":
            self._branches(params, times, kind)
        elif name == "shard_map":
            devices = math.prod(params["mesh"].shape[a] for a in params["newly_manual_axes"])
            self.visit(params["jaxpr"], times * devices, kind)
        elif name == "pallas_call":
            self._kernel(eqn, times)
        else:  # jit, remat, custom_vjp, custom_jvp and whatever else runs a jaxpr once
            for inner in (params.get("jaxpr"), params.get("call_jaxpr")):
                if inner is not None:
                    self.visit(getattr(inner, "jaxpr", inner), times, kind)

    def _branches(self, params, times: float, kind: str):
        """The platform's branch; where the platform does not choose, the dearest."""
        branches, platforms = params["branches"], params.get("branches_platforms")
        if platforms is not None:
            fits = [p is None or self.platform in p for p in platforms]
            return self.visit(branches[fits.index(True)].jaxpr, times, kind)
        walks = []
        for branch in branches:
            walks.append(_Walk(self.platform, self.trips))
            walks[-1].visit(branch.jaxpr, times, kind)
            self.unknown |= walks[-1].unknown
        dearest = max(walks, key=lambda walk: sum(walk.flops.values()))
        for key, flops in dearest.flops.items():
            self.flops[key] += flops

    def _kernel(self, eqn, times: float):
        """A Pallas kernel: what its author says, or its body for every place of its grid."""
        estimate, grid = eqn.params["cost_estimate"], eqn.params["grid_mapping"].grid
        if estimate is not None:
            self.flops["kernels"] += times * estimate.flops
            return
        body = eqn.params["jaxpr"]
        name = f", kernel {body.debug_info.func_name}"
        for size in grid:
            times *= size if isinstance(size, int) else self._times(eqn, name)
        self.visit(body, times, "kernels")

    def _times(self, eqn, name: str = "") -> float:
        where = _where(eqn) + name
        self.unknown[where] = next((n for part, n in self.trips.items() if part in where), 1)
        return self.unknown[where]


def _needed(jaxpr) -> list:
    """The equations that a jaxpr's results, or the world outside, depend on."""
    live, needed = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not live.isdisjoint(eqn.outvars):
            needed.append(eqn)
            live.update(v for v in eqn.invars if not isinstance(v, core.Literal))
    return needed[::-1]


def _where(eqn) -> str:
    """The line outside of every library that wrote an equation: "folder/file.py:line function"."""
    frames = eqn.source_info.traceback.frames if eqn.source_info.traceback else ()
    for frame in frames:
        if "/lib/python" not in frame.file_name:
            file = "/".join(frame.file_name.split("/")[-2:])
            return f"{file}:{frame.line_num} {frame.function_name.split('.')[-1]}"
    return "somewhere"


def _dot_flops(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _convolution_flops(eqn) -> float:
    """Each output sums over the kernel's window and its share of the input channels."""
    kernel = eqn.invars[1].aval.shape
    outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / outputs


# The model, by formula


def layer_weights(language: LanguageConfig) -> int:
    """Weights of the decoder's matrix products, the head's left out."""
    c = language
    heads = c.width * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    return c.num_layers * (heads + 3 * c.width * c.mlp_dim)


def vision_weights(config: ModelConfig) -> int:
    """Weights that a patch meets: the tower's and the projector's matrix products."""
    c, width = config.vision, config.language.width
    layers = c.num_layers * (4 * c.width**2 + 2 * c.width * c.mlp_dim)
    return layers + 3 * c.patch_size**2 * c.width + c.width * width + width**2


def causal_pairs(length: int) -> int:
    """(query, key) pairs of a document: a token sees itself and those before it."""
    return length * (length + 1) // 2


def train_flops(
    config: ModelConfig,
    tokens: float,
    image_tiles: float,
    loss_tokens: float,
    attention_pairs: float,
    trained: Collection[str] = COMPONENTS,
) -> dict[str, float]:
    """FLOPs that training cannot do without, by part of the model; nothing is computed twice.

    A part costs its forward pass, as much for the gradient of its input if something trained lies
    before it, and as much for that of its kernels if it is trained itself.

    Args:
      tokens: of the decoder; image_tiles: of the tower; loss_tokens: whose logits are needed.
      attention_pairs: (query, key) pairs that see each other, in all documents together.
    """
    language, vision = config.language, config.vision
    patches = image_tiles * vision.num_patches
    vision_pairs = patches * vision.num_patches * vision.num_layers
    decoder = "language_model" in trained
    through = 2 if trained else 1  # whatever is trained, the gradient goes through the decoder
    tower = 3 if "vision_tower" in trained else 1
    return {
        "layers": 2.0 * tokens * layer_weights(language) * (through + decoder),
        "head": 2.0 * loss_tokens * language.width * language.vocab_size * (through + decoder),
        "vision": tower
        * (2.0 * patches * vision_weights(config) + 4.0 * vision_pairs * vision.width),
        "attention": (3 if through == 2 else 1) * _pair_flops(language) * attention_pairs,
    }


def _pair_flops(language: LanguageConfig) -> float:
    """Forward FLOPs of a (query, key) pair in all layers: a score, and its share of a value."""
    return 4.0 * language.num_heads * language.head_dim * language.num_layers


# Decoding


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The work of one step of decoding, on the devices that hold one copy of the parameters."""

    queries: int  # whose prompts are kept, each once
    rollouts: int  # a query
    prefix_len: float  # places of a prompt that are read
    suffix_len: float  # places of a rollout's own tokens that are read, on average
    weight_bytes: float = 2  # a decoder weight, the head's included
    cache_bytes: float = 2  # a number of a key or a value


def decode_flops(config: ModelConfig, work: Decoding) -> float:
    """Forward FLOPs of a token for every rollout."""
    language = config.language
    weights = layer_weights(language) + language.width * language.vocab_size
    seen = work.prefix_len + work.suffix_len
    return work.queries * work.rollouts * (2.0 * weights + _pair_flops(language) * seen)


def decode_bytes(config: ModelConfig, work: Decoding) -> float:
    """Bytes read: the weights once, a prompt's keys and values once a query, the new tokens' once a
    rollout. What is written, and logits, are small beside them."""
    language = config.language
    weights = layer_weights(language) + language.width * language.vocab_size
    place = 2 * language.num_layers * language.num_kv_heads * language.head_dim * work.cache_bytes
    places = work.queries * (work.prefix_len + work.rollouts * work.suffix_len)
    return weights * work.weight_bytes + places * place


def decode_seconds(config: ModelConfig, work: Decoding, chip: Chip, devices: int = 1) -> float:
    """The least time of a step, where `devices` hold a copy of the parameters in equal parts.

    Collectives are left out: with tensor parallelism they are many and small, and their latencies,
    which nobody publishes, come on top.
    """
    flops, read = decode_flops(config, work), decode_bytes(config, work)
    return max(flops / chip.peak, read / chip.bandwidth) / devices


def decode_rate(config: ModelConfig, work: Decoding, chip: Chip, devices: int = 1) -> float:
    """The most tokens a second and chip, all slots at work."""
    seconds = decode_seconds(config, work, chip, devices)
    return work.queries * work.rollouts / seconds / devices


# A bound on time


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least seconds of a program on a device, and what sets them."""

    seconds: float
    bound: str  # "compute" | "memory" | "links", the longest
    compute: float  # seconds of each alone
    memory: float
    links: float

    def utilisation(self, useful_flops: float, chip: Chip) -> float:
        """The highest model-FLOPs utilisation: useful FLOPs of a device / what it could have done
        in the time."""
        return useful_flops / (self.seconds * chip.peak)


def roofline(
    flops_per_device: float,
    bytes_per_device: float,
    collective_bytes_per_device: float,
    chip: Chip,
    exposed_share: float = 0.0,
) -> Roofline:
    """Compute, memory and links as if they ran side by side at full speed.

    Args:
      bytes_per_device: to and from memory.
      collective_bytes_per_device: that leave the device (`collectives.wire_bytes`).
      exposed_share: of those, the share that nothing runs beside.
    """
    links = collective_bytes_per_device / chip.links
    each = {
        "compute": flops_per_device / chip.peak,
        "memory": bytes_per_device / chip.bandwidth,
        "links": links,
    }
    beside = max(each["compute"], each["memory"], links * (1 - exposed_share))
    return Roofline(beside + links * exposed_share, max(each, key=each.get), **each)
