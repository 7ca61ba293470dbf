"""Run benchmarks on a model in its three modes, and compare with the paper.

    python -m r4b_jax.evaluate R-4B/ --benchmarks=all --out=runs/r4b
    python -m r4b_jax.evaluate checkpoint/ --benchmarks=mmstar,mathvista_mini \\
        --modes=auto,thinking --limit=100 --max-new-tokens=2048 --out=runs/look

CHECKPOINT is a Hugging Face folder, what `python -m r4b_jax.convert import` wrote, or a stage of a
run. Tables are VLMEvalKit's TSV files, in --data, $LMUData or ~/LMUData; nothing is downloaded.
Records, prediction files that VLMEvalKit scores again, and report.md, report.html and report.json
come to --out; the same command again goes on where it was stopped, by whatever signal. Another
profile or judge scores the same records anew.
"""

import argparse
import contextlib
import math
import os
import re
import sys


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m r4b_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("checkpoint")
    add = out.add_argument_group("what").add_argument
    add("--benchmarks", default="all", help="names, or VLMEvalKit's, with commas between (all)")
    add("--modes", default="auto,thinking,non-thinking", help="long and short: other names")
    add("--profile", default="aug2025", help="VLMEvalKit's rules: aug2025 (the paper's) or head")
    add("--data", help="folder of the tables (LMUData)")
    add("--any-file", action="store_true", help="take tables of any md5; scores do not compare")
    add("--limit", type=int, default=0, help="only the first N queries of each")
    add("--out", required=True, help="folder for all that is written")
    add("--name", help="of the model, in reports and files (the checkpoint's folder)")
    add = out.add_argument_group("how").add_argument
    add("--max-new-tokens", type=int, default=8192, help="of a reply, thought included (8192)")
    add("--max-prompt-tokens", type=int, default=16384, help="longer ones are set aside (16384)")
    add("--think-bias", type=float, help="of auto mode; default: the checkpoint's, else 0")
    add("--dtype", help="of the computation: float32, bfloat16; default the weights' own")
    add("--batch-size", type=int, default=64, help="queries given to the devices at once (64)")
    add("--slots", type=int, default=64, help="of them at work at once, at most (64)")
    add("--tensor", type=int, default=1, help="devices that hold one copy of the model (1)")
    add("--compilation-cache", metavar="FOLDER", help="keep compiled programs for the next start")
    add = out.add_argument_group("the judge, an OpenAI-compatible server").add_argument
    add("--judge-url", default="", help="such as http://localhost:8000/v1; without: rules alone")
    add("--judge-model", default="", help="its name there")
    add("--judge-key-variable", default="OPENAI_API_KEY", help="environment variable of the key")
    add("--judge-concurrency", type=int, default=16)
    add("--judge-max-tokens", type=int, default=4096)
    add("--vlmevalkit", default="", help="a checkout, for its wording of the judge's questions")
    return out


def names_of(text: str) -> list[str]:
    """Names of benchmarks. Raises ConfigError for one that there is not."""
    import difflib

    from r4b_jax.config import ConfigError
    from r4b_jax.evaluation.benchmarks import BENCHMARKS, PAPER_ROWS

    known = {benchmark.dataset.lower(): name for name, benchmark in BENCHMARKS.items()}
    known |= {name: name for name in BENCHMARKS}
    found: list[str] = []
    for part in (part.strip().lower() for part in text.split(",")):
        if part == "all":
            found += [name for names in PAPER_ROWS.values() for name in names]
        elif part in known:
            found.append(known[part])
        else:
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.4) or ["all"]
            raise ConfigError(f"there is no benchmark {part!r}; did you mean {near[0]}?")
    return list(dict.fromkeys(found))


def check(args) -> tuple[list[str], tuple[str, ...]]:
    """(benchmarks, modes). Raises ConfigError for what cannot be right."""
    from r4b_jax.config import ConfigError
    from r4b_jax.data.dialogue import MODES
    from r4b_jax.evaluation.scoring.contract import PROFILES

    least = {"limit": 0, "max_new_tokens": 3, "max_prompt_tokens": 8, "batch_size": 1, "slots": 1}
    for name, low in (least | {"tensor": 1, "judge_concurrency": 1}).items():
        if getattr(args, name) < low:
            raise ConfigError(f"--{name.replace('_', '-')} is at least {low}")
    if args.profile not in PROFILES:
        raise ConfigError(f"--profile is one of {', '.join(PROFILES)}, not {args.profile!r}")
    if args.think_bias is not None and not math.isfinite(args.think_bias):
        raise ConfigError("--think-bias is finite: modes are asked for with --modes")
    if bool(args.judge_url) != bool(args.judge_model):
        raise ConfigError("--judge-url and --judge-model go together")
    other = {"long": "thinking", "short": "non-thinking"}
    asked = [other.get(mode, mode) for mode in args.modes.split(",")]
    if unknown := [mode for mode in asked if mode not in MODES]:
        raise ConfigError(f"--modes are some of {', '.join(MODES)}, not {unknown[0]!r}")
    return names_of(args.benchmarks), tuple(mode for mode in MODES if mode in asked)


def judge_of(args):
    """The judge, or None."""
    from r4b_jax.config import EndpointConfig
    from r4b_jax.evaluation.judge import EndpointJudge

    if not args.judge_url:
        return None
    config = EndpointConfig(
        url=args.judge_url,
        model=args.judge_model,
        key_variable=args.judge_key_variable,
        concurrency=args.judge_concurrency,
        max_tokens=args.judge_max_tokens,
    )
    return EndpointJudge(config, os.path.join(args.out, "judge"), args.vlmevalkit)


def run(args) -> dict:
    """Returns the content of report.json."""
    names, modes = check(args)
    from r4b_jax.evaluation.benchmarks import BENCHMARKS

    # Before anything heavy: a table that is missing is told at once.
    loaded = {n: BENCHMARKS[n].load(args.profile, args.data, args.any_file) for n in names}
    import jax

    from r4b_jax.common import sharding
    from r4b_jax.config import GenerateConfig, MeshConfig
    from r4b_jax.decoding.chat import load
    from r4b_jax.evaluation import runner

    if args.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", args.compilation_cache)
    judge, model = judge_of(args), load(args.checkpoint, args.dtype)
    settings = runner.Settings(
        modes=modes,
        think_bias=model.think_bias if args.think_bias is None else args.think_bias,
        limit=args.limit,
        generate=GenerateConfig(
            prompt_len=args.max_prompt_tokens,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            queries_at_once=args.slots,
            tensor=args.tensor,
        ),
    )
    folder = os.path.basename(os.path.abspath(args.checkpoint))
    name = args.name or re.sub(r"[^\w.-]+", "-", folder)
    options = dict(profile=args.profile, judge=judge, name=name, any_file=args.any_file)
    mesh = sharding.training_mesh(MeshConfig())
    with contextlib.nullcontext() if mesh.size == 1 else jax.set_mesh(mesh):
        return runner.evaluate(model, loaded, settings, args.out, **options)


def main():
    args = parser().parse_args()
    try:
        run(args)
    except ValueError as error:
        print(f"r4b_jax: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(f"Report: {os.path.join(args.out, 'report.html')}")


if __name__ == "__main__":
    main()
