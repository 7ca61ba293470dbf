"""One jitted generate for evaluation, rollouts and chat: prefill once a query, then a `while_loop`.

A query's prompt ends in `<think>`, the same for all modes, so it is computed once; its R rollouts
start from it, each with its own forced beginning (none = auto). The rollouts attend to the one
copy of the prompt's keys and values and to their own.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r4b_jax.common.arrays import Array, ImagePlan
from r4b_jax.config import ModelConfig
from r4b_jax.data.examples import Example, plan_index
from r4b_jax.decoding.sampling import Sampling, ban, choose, logp_of
from r4b_jax.models import r4b
from r4b_jax.models.attention import attend_in_blocks, attend_shared_prefix

MAX_FORCED = 2  # tokens a mode forces after <think>
QUERY_BLOCK = 512  # queries of a prompt whose attention scores exist at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Queries, padded on the right."""

    tokens: Array  # int32[Q, S]
    lengths: Array  # int32[Q]
    tiles: Array  # uint8[Q, I, image_size, image_size, 3]
    plan: ImagePlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """What followed `<think>`: R rollouts of each query."""

    tokens: Array  # int32[Q, R, U], the end token included, `pad_id` after it
    logps: Array  # float32[Q, R, U], as sampled; of forced tokens: under the policy
    lengths: Array  # int32[Q, R]
    mode_logps: Array  # float32[Q, 2], log P(thinking token), log P(direct token) after <think>


@dataclasses.dataclass(frozen=True)
class Ids:
    """The ids `generate` must know."""

    end: int
    pad: int
    thinking: int
    direct: int
    end_think: int
    never: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer) -> "Ids":
        return cls(
            end=tokenizer.end_id,
            pad=tokenizer.pad_id,
            thinking=tokenizer.thinking_id,
            direct=tokenizer.direct_id,
            end_think=tokenizer.end_think_id,
            never=tuple(tokenizer.never_sampled),
        )


def pad_prompts(
    prompts: list[Example], prompt_len: int, pad_id: int, patches: int, tiles: int | None = None
) -> Prompts:
    """Stack prompts; those with fewer tiles than the others get empty ones.

    Args:
      patches: feature rows a tile gives.
      tiles: tiles to pad to; None = as many as the prompts need.
    Raises:
      ValueError: a prompt is longer than `prompt_len`.
    """
    longest = max(len(p.tokens) for p in prompts)
    if longest > prompt_len:
        raise ValueError(f"a prompt of {longest} tokens exceeds generate.prompt_len = {prompt_len}")
    count, most = len(prompts), max(len(p.tiles) for p in prompts)
    tiles = most if tiles is None else tiles
    out = Prompts(
        tokens=np.full((count, prompt_len), pad_id, np.int32),
        lengths=np.array([len(p.tokens) for p in prompts], np.int32),
        tiles=np.zeros((count, tiles, *prompts[0].tiles.shape[1:]), np.uint8),
        plan=ImagePlan(
            np.zeros((count, prompt_len, 4), np.int32), np.zeros((count, prompt_len, 4), np.float32)
        ),
    )
    for i, prompt in enumerate(prompts):
        length = len(prompt.tokens)
        out.tokens[i, :length] = prompt.tokens
        out.tiles[i, : len(prompt.tiles)] = prompt.tiles
        out.plan.index[i, :length] = plan_index(prompt, 0, tiles, patches)
        out.plan.weight[i, :length] = prompt.plan_weight
    return out


def forced_array(forced: list[list[int]], num_queries: int) -> np.ndarray:
    """What R rollouts of each query begin with: int32[Q, R, MAX_FORCED], -1 = free."""
    out = np.full((num_queries, len(forced), MAX_FORCED), -1, np.int32)
    for i, ids in enumerate(forced):
        out[:, i, : len(ids)] = ids
    return out


def p_think(mode_logps: np.ndarray) -> np.ndarray:
    """P(thinking) against P(direct) from a Generation's `mode_logps` [..., 2]: [...]."""
    return 1 / (1 + np.exp(mode_logps[..., 1] - mode_logps[..., 0]))


