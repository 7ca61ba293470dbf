"""Hugging Face checkpoints to parameters and back: one table, both ways, bit for bit.

A parameter's path names its tensor: `language_model/layers/layers/mlp/up_proj/kernel` is
`language_model.layers.{l}.mlp.up_proj.weight` of every layer l, each transposed. Checkpoints spell
the beginning of a name in several ways (PAPER.md section 2); `canonical` knows them.
"""

import collections
import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r4b_jax.config import ModelConfig
from r4b_jax.models import r4b

# How a name may begin, and what it begins with here. None: not a part of R-4B (a text tower).
SPELLINGS = (
    (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"vision_model\.", "vision_tower."),
    (r"(?=(embeddings|encoder|post_layernorm|head)\.)", "vision_tower."),
    (r"(model\.)?multi_modal_projector\.", "projector."),
    (r"(model\.)?image_newline$", "image_newline"),
    (r"(model\.language_model|language_model\.model)\.", "language_model."),
    (r"(language_model\.)?lm_head\.", "language_model.lm_head."),
    (r"model\.(?=(embed_tokens|layers|norm)\.)", "language_model."),
    (r"(text_model\.|logit_scale$|logit_bias$)", None),
)
# Of the tower, but after the features that R-4B reads: kept beside the parameters, never computed.
UNUSED = re.compile(r"vision_tower\.(post_layernorm|head)\.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; the message names what is wrong with it."""


class Slot(NamedTuple):
    """Where a tensor goes: a leaf of the parameters, and the layer in it (None = all of it)."""

    path: tuple[str, ...]
    layer: int | None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a checkpoint's header says of one tensor."""

    name: str  # as the file spells it
    file: str
    shape: tuple[int, ...]
    dtype: str  # F32, BF16, F16


def canonical(name: str) -> str | None:
    """A tensor's name however its file spells it, or None for what is no part of R-4B.

    Raises:
      CheckpointError: no such part is known.
    """
    for pattern, ours in SPELLINGS:
        found = re.match(pattern, name)
        if found:
            return None if ours is None else ours + name[found.end() :]
    raise CheckpointError(f"the checkpoint has {name!r}, which is no part of R-4B")


def released_name(name: str) -> str:
    """A canonical name as R-4B's released checkpoint spells it."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return "model." + name.replace("projector.", "multi_modal_projector.", 1)


@functools.cache
def abstract(config: ModelConfig) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Every leaf of the model's parameters by its path; no memory is taken."""
    shapes = jax.eval_shape(lambda: r4b.init(config, jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


@functools.cache
def slots(config: ModelConfig) -> dict[str, tuple[Slot, tuple[int, ...]]]:
    """Canonical name -> where it goes, and the shape its tensor must have. The one table."""
    table = {}
    for path, leaf in abstract(config).items():
        stacked = "layers" in path
        shape = leaf.shape[1:] if stacked else leaf.shape
        parts, leaf_name = [p for p in path[:-1] if p != "layers"], path[-1]
        if leaf_name in ("kernel", "scale"):
            leaf_name = "weight"
        elif leaf_name != "bias":  # a bare table, such as embed_tokens or image_newline
            parts.append(leaf_name)
            leaf_name = "" if path == ("image_newline",) else "weight"
        if path[0] == "vision_tower":
            parts = _tower_parts(parts, stacked)
        elif stacked:
            parts.insert(1, "layers.{}")
        name = ".".join(filter(None, (*parts, leaf_name)))
        if path[:2] == ("vision_tower", "patch_embedding") and path[-1] == "kernel":
            patch = config.vision.patch_size
            shape = (config.vision.width, 3, patch, patch)
        elif path[-1] == "kernel":
            shape = shape[::-1]
        for layer in range(leaf.shape[0]) if stacked else [None]:
            table[name.format(layer)] = (Slot(path, layer), tuple(shape))
    return table


def _tower_parts(parts: list[str], stacked: bool) -> list[str]:
    """SigLIP's modules around ours: `embeddings`, `encoder.layers`, `mlp`."""
    parts = [f"mlp.{p}" if p in ("fc1", "fc2") else p for p in parts]
    parts = [f"self_attn.{p}" if p.endswith("_proj") else p for p in parts]
    return [parts[0], "encoder.layers.{}" if stacked else "embeddings", *parts[1:]]


def to_ours(value: np.ndarray, slot: Slot) -> np.ndarray:
    """A file's tensor as the leaf (or the layer of the leaf) that it is."""
    if slot.path[-1] != "kernel":
        return value
    if value.ndim == 4:  # [D, 3, patch, patch] -> [patch * patch * 3, D]
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value.T


def to_theirs(value: np.ndarray, slot: Slot, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_ours`; `shape` is the file's."""
    if slot.path[-1] != "kernel":
        return value
    if len(shape) == 4:
        width, channels, patch, _ = shape
        return value.reshape(patch, patch, channels, width).transpose(3, 2, 0, 1)
    return value.T


def check_tensors(tensors: dict[str, Tensor], config: ModelConfig, parts: set[str]) -> set[str]:
    """Compare a checkpoint's headers with the model, before any memory is taken.

    Args:
      tensors: by canonical name.
      parts: components that the checkpoint must hold whole.
    Returns:
      canonical names that the model does not compute with: the tower's layers and head behind the
      features it reads, and a tied head's copy.
    Raises:
      CheckpointError: missing, extra or wrong-shaped tensors, or a dtype that is no float.
    """
    table = {n: v for n, v in slots(config).items() if v[0].path[0] in parts}
    depth = config.vision.num_layers
    spare = {name for name in tensors if name not in table and _is_spare(name, depth, config)}
    problems = collections.defaultdict(list)
    for name in table.keys() - tensors.keys():
        problems["missing"].append(released_name(name))
    for name in tensors.keys() - table.keys() - spare:
        problems["not expected"].append(tensors[name].name)
    for name in table.keys() & tensors.keys():
        found, (_, shape) = tensors[name], table[name]
        if found.shape != shape:
            problems["of another shape"].append(f"{found.name} {found.shape}, not {shape}")
    for tensor in tensors.values():
        if tensor.dtype not in ("F32", "BF16", "F16"):
            problems["of a dtype that is no float"].append(f"{tensor.name} {tensor.dtype}")
    if problems:
        text = "; ".join(
            f"{len(names)} {what}: {', '.join(sorted(names)[:5])}{' ...' * (len(names) > 5)}"
            for what, names in problems.items()
        )
        raise CheckpointError(f"the checkpoint does not fit its config: {text}")
    return spare


def _is_spare(name: str, depth: int, config: ModelConfig) -> bool:
    layer = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
    if layer:
        return int(layer[1]) >= depth
    tied = name == "language_model.lm_head.weight" and config.language.tied_head
    return tied or bool(UNUSED.match(name))


class Filler:
    """Parameters that fill up tensor by tensor, each leaf allocated once, where it will stay.

    Args:
      sharding: function (path, shape) -> jax Sharding, or None for the default device.
      dtype: of every parameter.
    """

    def __init__(self, config: ModelConfig, dtype, sharding=None):
        self.table, self.leaves, self.dtype = slots(config), abstract(config), jnp.dtype(dtype)
        self.sharding = sharding or (lambda path, shape: None)
        self.values: dict[tuple[str, ...], jax.Array] = {}

    def put(self, name: str, value: np.ndarray):
        """One tensor by its canonical name."""
        slot, _ = self.table[name]
        shape = self.leaves[slot.path].shape
        where = self.sharding(slot.path, shape)
        value = np.ascontiguousarray(to_ours(value, slot)).astype(self.dtype)
        if slot.layer is None:
            self.values[slot.path] = jax.device_put(value, where)
            return
        if slot.path not in self.values:
            make = jax.jit(lambda: jnp.zeros(shape, self.dtype), out_shardings=where)
            self.values[slot.path] = make()
        stack = self.values.pop(slot.path)
        self.values[slot.path] = _set_layer(stack, value, slot.layer)

    def tree(self, like: dict | None = None) -> dict:
        """The nested dict; leaves that nothing filled come from the paths of `like`."""
        missing = self.leaves.keys() - self.values.keys()
        out: dict = {}
        for path in self.leaves:
            value = like[path] if path in missing else self.values[path]
            inner = out
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = value
        return out


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack, value, layer):
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def leaf_of(params: dict, slot: Slot) -> np.ndarray:
    """A slot's value, on the host; one layer of a stack at most."""
    value = params
    for key in slot.path:
        value = value[key]
    return np.asarray(value if slot.layer is None else value[slot.layer])
