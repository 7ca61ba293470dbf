"""Token log-probabilities without tokens x vocabulary, and the supervised loss as (sum, weight)."""

import jax
import jax.numpy as jnp

from r4b_jax.common.arrays import Array, Batch
from r4b_jax.models.r4b import R4B
from r4b_jax.models.vocabulary import chunked_logps


def token_logps(model: R4B, batch: Batch, chunk: int, never: tuple[int, ...] = ()) -> Array:
    """log p(token | what it sees) for the places of packed rows that carry loss.

    Args:
      chunk: tokens whose logits exist at once, on a device.
      never: ids the sampler could not produce, banned here too (rollouts); () in supervised
        training.
    Returns:
      float32[B, T]; places of no weight hold 0 or a meaningless number.
    """
    hidden = model.hidden(batch)
    hidden = jnp.take_along_axis(hidden, batch.predecessors[..., None], 1)
    needed, head = batch.loss_weights > 0, model.language_model.head
    return chunked_logps(hidden, head, batch.tokens, needed, chunk, never)


def supervised_loss(model: R4B, batch: Batch, chunk: int) -> tuple[Array, Array]:
    """Weighted negative log-likelihood of the batch: (sum, weight), float32 scalars."""
    logps = token_logps(model, batch, chunk)
    return -jnp.sum(logps * batch.loss_weights), jnp.sum(batch.loss_weights)


def caption_words_loss(model: R4B, batch: Batch) -> tuple[Array, Array]:
    """How well a picture as a whole names the words of its caption: (sum, pictures), float32
    scalars.

    Classification of caption tokens (SuperClass, arXiv 2411.03313, section 3): the cross-entropy of
    a softmax over the vocabulary against the caption's token counts, each times its inverse
    document frequency log(rows / rows that have it), normalised. The features are the mean of the
    projected patches, the classifier is the language model's norm and head.

    Args:
      batch: one picture and its caption a row.
    """
    rows = batch.tokens.shape[0]
    counts = jnp.zeros((rows, model.language_model.config.vocab_size))
    counts = counts.at[jnp.arange(rows)[:, None], batch.tokens].add(batch.loss_weights > 0)
    documents = jnp.maximum(jnp.sum(counts > 0, 0), 1)
    target = counts * jnp.log(rows / documents)
    target /= jnp.maximum(jnp.sum(target, -1, keepdims=True), 1e-6)
    features = jnp.mean(model.image_features(batch.tiles)[:, :-1], 1)
    logps = jax.nn.log_softmax(model.language_model.logits(model.language_model.norm(features)))
    return -jnp.sum(target * logps), jnp.float32(rows)
