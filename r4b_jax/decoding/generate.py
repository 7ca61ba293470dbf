"""One jitted generate for evaluation, rollouts and chat: a prompt is computed once a query.

A query's prompt ends in `<think>`, the same for all modes; its R rollouts start from it, each with
its own forced beginning (none = auto), and attend to the one copy of its keys and values and to
their own. A direct reply is short and a trace is long, so rows do not wait for each other:

    slots     group 1, query 4         group 2, query 5
    row       0  1  5  3               2  0  1  3          of the query's R rollouts
              |  |  |  |
              a rollout that ends leaves, and the query's next one that waits enters;
              a group whose rollouts have all ended takes the next query that waits.

All slots write their keys and values into the same column of a ring, one column a step: where a
rollout began in it differs, its length tells. So nothing is compiled anew and nothing is moved.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from r4b_jax.common import sharding
from r4b_jax.common.arrays import Array
from r4b_jax.config import ModelConfig
from r4b_jax.decoding.prompts import Prompts
from r4b_jax.decoding.sampling import Sampling, choose
from r4b_jax.models import r4b
from r4b_jax.models.attention import attend_shared_prefix
from r4b_jax.models.layers import cast_kernels, logical_axes
from r4b_jax.models.packed_attention import packed_attention
from r4b_jax.models.vocabulary import ban, logp_of

MAX_FORCED = 2  # tokens a mode forces after <think>
ADMIT_SHARE = 8  # queries enter when an eighth of the groups are free, or all that still wait fit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """What followed `<think>`: R rollouts of each query."""

    tokens: Array  # int32[Q, R, U], the end token included, `pad_id` after it
    logps: Array  # float32[Q, R, U], as sampled; of forced tokens: under the policy
    lengths: Array  # int32[Q, R]
    mode_logps: Array  # float32[Q, 2], log P(thinking token), log P(direct token) after <think>
    steps: Array  # int32[], decoding steps of all slots
    occupancy: Array  # float32[], share of slots and steps that gave a token


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


def forced_array(forced: list[list[int]], num_queries: int) -> np.ndarray:
    """What R rollouts of each query begin with: int32[Q, R, MAX_FORCED], -1 = free."""
    out = np.full((num_queries, len(forced), MAX_FORCED), -1, np.int32)
    for i, ids in enumerate(forced):
        out[:, i, : len(ids)] = ids
    return out


def p_think(mode_logps: np.ndarray) -> np.ndarray:
    """P(thinking) against P(direct) from a Generation's `mode_logps` [..., 2]: [...]."""
    return 1 / (1 + np.exp(mode_logps[..., 1] - mode_logps[..., 0]))


@functools.partial(
    jax.jit,
    static_argnames=("config", "ids", "max_new_tokens", "queries_at_once", "rollouts_at_once"),
)
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
    queries_at_once: int | None = None,
    rollouts_at_once: int | None = None,
) -> Generation:
    """Answer each query R times.

    Args:
      forced: int32[Q, R, MAX_FORCED], tokens to begin with, -1 = free.
      keys: typed keys [Q, R], one a rollout: its samples depend on nothing else in the batch.
      max_new_tokens: U, forced tokens included; a rollout that has not ended by then is cut off.
      queries_at_once: groups of slots of each copy of the parameters; None = one for each query.
      rollouts_at_once: slots of a group; None = one for each rollout. The first rollouts of a query
        begin first: put the long ones there.
    """
    slots = queries_at_once or len(forced), rollouts_at_once or forced.shape[1]
    answer = functools.partial(_answer, config, ids, max_new_tokens, slots)
    mesh, work = sharding.active(sharding.ROWS), _Work(prompts, forced, keys)
    if mesh is None or sharding.row_shards(mesh) == 1:
        return _results(answer(params, sampling, work))
    # Each copy of the parameters answers its own queries, in as many steps as those take.
    rows, whole = PartitionSpec(sharding.ROWS), PartitionSpec()
    specs = {"in_specs": (whole, whole, rows), "out_specs": rows}
    run = functools.partial(jax.shard_map, check_vma=False, **specs)
    if mesh.shape[sharding.TENSOR] > 1:
        # The compiler splits that axis, and may let all devices meet: all must take every step.
        answer = functools.partial(answer, in_step=True)
        run = functools.partial(run, axis_names=frozenset(sharding.ROWS))
    return _results(run(answer)(params, sampling, work))


