"""Small parts shared by the vision tower and the decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from r4b_jax.common import sharding
from r4b_jax.common.arrays import Array

# What the backward pass finds of a layer beside its input (model.remat). The names are given in
# packed_attention.py and below.
POLICIES = {
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "matmuls": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable,
        jax.checkpoint_policies.save_only_these_names("attention"),
    ),
}
# Logical axes (common/sharding.py) of the kernels [in, out], by the module's name, and of tables.
KERNELS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("width", "heads")),
    **dict.fromkeys(("o_proj", "out_proj"), ("heads", "width")),
    **dict.fromkeys(("gate_proj", "up_proj", "fc1", "linear_1"), ("width", "mlp")),
    **dict.fromkeys(("down_proj", "fc2", "linear_2"), ("mlp", "width")),
    "patch_embedding": (None, "width"),
}
TABLES = {
    "embed_tokens": ("vocab", "width"),
    "lm_head": ("vocab", "width"),
    "position_embedding": (None, "width"),
}


def logical_axes(path: tuple[str, ...], num_axes: int) -> tuple:
    """The logical axes of the parameter at `path`, or of what an optimiser keeps for it; a stack's
    layer axis comes first and is not split, nor are norms and biases."""
    axes = ()
    for name in path:
        axes = KERNELS.get(name) or TABLES.get(name) or axes
    if "bias" in path or num_axes < len(axes):
        axes = ()
    return (None,) * (num_axes - len(axes)) + axes


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Qwen3's)."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return (normed * self.scale[...]).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A kernel in 8 bits: values * scale. Stands in a `Linear` for the kernel it was made of."""

    values: Array  # int8[..., in, out]
    scale: Array  # float32[..., 1, out]

    @classmethod
    @functools.partial(jax.jit, static_argnums=0)
    def of(cls, kernel: Array) -> "Int8":
        """Round a kernel [..., in, out] to the nearest of 255 steps an output column."""
        kernel = kernel.astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(kernel), -2, keepdims=True), 1e-12) / 127
        return cls(jnp.round(kernel / scale).astype(jnp.int8), scale.astype(jnp.float32))


def in_int8(params: dict) -> dict:
    """The parameters of the model with the decoder's kernels in 8 bits, for rollouts."""

    def mapped(path, x):
        is_kernel = path[-1].key == "kernel" and path[0].key == "language_model"
        return Int8.of(x) if is_kernel else x

    return jax.tree_util.tree_map_with_path(mapped, params)


def cast_kernels(params: dict, dtype) -> dict:
    """The parameters with kernels and tables cast once, as they would be at every use."""

    def mapped(path, x):
        is_cast = path[-1].key == "kernel" or path[-1].key in TABLES
        return x.astype(dtype) if is_cast and not isinstance(x, Int8) else x

    return jax.tree_util.tree_map_with_path(mapped, params, is_leaf=lambda x: isinstance(x, Int8))


class Linear(nnx.Linear):
    """x kernel + bias, computed in `dtype`; kernel [in, out] normal(1/sqrt(in)), or an `Int8`."""

    def __init__(self, in_dim: int, out_dim: int, rngs: nnx.Rngs, dtype, *, bias: bool = False):
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
        super().__init__(in_dim, out_dim, use_bias=bias, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel.get_value()
        if not isinstance(kernel, Int8):
            if sharding.active() is not None:  # rows and places may be split over devices
                return super().__call__(x)
            # One axis of rows: the kernel's gradient is then a product of two matrices, and not of
            # their transposed copies.
            return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        x = x.astype(self.dtype)
        out = (x @ kernel.values.astype(self.dtype)) * kernel.scale[0].astype(self.dtype)
        return out if self.bias is None else out + self.bias[...].astype(self.dtype)


class LayerStack(nnx.Module):
    """`num_layers` equal layers whose parameters carry a leading layer axis."""

    def __init__(self, make_layer, num_layers: int, rngs: nnx.Rngs, dtype, *, remat: str):
        graphs = []

        def init_one(key):
            graph, state = nnx.split(make_layer(nnx.Rngs(key)))
            graphs.append(graph)
            return state

        state = jax.vmap(init_one)(jax.random.split(rngs.params(), num_layers))
        self.layers = nnx.merge(graphs[0], state)
        self.num_layers = num_layers
        self.dtype = dtype
        self.remat = remat

    def __call__(self, x: Array, run_layer):
        """One `lax.scan` of `run_layer(layer, x) -> (x, out)` over the layers.

        Args:
          x: the carry, [..., D].
        Returns:
          the last x, and each layer's `out` stacked on a leading axis L.
        """
        graph, states = nnx.split(self.layers)

        def body(x, state):
            x = checkpoint_name(sharding.constrain(x, *spread), "layer_input")
            x, out = run_layer(nnx.merge(graph, self._gathered(state)), x)
            return sharding.constrain(x, *spread), out

        spread = ("rows", "sequence", None)
        body = jax.checkpoint(body, policy=POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(body, x, states)

    def _gathered(self, state):
        """A layer's parameters, whole again; its kernels are cast before they travel."""

        def gathered(path, x):
            axes = logical_axes(sharding.names(path), x.ndim)
            is_kernel = any(axes) and jnp.issubdtype(x.dtype, jnp.floating)
            return sharding.gather(x.astype(self.dtype) if is_kernel else x, axes)

        return jax.tree_util.tree_map_with_path(gathered, state)

    def step(self, x: Array, run_layer, caches) -> tuple[Array, tuple]:
        """The layers written out, for a decoding step: each has a cache of its own to update.

        Args:
          run_layer: function (layer, x, cache) -> (x, cache).
          caches: one for each layer.
        Returns:
          the last x, and the new caches.
        """
        graph, states = nnx.split(self.layers)
        kept = []
        for i, cache in enumerate(caches):
            layer = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], states))
            x, cache = run_layer(layer, x, cache)
            kept.append(cache)
        return x, tuple(kept)
