"""W3, one supervised step, with transformers' model and its own loss."""

import hf_models
import measure
import sizes
import torch

IGNORED = -100  # as a label: no loss here


def batch_of(args) -> dict:
    """Rows of random tokens, as the model takes them. Documents of a packed row are told apart by
    positions that begin anew and by the absence of a mask, as transformers' packing collator does
    it; the first token of a document is no label."""
    length = measure.document_length(args)
    generator = torch.Generator().manual_seed(1)
    shape = (args.rows, args.row_length)
    ids = torch.randint(*sizes.WORDS, shape, generator=generator)
    batch = {}
    if args.model == "m1":
        batch = hf_models.prompts(args.model, args.rows, sizes.PROMPT_LENGTH)
        ids[:, : sizes.PROMPT_LENGTH] = batch["input_ids"]
    labels = ids.masked_fill(ids == sizes.IMAGE_TOKEN, IGNORED)
    labels[:, ::length] = IGNORED
    batch |= dict(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids))
    if args.documents > 1:
        del batch["attention_mask"]
        batch["position_ids"] = (torch.arange(args.row_length) % length).expand(shape)
    return batch


def step(model, optimizer, batch: dict):
    """Forward, backward, clipping, AdamW."""
    model(**batch, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), sizes.CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()


def main():
    args = measure.parser(__doc__, work=measure.ROWS).parse_args()
    model = hf_models.build(args.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.LEARNING_RATE)
    batch = batch_of(args)

    step(model, optimizer, batch)  # warm-up
    clocks = measure.repeat(lambda _: step(model, optimizer, batch), args.repeats)
    measure.report(
        args,
        "W3",
        [c.cpu for c in clocks],
        [c.wall for c in clocks],
        ("torch", "transformers"),
        peer="transformers",
        loss_tokens=int((batch["labels"] != IGNORED).sum()),
    )


if __name__ == "__main__":
    main()
