"""W1, rollouts, with tunix's own sampler."""
# ruff: noqa: E402

import os

import measure

os.environ.setdefault("JAX_PLATFORMS", "cpu")
measure.one_core()  # before jax is imported, which starts as many threads as it has cores

import sizes
import tunix_models
from tunix.generate.sampler import CacheConfig, Sampler


def build_sampler(args) -> Sampler:
    cache = CacheConfig(
        cache_size=args.prompt_length + args.new_tokens,
        num_layers=sizes.TEXT["num_hidden_layers"],
        num_kv_heads=sizes.TEXT["num_key_value_heads"],
        head_dim=sizes.TEXT["head_dim"],
    )
    return Sampler(tunix_models.build(), tunix_models.Tokenizer(), cache)


def rollouts(sampler: Sampler, prompts: list[str], args, seed: int):
    """All sequences in one batch; without top_p, the sampler would be greedy."""
    out = sampler(
        prompts,
        max_generation_steps=args.new_tokens,
        max_prompt_length=args.prompt_length,
        temperature=1.0,
        top_p=1.0,
        seed=seed,
        forbidden_tokens=(sizes.PAD, sizes.EOS),
    )
    assert all(len(tokens) == args.new_tokens for tokens in out.tokens)


def main():
    args = measure.parser(__doc__, models=("m2",)).parse_args()
    sampler = build_sampler(args)
    prompts = tunix_models.prompts(args.prompts, args.prompt_length)
    prompts = [p for p in prompts for _ in range(args.samples)]

    warm_up, *clocks = measure.repeat(
        lambda number: rollouts(sampler, prompts, args, seed=number), args.repeats + 1
    )
    measure.report(
        args,
        "W1",
        [c.cpu for c in clocks],
        [c.wall for c in clocks],
        ("jax", "jaxlib", "flax", "google-tunix"),
        peer="tunix",
        warm_up_cpu_s=round(warm_up.cpu, 3),
    )


if __name__ == "__main__":
    main()
