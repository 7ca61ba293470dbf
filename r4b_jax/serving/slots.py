"""The device's side of the server: slots in which strangers' requests are decoded together.

A slot is one request: `generate`'s groups of one rollout each, filled from outside. Each slot has
its own settings, so requests of any temperature, mode and length share one program:

    boundary    0        1        2        3        4        STEPS tokens apart
    slot 0      a a a a a a a a a a a a .  e e e e e e
    slot 1      b b b b b b b b b b b b b b b b b b b
    slot 2               c c c c .         f f f f f f       who waits enters where one is free
"""

import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r4b_jax.common.arrays import Array
from r4b_jax.decoding.generate import (
    MAX_FORCED,
    Ids,
    _active,
    _bind,
    _decode_step,
    _nothing,
    _prefill,
    _State,
    _Work,
)
from r4b_jax.decoding.prompts import Prompts
from r4b_jax.decoding.sampling import Sampling
from r4b_jax.models.vocabulary import ban

STEPS = 8  # tokens between two boundaries
NO_LIMIT = 2**30
# Fields of the state that have no axis of slots, or belong to queries that wait.
COMMON = ("tick", "waiting")


class Settings(NamedTuple):
    """How each of C slots is answered. Numpy on the host, read at every boundary."""

    alive: Array  # bool[C], False: nobody's, or given up
    forced: Array  # int32[C, MAX_FORCED], -1 = free
    seed: Array  # uint32[C]
    temperature: Array  # float32[C], 0 = the likeliest token
    top_p: Array  # float32[C], above 1 = all tokens
    top_k: Array  # int32[C], 0 = all tokens
    think_bias: Array  # float32[C]
    max_think_tokens: Array  # int32[C]
    max_new_tokens: Array  # int32[C]; of a thinking reply the host cuts off what is too much

    @classmethod
    def empty(cls, slots: int) -> "Settings":
        return cls(
            alive=np.zeros(slots, bool),
            forced=np.full((slots, MAX_FORCED), -1, np.int32),
            seed=np.zeros(slots, np.uint32),
            temperature=np.zeros(slots, np.float32),
            top_p=np.full(slots, 2, np.float32),
            top_k=np.zeros(slots, np.int32),
            think_bias=np.zeros(slots, np.float32),
            max_think_tokens=np.full(slots, NO_LIMIT, np.int32),
            max_new_tokens=np.full(slots, NO_LIMIT, np.int32),
        )


class News(NamedTuple):
    """What a boundary brought to the first slots."""

    fresh: Array  # int32[C, STEPS], the tokens since the last boundary, then anything
    lengths: Array  # int32[C], tokens since the slot was entered
    mode_logps: Array  # float32[C, 2]


class Filled(NamedTuple):
    """Prompts that are computed and may enter."""

    lengths: Array  # int32[n]
    prefix: tuple  # of keys and values, each [n, K, S, H], a layer each
    first_logits: Array  # float32[n, V]
    mode_logps: Array  # float32[n, 2]


@functools.partial(jax.jit, static_argnames=("config", "ids", "slots", "prompt_len", "reply_len"))
def nobody(config, params, ids: Ids, *, slots: int, prompt_len: int, reply_len: int) -> _State:
    """The state of empty slots."""
    shapes = types.SimpleNamespace(tokens=np.zeros((slots, prompt_len), np.int32))
    work = _Work(shapes, np.zeros((slots, 1, MAX_FORCED), np.int32), None)
    state = _nothing(_bind(config, params), work, ids, (slots, 1), reply_len)
    return state._replace(query=jnp.arange(slots))


@functools.partial(jax.jit, static_argnames=("config", "ids"))
def prefill(config, params, ids: Ids, prompts: Prompts) -> Filled:
    """Compute prompts; touches no slot, so that one that fails harms nobody."""
    prefix, logits = _prefill(_bind(config, params), prompts)
    logits = ban(logits, ids.never)
    mode_logps = jax.nn.log_softmax(logits)[:, jnp.array([ids.thinking, ids.direct])]
    return Filled(prompts.lengths, prefix, logits, mode_logps)


@functools.partial(jax.jit, donate_argnames="state")
def enter(state: _State, filled: Filled, slots: Array) -> _State:
    """Computed prompts take slots int32[n]; a slot out of range = this prompt is padding."""

    def put(old, new):
        return old.at[slots].set(new, mode="drop")

    def put_prefix(old, new):
        return old.at[slots, :, : new.shape[2]].set(new, mode="drop")

    return state._replace(
        prefix_len=put(state.prefix_len, filled.lengths),
        first_logits=put(state.first_logits, filled.first_logits),
        prefix=jax.tree.map(put_prefix, state.prefix, filled.prefix),
        row=put(state.row, 0),
        step=put(state.step, 0),
        lengths=put(state.lengths, 0),
        mode_logps=put(state.mode_logps, filled.mode_logps),
    )


@functools.partial(
    jax.jit, static_argnames=("config", "ids", "width", "truncated"), donate_argnames="state"
)
def advance(
    config, params, ids: Ids, settings: Settings, state: _State, *, width: int, truncated: bool
) -> tuple[_State, News]:
    """To the next boundary: up to STEPS tokens of every slot at work. `state` is donated.

    Args:
      width: the first so many slots are computed; nobody is at work in the others.
      truncated: whether a slot has a top_p or top_k, which takes sorting.
    """
    model = _bind(config, params)
    settings = Settings(*(x[:width] for x in settings))
    part = _first(state, width)
    part = part._replace(row=jnp.where(settings.alive[:, None], part.row, 1))
    likeliest = settings.temperature == 0
    sampling = Sampling(
        temperature=jnp.where(likeliest, 1.0, settings.temperature)[:, None],
        top_p=settings.top_p[:, None],
        top_k=settings.top_k[:, None],
        think_bias=settings.think_bias,
        max_think_tokens=settings.max_think_tokens[:, None],
        max_direct_tokens=settings.max_new_tokens[:, None],
        greedy=False,
        truncated=truncated,
        likeliest=likeliest,
    )
    # As in `Model.stream`: the same seed gives the same reply here and there.
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), (1,)))(settings.seed)
    work = _Work(None, settings.forced[:, None], keys)
    before, until = part.lengths, part.tick + STEPS
    part = jax.lax.while_loop(
        lambda s: (s.tick < until) & jnp.any(_active(s, 1)),
        lambda s: _decode_step(model, ids, sampling, work, s),
        part,
    )
    places = jnp.minimum(before + jnp.arange(STEPS), part.tokens.shape[2] - 1)
    fresh = jnp.take_along_axis(part.tokens[:, 0], places, 1)
    news = News(fresh, part.lengths[:, 0], part.mode_logps)
    return _put_back(state, part), news


def _first(state: _State, width: int) -> _State:
    """The first `width` slots."""
    cut = {
        name: jax.tree.map(lambda x: x[:width], value)
        for name, value in state._asdict().items()
        if name not in COMMON
    }
    return state._replace(**cut)


def _put_back(state: _State, part: _State) -> _State:
    """The state with its first slots as in `part`; prompts do not change."""

    def put(old, new):
        return new if old.shape == new.shape else old.at[: new.shape[0]].set(new)

    unchanged = ("prefix", "prefix_len", "first_logits", "query", "mode_logps")
    changed = {
        name: jax.tree.map(put, getattr(state, name), value)
        for name, value in part._asdict().items()
        if name not in unchanged
    }
    return state._replace(**changed)
