"""The axis legend and the arrays that cross boundaries.

Axes, in comments, einsums and names everywhere: B batch (packed rows), T query positions, S key
positions, N query heads, K key-value heads, G query heads a key-value head, H head width, D model
width, F feed-forward, V vocabulary, I tiles a row, P patches a tile, R rollouts a query, Q
queries, L layers.
"""

import dataclasses

import jax

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImagePlan:
    """Which image features each token of a row mixes (worked out on the host, see data/images.py).

    Rows 0 .. I*P-1 of a packed row's feature table are its patches, row I*P is the learned
    newline. Text tokens have weight 0 throughout.
    """

    index: Array  # int32[B, T, 4]
    weight: Array  # float32[B, T, 4]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed sequences: the one input of the model, in every stage.

    A row holds several segments; a segment may hold a prefix (branch 0) and branches 1, 2, ...
    that share it. A token sees the earlier tokens of its own segment that are in the prefix or in
    its own branch.
    """

    tokens: Array  # int32[B, T]
    positions: Array  # int32[B, T], restart in each segment; in a branch they go on from the prefix
    segment_ids: Array  # int32[B, T], 1, 2, ...; 0 = padding
    branch_ids: Array  # int32[B, T], 0 = shared by the whole segment
    loss_weights: Array  # float32[B, T], weight of predicting this token from those it sees
    predecessors: (
        Array  # int32[B, T], place of the token that predicts this one (its left neighbour in a
    )
    # plain sequence; the prefix's last token for the first token of a branch)
    tiles: Array  # uint8[B, I, image_size, image_size, 3]
    plan: ImagePlan
