"""Checkpoints in and out of Hugging Face's format.

    python -m r4b_jax.convert import R-4B/ checkpoint/          the released model
    python -m r4b_jax.convert import Qwen3-4B/ siglip2/ parts/  its parts, to start stage 1 from
    python -m r4b_jax.convert export checkpoint/ out/           back, for vLLM and transformers
    python -m r4b_jax.convert export runs/tiny-seed0/bpo out/   what a run has trained
    python -m r4b_jax.convert check R-4B/ --image chart.png     both sides' logits compared

import goes shard by shard, spread over all devices there are; host memory holds one tensor.
"""

import argparse
import os
import sys
import tempfile

TOLERANCE = 1e-4
QUESTION = "What is shown in the picture?"


def import_command(args):
    from r4b_jax.common.checkpoint import MODEL_FILE, ORIGINALS, save_model
    from r4b_jax.common.sharding import placement, training_mesh
    from r4b_jax.config import MeshConfig
    from r4b_jax.data.conversation import OWN_TEMPLATE
    from r4b_jax.models import released
    from r4b_jax.models.layers import logical_axes

    _expect_new(args.target)
    folders = [released.read_folder(source) for source in args.sources]
    config, parts = released.describe(folders)
    where = placement(logical_axes, training_mesh(MeshConfig()))
    params, spare = released.load_params(folders, config, parts, sharding=where, seed=args.seed)
    os.makedirs(args.target, exist_ok=True)
    side = os.path.join(args.target, ORIGINALS)
    released.keep_originals(folders, config, spare, side, OWN_TEMPLATE)
    save_model(args.target, config, params)
    missing = sorted(released.ALL_PARTS - parts)
    note = f"; {', '.join(missing)} start random (seed {args.seed})" if missing else ""
    print(f"{os.path.join(args.target, MODEL_FILE)} and params/ written{note}")


def export_command(args):
    _expect_new(args.target)
    _export(args.source, args.target)
    print(f"{args.target} written")


def _expect_new(target: str):
    from r4b_jax.models.convert import CheckpointError

    if os.path.exists(target) and os.listdir(target):
        raise CheckpointError(f"{target} is not empty: choose another folder")


def _export(source: str, target: str):
    """A converted checkpoint, or a stage of a run, as a Hugging Face folder."""
    from r4b_jax.common.checkpoint import MODEL_FILE, ORIGINALS, restore_model
    from r4b_jax.data.conversation import OWN_TEMPLATE
    from r4b_jax.decoding.chat import load, run_of
    from r4b_jax.models import released

    if os.path.exists(os.path.join(source, MODEL_FILE)):
        config, params = restore_model(source)
        released.write_folder(params, config, os.path.join(source, ORIGINALS), target)
        return
    model = load(source)
    if start := run_of(source).init_from:  # as the checkpoint it began from
        side = os.path.join(start, ORIGINALS)
        released.write_folder(model.params, model.config, side, target)
        return
    with tempfile.TemporaryDirectory() as side:
        tokenizer = model.tokenizer
        released.write_side_files(
            side, model.config, tokenizer.json, tokenizer.image_id, OWN_TEMPLATE
        )
        released.write_folder(model.params, model.config, side, target)


def check_command(args):
    from r4b_jax.common.checkpoint import MODEL_FILE
    from r4b_jax.decoding.chat import is_stage
    from r4b_jax.decoding.parity import compare

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder
        if os.path.exists(os.path.join(folder, MODEL_FILE)) or is_stage(folder):
            _export(folder, scratch)
            folder = scratch
        worst = max(compare(folder, image, args.question) for image in args.image)
    print(f"largest relative difference of logits: {worst:.2e} (tolerance {TOLERANCE:.0e})")
    if not worst <= TOLERANCE:
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m r4b_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="import|export|check")
    one = commands.add_parser("import", help="Hugging Face folder(s) -> checkpoint")
    one.add_argument("sources", nargs="+", help="one whole model, or Qwen3 and SigLIP folders")
    one.add_argument("target", help="a new folder")
    one.add_argument("--seed", type=int, default=0, help="of the parts that no folder holds")
    one.set_defaults(run=import_command)
    two = commands.add_parser("export", help="checkpoint or stage of a run -> Hugging Face folder")
    two.add_argument("source")
    two.add_argument("target", help="a new folder")
    two.set_defaults(run=export_command)
    three = commands.add_parser("check", help="compare logits with transformers (needs torch)")
    three.add_argument("folder")
    three.add_argument("--image", action="append", required=True, help="may be given several times")
    three.add_argument("--question", default=QUESTION)
    three.set_defaults(run=check_command)
    return top


def main():
    args = parser().parse_args()
    try:
        args.run(args)
    except ValueError as error:  # the package's own errors, and a template that cannot be rendered
        print(f"r4b_jax: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
