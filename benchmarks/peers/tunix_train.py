"""W3, one supervised step, with tunix's PeftTrainer, all parameters trained."""
# ruff: noqa: E402

import os

import measure

os.environ.setdefault("JAX_PLATFORMS", "cpu")
measure.one_core()  # before jax is imported, which starts as many threads as it has cores

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sizes
import tunix_models
from flax import nnx
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput


def batch_of(args) -> TrainingInput:
    """Rows of random tokens; the mask leaves the first token of each document out of the loss."""
    shape = (args.rows, args.row_length)
    mask = np.ones(shape, np.int32)
    mask[:, :: measure.document_length(args)] = 0
    ids = np.random.default_rng(0).integers(*sizes.WORDS, shape, dtype=np.int32)
    return TrainingInput(input_tokens=ids, input_mask=mask)


def build_trainer(args) -> PeftTrainer:
    """The trainer refuses to pack by itself, but takes the positions and the mask that do."""
    length, shape = measure.document_length(args), (args.rows, args.row_length)
    place = np.arange(args.row_length)
    seen = place[:, None] >= place
    seen &= (place // length)[:, None] == place // length
    adamw = optax.adamw(sizes.LEARNING_RATE)
    optimizer = optax.chain(optax.clip_by_global_norm(sizes.CLIP_NORM), adamw)
    trainer = PeftTrainer(tunix_models.build(), optimizer, TrainingConfig(eval_every_n_steps=10**6))
    trainer.is_managed_externally = True  # or it would close itself after the first batch
    return trainer.with_gen_model_input_fn(
        lambda batch: dict(
            input_tokens=batch.input_tokens,
            input_mask=batch.input_mask,
            positions=jnp.broadcast_to(place % length, shape),
            attention_mask=jnp.broadcast_to(seen, (args.rows, *seen.shape)),
        )
    )


def main():
    args = measure.parser(__doc__, models=("m2",), work=measure.ROWS).parse_args()
    trainer, batch = build_trainer(args), batch_of(args)

    def step(_: int):
        trainer.train([batch])
        jax.block_until_ready(nnx.state(trainer.model))

    warm_up, *clocks = measure.repeat(step, args.repeats + 1)
    measure.report(
        args,
        "W3",
        [c.cpu for c in clocks],
        [c.wall for c in clocks],
        ("jax", "jaxlib", "flax", "optax", "google-tunix"),
        peer="tunix",
        warm_up_cpu_s=round(warm_up.cpu, 3),
        loss_tokens=int(batch.input_mask.sum()),
    )


if __name__ == "__main__":
    main()