def _answer(config, ids, max_new_tokens, slots, params, sampling, work, in_step=False) -> dict:
    """Answer the queries of one copy of the parameters: the fields of a Generation, but `steps` is
    int32[1] and `slots` is there, int32[1], instead of the occupancy.

    Args:
      in_step: of several copies each takes a step while any of them must.
    """
    num_queries, rollouts, _ = work.forced.shape
    slots = min(slots[0], num_queries), min(slots[1], rollouts)
    model = _bind(config, params)
    state = _nothing(model, work, ids, slots, max_new_tokens)

    def waits(state):
        return state.waiting < num_queries

    def anyone(flag):
        return jax.lax.pmax(flag.astype(jnp.int32), sharding.ROWS) > 0 if in_step else flag

    def active(state):
        return anyone(jnp.any(_active(state, rollouts)))

    def decode(state):
        state = _admit(model, ids, work, state)
        return jax.lax.while_loop(
            lambda s: active(s) & ~anyone(waits(s) & _has_room(s, rollouts)),
            lambda s: _decode_step(model, ids, sampling, work, s),
            state,
        )

    state = jax.lax.while_loop(lambda s: anyone(waits(s)) | active(s), decode, state)
    return _raw(state)


@functools.partial(jax.jit, static_argnames=("config", "ids", "max_new_tokens"))
def start(config, params, prompts, forced, keys, ids, *, max_new_tokens):
    """The prefill of one query alone, for one who wants the tokens as they come.

    Args:
      prompts: of one query; forced: int32[1, R, MAX_FORCED]; keys: typed keys [1, R].
    Returns:
      (work, state); hand both to `advance`.
    """
    model, work = _bind(config, params), _Work(prompts, forced, keys)
    state = _nothing(model, work, ids, forced.shape[:2], max_new_tokens)
    return work, _admit(model, ids, work, state)


@functools.partial(jax.jit, static_argnames=("config", "ids"), donate_argnames="state")
def advance(config, params, ids, sampling, work, state, steps):
    """Up to `steps` more tokens of every row: (the new state, the Generation so far). `state` is
    donated."""
    model, until = _bind(config, params), state.tick + steps
    state = jax.lax.while_loop(
        lambda s: (s.tick < until) & jnp.any(_active(s, work.forced.shape[1])),
        lambda s: _decode_step(model, ids, sampling, work, s),
        state,
    )
    return state, _results(_raw(state))


def for_generation(config: ModelConfig, params: dict) -> dict:
    """Parameters as generation wants them: kernels cast, and placed on the current mesh if it is
    another than theirs."""
    mesh = sharding.current()
    if mesh is None:
        return params
    cast = functools.partial(cast_kernels, dtype=config.compute_dtype)
    where = sharding.placements(params, logical_axes, mesh)
    return jax.jit(cast, out_shardings=where)(params)


def _bind(config: ModelConfig, params: dict) -> r4b.R4B:
    return r4b.bind(config, cast_kernels(params, config.compute_dtype))


class _Work(NamedTuple):
    """What decoding reads and never changes."""

    prompts: Prompts
    forced: Array  # int32[Q, R, MAX_FORCED]
    keys: Array  # typed keys [Q, R]


class _State(NamedTuple):
    """What decoding changes. C groups of n slots, B = C*n; L caches, one a layer."""

    tick: Array  # int32[], steps so far; column tick % U of the ring is written next
    waiting: Array  # int32[], the first query that no group has taken
    # Of the groups.
    query: Array  # int32[C]
    next_row: Array  # int32[C], the query's first rollout that no slot has taken
    prefix_len: Array  # int32[C]
    first_logits: Array  # float32[C, V], after the prompt
    prefix: tuple  # of keys and values of the prompts, each [C, K, S, H]
    # Of the slots.
    row: Array  # int32[C, n], which of the query's rollouts; R = none
    step: Array  # int32[C, n], its tokens so far
    logits: Array  # float32[B, V], of its next token, but for the first
    thinks: Array  # bool[C, n]
    closed: Array  # bool[C, n], no thought is open
    suffix: tuple  # of keys and values of the new tokens, each [B, K, U, H]
    # Results.
    tokens: Array  # int32[Q, R, U]
    logps: Array  # float32[Q, R, U]
    lengths: Array  # int32[Q, R]
    mode_logps: Array  # float32[Q, 2]


def _active(state: _State, rollouts: int) -> Array:
    """Slots at work: bool[C, n]."""
    return state.row < rollouts


def _free(state: _State, rollouts: int) -> Array:
    """Groups whose rollouts have all ended: bool[C]."""
    return ~jnp.any(_active(state, rollouts), 1)


