"""Choosing the next token. Pure functions of logits and keys."""

import jax
import jax.numpy as jnp

from r4b_jax.common.arrays import Array
from r4b_jax.models.attention import NEG_INF


def ban(logits: Array, never: tuple[int, ...]) -> Array:
    """Logits [..., V] with the ids of `never` put out of reach. The trainer bans the same ids as
    the sampler, so both mean the same distribution."""
    return logits.at[..., jnp.array(never, jnp.int32)].set(NEG_INF) if never else logits


def choose(logits: Array, keys: Array, temperature: float) -> tuple[Array, Array]:
    """Sample each row with its own key, so that a row does not depend on its neighbours.

    Args:
      logits: float32[B, V].
      keys: typed keys [B].
      temperature: 0 = greedy.
    Returns:
      tokens int32[B], and their log-probabilities float32[B] under the distribution sampled from
      (at temperature 0: under softmax(logits)).
    """
    if temperature == 0:
        tokens = jnp.argmax(logits, -1)
    else:
        logits = logits / temperature
        tokens = jax.vmap(jax.random.categorical)(keys, logits)
    return tokens.astype(jnp.int32), logp_of(logits, tokens)


def logp_of(logits: Array, tokens: Array) -> Array:
    """log softmax(logits)[tokens]: float32[..., V], int32[...] -> float32[...]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, -1)
