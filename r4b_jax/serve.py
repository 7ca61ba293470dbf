"""Serve a model: an OpenAI-compatible API, and a page to try it on.

    python -m r4b_jax.serve CHECKPOINT                    http://127.0.0.1:8000 and .../v1
    R4B_API_KEY=... python -m r4b_jax.serve CHECKPOINT --host 0.0.0.0 --slots 32

CHECKPOINT is a Hugging Face folder, what `python -m r4b_jax.convert import` wrote, or a stage of a
run. A request may say `"chat_template_kwargs": {"thinking_mode": "auto"}` (or long, short), and
there or at the top `think_bias` and `max_think_tokens`; `separate_reasoning: false` puts the
thought into the content. Ctrl-C or SIGTERM finishes what was taken and exits with 0 (1 if that
took longer than --grace); a second one ends at once.
"""

import argparse
import os
import sys

KEY = "R4B_API_KEY"
MIB = 2**20


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m r4b_jax.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("checkpoint")
    add = out.add_argument_group("where").add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0 = reachable by others: set a key")
    add("--port", type=int, default=8000, help="0 = any that is free")
    add("--api-key", help=f"clients must send it; better in the environment, as {KEY}")
    add("--name", default="r4b", help="of the model, in requests")
    add = out.add_argument_group("how much").add_argument
    add("--slots", type=int, default=16, help="requests at work at once (16)")
    add("--max-prompt-tokens", type=int, default=8192, help="pictures included (8192)")
    add("--max-new-tokens", type=int, default=8192, help="of a reply, thought included (8192)")
    add("--queue", type=int, default=64, help="requests that may wait; others get 429 (64)")
    add("--max-images", type=int, default=32, help="of a request (32)")
    add("--max-image-mb", type=float, default=20, help="of a picture as it is sent (20)")
    add("--max-image-megapixels", type=float, default=50, help="of a picture (50)")
    add("--max-body-mb", type=float, default=64, help="of a request (64)")
    add(
        "--narrow", type=int, default=8, help="while few ask, 1/8 of the slots is computed; 1 = all"
    )
    add("--grace", type=float, default=60, help="seconds to finish after SIGTERM (60)")
    add = out.add_argument_group("where a request does not say").add_argument
    modes = ("auto", "thinking", "long", "non-thinking", "short")
    add("--mode", default="auto", choices=modes)
    add("--think-bias", type=float, help="default: the checkpoint's calibrated one, else 0")
    add("--max-think-tokens", type=int, help="close a thought after so many, and answer")
    add("--temperature", type=float, default=0.0, help="0 = greedy (0)")
    add("--inline-thoughts", action="store_true", help="<think>...</think> within the content")
    add = out.add_argument_group("else").add_argument
    add(
        "--allow-images-from",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch pictures by http(s) from there; may be given several times; * = any host, "
        "your own network included",
    )
    add("--dtype", help="of the computation: float32, bfloat16; default the weights' own")
    add("--compilation-cache", metavar="FOLDER", help="keep compiled programs for the next start")
    return out


def options_of(args):
    """The server's options. Raises ValueError for one out of its range."""
    from r4b_jax.serving.api import Options

    least = {
        "slots": 1,
        "narrow": 1,
        "max_prompt_tokens": 8,
        "max_new_tokens": 1,
        "max_think_tokens": 1,
    }
    least |= {"queue": 0, "max_images": 0, "temperature": 0, "grace": 0}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not value >= low:
            raise ValueError(f"--{name.replace('_', '-')} is at least {low}")
    return Options(
        name=args.name,
        mode=args.mode,
        think_bias=args.think_bias,
        max_think_tokens=args.max_think_tokens,
        temperature=args.temperature,
        inline_thoughts=args.inline_thoughts,
        api_key=args.api_key or os.environ.get(KEY, ""),
        queue=args.queue,
        max_body=int(args.max_body_mb * MIB),
        max_images=args.max_images,
        max_image_bytes=int(args.max_image_mb * MIB),
        max_image_pixels=int(args.max_image_megapixels * 1e6),
        image_hosts=tuple(args.allow_images_from),
    )


def engine_of(model, args):
    """The engine, warmed up with a question and a question about a picture."""
    import numpy as np

    from r4b_jax.serving.engine import Engine

    limit = model.limit - 1
    sizes = min(args.max_prompt_tokens, limit), min(args.max_new_tokens, limit)
    engine = Engine(model, args.slots, *sizes, args.narrow)
    size = engine.cache_bytes / 2**30
    what = f"{args.slots} slots of {sizes[0]} + {sizes[1]} tokens ({size:.2f} GiB)"
    print(f"r4b_jax: {what}, compiling", flush=True)
    side = model.config.vision.image_size
    shown = [[], [np.full((side, side, 3), 128, np.uint8)]]
    examples = [model.prompt([("What is shown?", pictures, None)]) for pictures in shown]
    engine.warm_up(*(x for x in examples if len(x.tokens) <= sizes[0]))
    return engine


def main():
    args = parser().parse_args()
    import jax

    from r4b_jax.decoding.chat import load

    if args.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", args.compilation_cache)
    try:
        options = options_of(args)
        model = load(args.checkpoint, args.dtype)
    except ValueError as error:
        print(f"r4b_jax: {error}", file=sys.stderr)
        sys.exit(2)
    from r4b_jax.serving.server import serve

    if not options.api_key and args.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"r4b_jax: anyone who reaches {args.host} may ask: no key is set", file=sys.stderr)
    sys.exit(serve(engine_of(model, args), options, args.host, args.port, args.grace))


if __name__ == "__main__":
    main()