def _admitted(state: _State) -> int:
    """How many queries enter at once."""
    return max(1, state.query.shape[0] // ADMIT_SHARE)


def _has_room(state: _State, rollouts: int) -> Array:
    """Whether enough groups are free for queries to enter: bool[]."""
    wanted = jnp.minimum(_admitted(state), state.mode_logps.shape[0] - state.waiting)
    return jnp.sum(_free(state, rollouts)) >= wanted


def _nothing(model: r4b.R4B, work: _Work, ids: Ids, slots, max_new_tokens: int) -> _State:
    """The state before the first query."""
    (groups, rows), (num_queries, rollouts, _) = slots, work.forced.shape
    language, dtype = model.language_model.config, model.language_model.dtype

    def caches(count, length):
        shape = (count, language.num_kv_heads, length, language.head_dim)
        zeros = sharding.constrain(jnp.zeros(shape, dtype), None, "heads", None, None)
        return tuple((zeros, zeros) for _ in range(language.num_layers))

    return _State(
        tick=jnp.int32(0),
        waiting=jnp.int32(0),
        query=jnp.zeros((groups,), jnp.int32),
        next_row=jnp.full((groups,), rollouts, jnp.int32),
        prefix_len=jnp.zeros((groups,), jnp.int32),
        first_logits=jnp.zeros((groups, language.vocab_size), jnp.float32),
        prefix=caches(groups, work.prompts.tokens.shape[1]),
        row=jnp.full((groups, rows), rollouts, jnp.int32),
        step=jnp.zeros((groups, rows), jnp.int32),
        logits=jnp.zeros((groups * rows, language.vocab_size), jnp.float32),
        thinks=jnp.zeros((groups, rows), bool),
        closed=jnp.zeros((groups, rows), bool),
        suffix=caches(groups * rows, max_new_tokens),
        tokens=jnp.full((num_queries, rollouts, max_new_tokens), ids.pad, jnp.int32),
        logps=jnp.zeros((num_queries, rollouts, max_new_tokens), jnp.float32),
        lengths=jnp.zeros((num_queries, rollouts), jnp.int32),
        mode_logps=jnp.zeros((num_queries, 2), jnp.float32),
    )


def _raw(state: _State) -> dict:
    results = {n: getattr(state, n) for n in ("tokens", "logps", "lengths", "mode_logps")}
    slots = jnp.full((1,), state.row.size, jnp.int32)
    return results | {"steps": state.tick[None], "slots": slots}


def _results(raw: dict) -> Generation:
    """What every copy of the parameters gave, together."""
    slot_steps = jnp.maximum(jnp.sum(raw["steps"] * raw.pop("slots")), 1)
    occupancy = jnp.sum(raw["lengths"]) / slot_steps
    return Generation(**raw | {"steps": raw["steps"].max(), "occupancy": occupancy})


def _admit(model: r4b.R4B, ids: Ids, work: _Work, state: _State) -> _State:
    """Waiting queries enter free groups: their prompts are computed, their first rollouts begin."""
    num_queries, rollouts, _ = work.forced.shape
    num_groups, rows = state.row.shape
    count = _admitted(state)
    free = _free(state, rollouts)
    groups = jnp.argsort(~free, stable=True)[:count]
    queries = state.waiting + jnp.arange(count)
    enters = free[groups] & (queries < num_queries)
    groups = jnp.where(enters, groups, num_groups)  # out of range: not written
    queries = jnp.where(enters, queries, num_queries)
    prompts = jax.tree.map(lambda x: x[jnp.minimum(queries, num_queries - 1)], work.prompts)
    prefix, first_logits = _prefill(model, prompts)
    first_logits = ban(first_logits, ids.never)
    mode_logps = jax.nn.log_softmax(first_logits)[:, jnp.array([ids.thinking, ids.direct])]

    def put(old, new):
        return old.at[groups].set(new, mode="drop")

    return state._replace(
        waiting=state.waiting + jnp.sum(enters),
        query=put(state.query, queries),
        next_row=put(state.next_row, rows),
        prefix_len=put(state.prefix_len, prompts.lengths),
        first_logits=put(state.first_logits, first_logits),
        prefix=jax.tree.map(put, state.prefix, prefix),
        row=put(state.row, jnp.arange(rows)),
        step=put(state.step, 0),
        mode_logps=state.mode_logps.at[queries].set(mode_logps, mode="drop"),
    )


def _prefill(model: r4b.R4B, prompts: Prompts):
    """The prompts' keys and values, each [Q, K, S, H], layer by layer, and float32[Q, V] after
    their ends."""
    count, length = prompts.tokens.shape
    real = (jnp.arange(length) < prompts.lengths[:, None]).astype(jnp.int32)
    attend = packed_attention(real, jnp.zeros_like(real))
    hidden, kv = model.language_model(
        model.embed(prompts.tokens, prompts.tiles, prompts.plan),
        jnp.broadcast_to(jnp.arange(length), (count, length)),
        lambda q, k, v: (attend(q, k, v), (k.swapaxes(1, 2), v.swapaxes(1, 2))),
    )
    last = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], 1)[:, 0]
    layers = range(model.language_model.config.num_layers)
    return tuple(tuple(x[i] for x in kv) for i in layers), model.language_model.logits(last)