@functools.partial(jax.jit, static_argnames=("config", "ids", "max_new_tokens"))
def generate(
    config: ModelConfig,
    params: dict,
    prompts: Prompts,
    forced: Array,
    keys: Array,
    ids: Ids,
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> Generation:
    """Answer each query R times.

    Args:
      forced: int32[Q, R, MAX_FORCED], tokens to begin with, -1 = free.
      keys: typed keys [Q, R], one a rollout: its samples depend on nothing else in the batch.
      max_new_tokens: U, forced tokens included; a rollout that has not ended by then is cut off.
    """
    fixed, state, mode_logps = _start(config, params, prompts, forced, keys, ids, max_new_tokens)
    state = _run(config, params, ids, sampling, fixed, state, max_new_tokens)
    shape = forced.shape[:2]
    return Generation(
        tokens=state.tokens.reshape(*shape, -1),
        logps=state.logps.reshape(*shape, -1),
        lengths=state.lengths.reshape(shape),
        mode_logps=mode_logps,
    )


@functools.partial(jax.jit, static_argnames=("config", "ids", "max_new_tokens"))
def start(config, params, prompts, forced, keys, ids, *, max_new_tokens):
    """`generate`'s prefill alone, for one who wants the tokens as they come.

    Returns:
      (fixed, state, mode_logps float32[Q, 2]); hand the first two to `advance`.
    """
    return _start(config, params, prompts, forced, keys, ids, max_new_tokens)


@functools.partial(jax.jit, static_argnames=("config", "ids"), donate_argnames="state")
def advance(config, params, ids, sampling, fixed, state, steps):
    """Up to `steps` more tokens of every row: the new state, whose `tokens` int32[B, U], `lengths`
    and `done` tell what there is. `state` is donated."""
    until = jnp.minimum(state.step + steps, state.tokens.shape[1])
    return _run(config, params, ids, sampling, fixed, state, until)


def _run(config, params, ids, sampling, fixed, state, until):
    model = r4b.bind(config, params)
    return jax.lax.while_loop(
        lambda s: (s.step < until) & ~jnp.all(s.done),
        lambda s: _decode_step(model, ids, sampling, fixed, s),
        state,
    )


def _start(config, params, prompts, forced, keys, ids, max_new_tokens):
    """Prefill: what decoding reads, its first state, and how likely the two modes are."""
    model = r4b.bind(config, params)
    num_queries, rollouts, _ = forced.shape
    rows = num_queries * rollouts
    prefix, first_logits = _prefill(model, prompts)
    first_logits = ban(first_logits, ids.never)
    fixed = _Fixed(
        prefix=prefix,
        prefix_mask=jnp.arange(prompts.tokens.shape[1]) < prompts.lengths[:, None],
        start=jnp.repeat(prompts.lengths, rollouts),
        forced=jnp.pad(
            forced.reshape(rows, -1),
            ((0, 0), (0, max_new_tokens - MAX_FORCED)),
            constant_values=-1,
        ),
        keys=keys.reshape(rows),
    )
    kv_shape = (prefix[0].shape[0], rows, max_new_tokens, *prefix[0].shape[3:])
    state = _State(
        step=jnp.int32(0),
        logits=jnp.repeat(first_logits, rollouts, 0),
        suffix=(jnp.zeros(kv_shape, prefix[0].dtype), jnp.zeros(kv_shape, prefix[0].dtype)),
        tokens=jnp.full((rows, max_new_tokens), ids.pad, jnp.int32),
        logps=jnp.zeros((rows, max_new_tokens), jnp.float32),
        lengths=jnp.zeros((rows,), jnp.int32),
        done=jnp.zeros((rows,), bool),
        closed=jnp.zeros((rows,), bool),
    )
    modes = jnp.array([ids.thinking, ids.direct])
    return fixed, state, jax.nn.log_softmax(first_logits)[:, modes]


class _Fixed(NamedTuple):
    """What decoding reads and never changes; B = Q*R rows."""

    prefix: tuple[Array, Array]  # keys and values of the prompts, each [L, Q, S, K, H]
    prefix_mask: Array  # bool[Q, S]
    start: Array  # int32[B], position of the first new token
    forced: Array  # int32[B, U], -1 = free
    keys: Array  # typed keys [B]


class _State(NamedTuple):
    """What a decoding step changes."""

    step: Array  # int32[]
    logits: Array  # float32[B, V], of the token to be chosen
    suffix: tuple[Array, Array]  # keys and values of the new tokens, each [L, B, U, K, H]
    tokens: Array  # int32[B, U]
    logps: Array  # float32[B, U]
    lengths: Array  # int32[B]
    done: Array  # bool[B]
    closed: Array  # bool[B], no thought is open


def _decode_step(model: r4b.R4B, ids: Ids, sampling: Sampling, fixed: _Fixed, state: _State):
    """Choose every row's next token, then compute the logits of the one after it."""
    step, done = state.step, state.done
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(fixed.keys, step)
    bias = jnp.where(step == 0, sampling.think_bias, 0.0)
    sampled, logp = choose(state.logits.at[:, ids.thinking].add(bias), step_keys, sampling)
    # Four cases: the row is done (padding), the mode forces a token, the thought has used up its
    # tokens and is closed, else the sampled one.
    over = ~state.closed & (step >= sampling.max_think_tokens)
    must = jnp.where(over, ids.end_think, fixed.forced[:, step])
    token = jnp.where(done, ids.pad, jnp.where(must >= 0, must, sampled))
    logp = jnp.where(must >= 0, logp_of(state.logits, jnp.maximum(must, 0)), logp)
    closed = state.closed | (token == ids.end_think) | ((step == 0) & (token != ids.thinking))
    masks = (fixed.prefix_mask, jnp.arange(state.tokens.shape[1]) < step)
    hidden, kv = model.language_model(
        model.language_model.embed(token[:, None]),
        (fixed.start + step)[:, None],
        lambda q, k, v, kept: attend_shared_prefix(q, k, v, kept[:2], kept[2:], masks),
        (*fixed.prefix, *state.suffix),
        keep_kv=True,
    )
    return _State(
        step=step + 1,
        logits=ban(model.language_model.logits(hidden[:, 0]), ids.never),
        suffix=tuple(
            jax.lax.dynamic_update_slice(old, new, (0, 0, step, 0, 0))
            for old, new in zip(state.suffix, kv)
        ),
        tokens=state.tokens.at[:, step].set(token),
        logps=state.logps.at[:, step].set(jnp.where(done, 0, logp)),
        lengths=state.lengths + ~done,
        done=done | (token == ids.end),
        closed=closed,
    )


def _prefill(model: r4b.R4B, prompts: Prompts):
    """The prompts' keys and values, each [L, Q, S, K, H], and float32[Q, V] after their ends."""
    length = prompts.tokens.shape[1]
    real = jnp.arange(length) < prompts.lengths[:, None]
    mask = jnp.tril(jnp.ones((length, length), bool)) & real[:, None, :]
    positions = jnp.broadcast_to(jnp.arange(length), prompts.tokens.shape)
    hidden, kv = model.language_model(
        model.embed(prompts.tokens, prompts.tiles, prompts.plan),
        positions,
        lambda q, k, v, _: attend_in_blocks(q, k, v, mask, QUERY_BLOCK),
        keep_kv=True,
    )
    last = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], 1)[:, 0]
    return kv, model.language_model.logits(last)
