"""W1, rollouts, with transformers' generate."""

import hf_models
import measure
import sizes
import torch


def sampling(new_tokens: int) -> dict:
    """Plain sampling at temperature 1, without an early end."""
    return dict(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=sizes.PAD,
    )


@torch.no_grad()
def generate(model, prompts: dict, samples: int, new_tokens: int):
    """As users call it: every sample has its own copy of the prompt, computed anew."""
    return model.generate(**prompts, num_return_sequences=samples, **sampling(new_tokens))


@torch.no_grad()
def shared(model, prompts: dict, samples: int, new_tokens: int):
    """By hand: each prompt is computed once, then its keys and values are copied per sample.
    generate wants to compute at least one token itself: the prompt's last."""
    cache = model(**prompts, use_cache=True, logits_to_keep=1).past_key_values
    cache.crop(-1)
    cache.batch_repeat_interleave(samples)
    ids = prompts["input_ids"].repeat_interleave(samples, 0)
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        **sampling(new_tokens),
    )


def main():
    p = measure.parser(__doc__)
    p.add_argument(
        "--mode",
        choices=("generate", "shared"),
        default="generate",
        help="generate: num_return_sequences, as users call it; "
        "shared: the prompts computed once by hand, their cache copied for each sample",
    )
    p.add_argument(
        "--warm-up-tokens",
        type=int,
        default=sizes.NEW_TOKENS,
        help="tokens of the warm-up's answers; after a short one the first repeat is much slower",
    )
    args = p.parse_args()
    work = dict(generate=generate, shared=shared)[args.mode]
    model = hf_models.build(args.model).eval()
    prompts = hf_models.prompts(args.model, args.prompts, args.prompt_length)

    work(model, prompts, args.samples, args.warm_up_tokens)
    expected = args.prompts * args.samples, args.prompt_length + args.new_tokens

    def run(_: int):
        out = work(model, prompts, args.samples, args.new_tokens)
        assert out.shape == expected, out.shape

    clocks = measure.repeat(run, args.repeats)
    measure.report(
        args,
        "W1",
        [c.cpu for c in clocks],
        [c.wall for c in clocks],
        ("torch", "transformers"),
        peer="transformers",
        mode=args.mode,
        warm_up_tokens=args.warm_up_tokens,
    )


if __name__ == "__main__":
    main()