def _decode_step(model: r4b.R4B, ids: Ids, sampling: Sampling, work: _Work, state: _State):
    """Choose every slot's next token and compute the logits of the one after it; slots whose
    rollout has ended take the next one of their query."""
    rollouts, longest = work.forced.shape[1], state.tokens.shape[2]
    active, step = _active(state, rollouts), state.step
    token, logp, thinks, closed = _choose(ids, sampling, work, state)
    limit = jnp.where(thinks, longest, jnp.minimum(sampling.max_direct_tokens, longest))
    ended = (token == ids.end) | (step + 1 >= limit)
    at = (jnp.broadcast_to(state.query[:, None], state.row.shape), state.row)  # R: not written
    hidden, suffix = model.language_model.step(
        model.language_model.embed(token.reshape(-1, 1)),
        (state.prefix_len[:, None] + step).reshape(-1, 1),
        functools.partial(_attend_and_keep, state),
        tuple(zip(state.prefix, state.suffix)),
    )
    # The table stays split; its logits are small, and a draw needs all of a row's.
    logits = sharding.constrain(model.language_model.logits(hidden[:, 0]), "rows", "vocab")
    # Who enters: the k-th free slot of a group takes the query's k-th rollout that waits.
    free = ended | ~active
    entering = state.next_row[:, None] + jnp.cumsum(free, 1) - 1
    return state._replace(
        tick=state.tick + 1,
        next_row=jnp.minimum(state.next_row + jnp.sum(free, 1), rollouts),
        row=jnp.where(free, jnp.minimum(entering, rollouts), state.row),
        step=jnp.where(free, 0, step + 1),
        logits=ban(sharding.constrain(logits, "rows", None), ids.never),
        thinks=thinks,
        closed=closed,
        suffix=suffix,
        tokens=state.tokens.at[*at, step].set(token, mode="drop"),
        logps=state.logps.at[*at, step].set(logp, mode="drop"),
        lengths=state.lengths.at[at].set(step + 1, mode="drop"),
    )


def _choose(ids: Ids, sampling: Sampling, work: _Work, state: _State):
    """The next token of every slot: tokens, their log-probabilities, whether the rollout thinks
    and whether its thought is closed, each [C, n]."""
    step, shape = state.step, state.row.shape
    first = (step == 0).reshape(-1)
    logits = jnp.where(first[:, None], jnp.repeat(state.first_logits, shape[1], 0), state.logits)
    at = (state.query[:, None], jnp.minimum(state.row, work.forced.shape[1] - 1))
    keys = jax.vmap(jax.random.fold_in)(work.keys[at].reshape(-1), step.reshape(-1))
    bias = jnp.where(first, sampling.think_bias, 0.0)
    sampled, logp = choose(logits.at[:, ids.thinking].add(bias), keys, sampling)
    # Three cases: the mode forces a token, the thought has used up its tokens and is closed, else
    # the sampled one.
    forced = jnp.take_along_axis(work.forced[at], jnp.minimum(step, MAX_FORCED - 1)[..., None], -1)[
        ..., 0
    ]
    forced = jnp.where(step < MAX_FORCED, forced, -1)
    closed = state.closed & (step > 0)
    must = jnp.where(~closed & (step >= sampling.max_think_tokens), ids.end_think, forced)
    token = jnp.where(must >= 0, must, sampled.reshape(shape))
    forced_logp = jax.lax.cond(
        jnp.any(must >= 0),
        lambda: logp_of(logits, jnp.maximum(must, 0).reshape(-1)).reshape(shape),
        lambda: jnp.zeros(shape),
    )
    logp = jnp.where(must >= 0, forced_logp, logp.reshape(shape))
    thinks = jnp.where(step == 0, token == ids.thinking, state.thinks)
    return token, logp, thinks, closed | (token == ids.end_think) | ~thinks


def _attend_and_keep(state: _State, q: Array, k: Array, v: Array, cache):
    """A layer's attention in a decoding step; its keys and values go into the ring first."""
    prefix, suffix = cache
    length = suffix[0].shape[2]
    column = state.tick % length
    suffix = tuple(
        jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2), (0, 0, column, 0))
        for old, new in zip(suffix, (k, v))
    )
    age = (column - jnp.arange(length)) % length
    prefix_mask = jnp.arange(prefix[0].shape[2]) < state.prefix_len[:, None]
    suffix_mask = age <= state.step.reshape(-1, 1)
    return attend_shared_prefix(q, prefix, suffix, prefix_mask, suffix_mask), suffix
