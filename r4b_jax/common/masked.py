"""Sums and means over masked arrays. Losses travel as (sum, weight) and are divided once, at the
end."""

import jax.numpy as jnp

from r4b_jax.common.arrays import Array


def masked_mean(x: Array, mask: Array, axis=None) -> Array:
    """Mean of `x` where `mask` is nonzero; 0 where the mask is empty."""
    return jnp.sum(x * mask, axis) / jnp.maximum(jnp.sum(mask, axis), 1)
