"""Choosing the next token. Pure functions of logits and keys."""

import dataclasses

import jax
import jax.numpy as jnp

from r4b_jax.common.arrays import Array
from r4b_jax.models.attention import NEG_INF
from r4b_jax.models.vocabulary import logp_of

DRAW_BLOCK = 128  # tokens of the vocabulary summed together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Numbers are traced: other values compile nothing anew, except across
    `greedy` and `truncated`. Make one with `Sampling.of`."""

    temperature: Array  # float32[]
    top_p: Array  # float32[], the most likely tokens that together reach this probability
    top_k: Array  # int32[], the k most likely tokens; 0 = all
    think_bias: Array  # float32[], added to the logit of thinking where the mode is decided
    max_think_tokens: Array  # int32[], a thought still open after so many tokens is closed
    max_direct_tokens: Array  # int32[], a reply without a thought is cut off after so many
    greedy: bool = dataclasses.field(metadata={"static": True})
    truncated: bool = dataclasses.field(metadata={"static": True})
    # bool[B], rows that take their likeliest token, where each row has numbers of its own (a column
    # [B, 1] for temperature, top_p and top_k); None = all rows sample.
    likeliest: Array | None = None

    @classmethod
    def of(
        cls,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        think_bias: float = 0.0,
        max_think_tokens: int | None = None,
        max_direct_tokens: int | None = None,
    ) -> "Sampling":
        """Settings as a person gives them; temperature 0 = greedy.

        Raises:
          ValueError: a value out of its range.
        """
        if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
            raise ValueError("temperature and top_k are at least 0, top_p is above 0 and at most 1")
        if max_think_tokens is not None and max_think_tokens < 1:
            raise ValueError("max_think_tokens is at least 1: to think not at all is a mode")
        return cls(
            temperature=jnp.float32(temperature or 1.0),
            top_p=jnp.float32(top_p),
            top_k=jnp.int32(top_k),
            think_bias=jnp.float32(think_bias),
            max_think_tokens=jnp.int32(2**30 if max_think_tokens is None else max_think_tokens),
            max_direct_tokens=jnp.int32(2**30 if max_direct_tokens is None else max_direct_tokens),
            greedy=temperature == 0,
            truncated=temperature > 0 and (top_p < 1 or top_k > 0),
        )


def choose(logits: Array, keys: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Sample each row with its own key, so that a row does not depend on its neighbours.

    Args:
      logits: float32[B, V].
      keys: typed keys [B].
    Returns:
      tokens int32[B], and their log-probabilities float32[B] under the distribution sampled from
      (greedy: under softmax(logits)).
    """
    if sampling.greedy:
        tokens = jnp.argmax(logits, -1).astype(jnp.int32)
        return tokens, logp_of(logits, tokens)
    logits = logits / sampling.temperature
    if sampling.truncated:
        logits = truncate(logits, sampling.top_k, sampling.top_p)
    tokens, logps = draw(logits, keys)
    if sampling.likeliest is None:
        return tokens, logps
    best = jnp.argmax(logits, -1).astype(jnp.int32)
    chosen = jnp.where(sampling.likeliest, best, tokens)
    return chosen, jnp.where(sampling.likeliest, logp_of(logits, best), logps)


def draw(logits: Array, keys: Array) -> tuple[Array, Array]:
    """One token of each row from softmax(logits), by one uniform number and the inverse of the
    cumulative distribution: a V-th of the random numbers that adding Gumbel noise takes.

    The vocabulary is cut into blocks, so that sums stay short and exact: first the block is drawn,
    then the token in it.

    Args:
      logits: float32[B, V]; keys: typed keys [B].
    Returns:
      tokens int32[B], their log-probabilities float32[B].
    """
    rows, size = logits.shape
    top = jnp.max(logits, -1)
    weights = jnp.exp(logits - top[:, None])
    weights = jnp.pad(weights, ((0, 0), (0, -size % DRAW_BLOCK))).reshape(rows, -1, DRAW_BLOCK)
    sums = weights.sum(-1)
    total = sums.sum(-1)
    # In (0, 1): of its 2^23 values none is 0, which would be the first token's, however unlikely.
    uniform = jax.vmap(jax.random.uniform)(keys) + 2.0**-24
    point = uniform * total
    block, before = _reach(sums, point)
    inside = jnp.take_along_axis(weights, block[:, None, None], 1)[:, 0]
    place, _ = _reach(inside, jnp.maximum(point - before, 0))
    weight = jnp.take_along_axis(inside, place[:, None], 1)[:, 0]
    return (block * DRAW_BLOCK + place).astype(jnp.int32), jnp.log(weight / total)


def _reach(weights: Array, point: Array) -> tuple[Array, Array]:
    """Where the running sum of [B, n] first exceeds `point` [B], never at a weight of 0: the place,
    and the sum before it."""
    sums = jnp.cumsum(weights, -1)
    count = weights.shape[-1]
    # Rounding may put the point beyond the end, and make the sums rise where a weight is 0.
    possible = weights > 0
    reached = (sums > point[:, None]) & possible
    last = count - 1 - jnp.argmax(possible[:, ::-1], -1)
    place = jnp.where(jnp.any(reached, -1), jnp.argmax(reached, -1), last)
    chosen = place[:, None]
    before = jnp.take_along_axis(sums, chosen, 1) - jnp.take_along_axis(weights, chosen, 1)
    return place, before[:, 0]


def truncate(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Put all but the top-k, and of those all but the top-p, tokens out of reach: [..., V].

    The most likely token always stays, as do others that share the last one's logit.
    """
    ordered = -jnp.sort(-logits, -1)
    size = logits.shape[-1]
    place = jnp.arange(size)
    in_k = place < jnp.where(top_k > 0, top_k, size)
    probs = jax.nn.softmax(jnp.where(in_k, ordered, -jnp.inf), -1)
    before = jnp.cumsum(probs, -1) - probs  # mass of the tokens ahead of this one
    kept = in_k & (before < top_p)
    lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits >= lowest, logits, NEG_INF)
