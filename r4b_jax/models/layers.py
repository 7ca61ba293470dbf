"""Small parts shared by the vision tower and the decoder."""

import jax
import jax.numpy as jnp
from flax import nnx

from r4b_jax.common.arrays import Array


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Qwen3's)."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return (normed * self.scale[...]).astype(x.dtype)


def linear(in_dim: int, out_dim: int, rngs: nnx.Rngs, dtype, *, bias: bool = False) -> nnx.Linear:
    """Linear layer, kernel [in, out] normal(1/sqrt(in)), float32, computing in `dtype`."""
    init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
    return nnx.Linear(in_dim, out_dim, use_bias=bias, kernel_init=init, dtype=dtype, rngs=rngs)


class LayerStack(nnx.Module):
    """`num_layers` equal layers whose parameters carry a leading layer axis, run by one
    `lax.scan`."""

    def __init__(self, make_layer, num_layers: int, rngs: nnx.Rngs, *, remat: bool):
        graphs = []

        def init_one(key):
            graph, state = nnx.split(make_layer(nnx.Rngs(key)))
            graphs.append(graph)
            return state

        state = jax.vmap(init_one)(jax.random.split(rngs.params(), num_layers))
        self.layers = nnx.merge(graphs[0], state)
        self.num_layers = num_layers
        self.remat = remat

    def __call__(self, x: Array, run_layer, per_layer=None):
        """Scan `run_layer(layer, x, per_layer[l]) -> (x, out)` over layers.

        Args:
          x: the carry, [..., D].
          per_layer: pytree with leading axis L, one slice for each layer, or None.
        Returns:
          the last x, and each layer's `out` stacked on a leading axis L.
        """
        graph, states = nnx.split(self.layers)

        def body(x, inputs):
            state, extra = inputs
            return run_layer(nnx.merge(graph, state), x, extra)

        if self.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        return jax.lax.scan(body, x, (states, per_layer))
