"""The vocabulary's two ends: rows of the table, and log-probabilities against it.

On a mesh each device holds some rows of the table, and the table is never gathered: at full size it
would be 0.7 GiB, its gradient 1.5 GiB. Ids, or the hidden states of a chunk of tokens, travel
instead; each device looks up, or scores, what its rows hold, and the parts are summed where the
tokens are.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from r4b_jax.common import sharding
from r4b_jax.common.arrays import Array
from r4b_jax.common.sharding import DATA, FSDP, ROWS, TENSOR
from r4b_jax.models.attention import NEG_INF

TAKE_CHUNK = 1024  # places of a row whose embeddings for all devices exist at once
SPLIT = (FSDP, TENSOR)  # the table's rows


def ban(logits: Array, never: tuple[int, ...]) -> Array:
    """Logits [..., V] with the ids of `never` put out of reach. The trainer bans the same ids as
    the sampler, so both mean the same distribution."""
    return logits.at[..., jnp.array(never, jnp.int32)].set(NEG_INF) if never else logits


def logp_of(logits: Array, tokens: Array) -> Array:
    """log softmax(logits)[tokens]: float32[..., V], int32[...] -> float32[...]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, -1)


def scores(hidden: Array, table: Array) -> Array:
    """[..., D] against [V, D]: float32[..., V]."""
    table = table.astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def take(table: Array, tokens: Array, dtype) -> Array:
    """Rows of a table: float32[V, D], int32[B, T] -> dtype[B, T, D].

    Taken, then cast: the gradient of a frequent token is a sum that bfloat16 cannot hold.
    """
    mesh = sharding.active(ROWS, SPLIT)
    rows, columns = PartitionSpec(ROWS), PartitionSpec(SPLIT)
    if mesh is None or not sharding.divides(mesh, (ROWS, tokens), (SPLIT, table)):
        return table[tokens].astype(dtype)

    def local(table, tokens):
        table = jax.lax.pcast(table, DATA, to="varying")  # its gradient is summed once, at the end
        everyone = jax.lax.all_gather(tokens, FSDP, axis=0, tiled=True)

        @jax.checkpoint
        def one_chunk(tokens):
            own, mine = _own(table, tokens)
            found = jnp.where(mine[..., None], table[own], 0).astype(dtype)
            found = jax.lax.psum_scatter(found, FSDP, scatter_dimension=0, tiled=True)
            return jax.lax.psum(found, TENSOR)

        batch, length = everyone.shape
        chunk = min(TAKE_CHUNK, length)
        padded = jnp.pad(everyone, ((0, 0), (0, -length % chunk)))
        found = jax.lax.map(one_chunk, padded.reshape(batch, -1, chunk).swapaxes(0, 1))
        return found.swapaxes(0, 1).reshape(tokens.shape[0], -1, table.shape[1])[:, :length]

    return jax.shard_map(local, in_specs=(columns, rows), out_specs=rows)(table, tokens)


def chunked_logps(hidden, table, targets, needed, chunk: int, never: tuple[int, ...]) -> Array:
    """log softmax(hidden table^T)[targets] where it is needed.

    Logits exist for `chunk` tokens of a device at a time and are recomputed in the backward pass;
    chunks in which no device needs any are skipped.

    Args:
      hidden: [B, T, D]; table: [V, D]; targets: int32[B, T]; needed: bool[B, T].
      never: ids that are no choice.
    Returns:
      float32[B, T]; 0 or a meaningless number where it is not needed.
    """
    mesh = sharding.active(ROWS, SPLIT)
    if mesh is None or not sharding.divides(mesh, (ROWS, targets)):
        return _in_chunks(hidden, table, targets, needed, chunk, never, split=False)
    rows, split = PartitionSpec(ROWS), sharding.divides(mesh, (SPLIT, table))

    def local(hidden, targets, needed, table):
        # The table's gradient is summed over copies once, at the end: inside, those that skip a
        # chunk and those that do not would wait for each other.
        table = jax.lax.pcast(table, DATA if split else ROWS, to="varying")
        return _in_chunks(hidden, table, targets, needed, chunk, never, split=split)

    specs = (rows, rows, rows, PartitionSpec(SPLIT if split else None))
    return jax.shard_map(local, in_specs=specs, out_specs=rows)(hidden, targets, needed, table)


def _in_chunks(hidden, table, targets, needed, chunk: int, never, *, split: bool) -> Array:
    """`chunked_logps` of one device's rows; `split`: the table is its own part of the whole."""
    shape, logps_of = targets.shape, _split_logps if split else _logps
    # Places that are needed first: of a picture's thousands of tokens none is.
    order = jnp.argsort(~needed.reshape(-1), stable=True)
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    count = targets.shape[0]
    chunk = min(chunk, count)
    padding = -count % chunk

    def chunks(x):
        x = jnp.pad(jnp.asarray(x)[order], [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, chunk, *x.shape[1:])

    @jax.checkpoint  # around the cond: inside it, the head would be kept once a chunk
    def one_chunk(args):
        hidden, targets, needed = args
        anyone = jnp.any(needed)
        if split:  # who needs none of its own helps the others
            anyone = jax.lax.pmax(anyone.astype(jnp.int32), SPLIT) > 0
        return jax.lax.cond(
            anyone,
            lambda: logps_of(hidden, table, targets, never),
            lambda: 0.0 * hidden[:, 0].astype(jnp.float32),
        )

    logps = jax.lax.map(one_chunk, (chunks(hidden), chunks(targets), chunks(needed.reshape(-1))))
    logps = jnp.zeros((count,), jnp.float32).at[order].set(logps.reshape(-1)[:count])
    return logps.reshape(shape)


def _logps(hidden: Array, table: Array, targets: Array, never) -> Array:
    """[n, D], [V, D], int32[n] -> float32[n]."""
    return logp_of(ban(scores(hidden, table), never), targets)


def _split_logps(hidden: Array, table: Array, targets: Array, never) -> Array:
    """The same where each device has n tokens and its own rows of the table."""
    hidden = jax.lax.all_gather(hidden, FSDP, axis=0, tiled=True)
    everyone = jax.lax.all_gather(targets, FSDP, axis=0, tiled=True)
    logits = scores(hidden, table)
    if never:
        own, mine = _own(table, jnp.array(never, jnp.int32))
        logits = logits.at[:, jnp.where(mine, own, logits.shape[1])].set(NEG_INF, mode="drop")
    top = jax.lax.pmax(jax.lax.stop_gradient(logits.max(-1)), SPLIT)
    total = jnp.exp(logits - top[:, None]).sum(-1)
    own, mine = _own(table, everyone)
    chosen = jnp.take_along_axis(logits, own[:, None], 1)[:, 0] - top
    total, chosen = (
        jax.lax.psum(jax.lax.psum_scatter(x, FSDP, scatter_dimension=0, tiled=True), TENSOR)
        for x in (total, jnp.where(mine, chosen, 0))
    )
    return chosen - jnp.log(total)


def _own(table: Array, ids: Array) -> tuple[Array, Array]:
    """Where this device's rows hold ids: the places (0 where they do not), and whether."""
    place = ids - jax.lax.axis_index(SPLIT) * table.shape[0]
    mine = (place >= 0) & (place < table.shape[0])
    return jnp.where(mine, place, 0), mine
