"""Run a config's stages in order, then BPO, then the report.

    python -m r4b_jax.main --config=configs/tiny.py [--workdir=DIR] [--config.seed=1] ...

The same command again continues where it stopped, or shows the report if it is done. Settings are
checked before anything heavy is imported, so a mistake is told at once.
"""

import contextlib
import json
import os
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from r4b_jax.config import (
    STAGES,
    Config,
    ConfigError,
    check_overrides,
    from_config_dict,
    to_config_dict,
)
from r4b_jax.data.samples import RecordError
from r4b_jax.rl.rewards import find
from r4b_jax.rules import check

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file: configs/tiny.py, or configs/tiny.py:smoke.", lock_config=True
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes of a pod or cluster, whose environment tells which: TPU pods, SLURM, "
    "MPI, Kubernetes. Elsewhere give the three flags below.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of the first process.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_TRACE_STEPS = flags.DEFINE_integer(
    "trace_steps", 0, "Profile so many steps of each stage into <workdir>/trace, for xprof."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for checkpoints, metrics and the report; by default runs/<name>-seed<seed>.",
)

# Settings of where and when something is computed, and not of what: a run may go on with others.
PLACEMENT = re.compile(
    r"config\.(mesh\.|generate\.tensor|workers)|\.(remat|loss_chunk|micro_rows)$"
    r"|config\.curation\.\w+\.(concurrency|requests_per_minute|timeout|retries)$"
)


def run(config: Config, workdir: str, trace_steps: int = 0) -> dict:
    """All stages, both evaluations and the report; returns the content of report.json.

    Raises:
      ConfigError: the settings cannot work, or `workdir` holds a run with other settings.
    """
    check(config)
    check_rewards("bpo", config.bpo.rewards)
    if config.curation.in_run:
        check_rewards("curation", config.curation.rewards)
    # Heavy imports: only now that the settings are known to be good.
    import jax

    from r4b_jax.common import processes, sharding

    mesh = sharding.training_mesh(config.mesh)
    sharding.check_work(config, mesh)
    with processes.first_goes_first("claim"):
        claim(config, workdir)
    with contextlib.nullcontext() if mesh.size == 1 else jax.set_mesh(mesh):
        return _run(config, workdir, trace_steps)


def check_rewards(name: str, rewards: dict[str, str]):
    """
    Raises:
      ConfigError: one of `config.<name>.rewards` is no reward there is.
    """
    for reward in sorted(set(rewards.values())):
        try:
            find(reward)
        except ValueError as error:
            raise ConfigError(f"config.{name}.rewards: {error}") from None


def _run(config: Config, workdir: str, trace_steps: int) -> dict:
    """`run`, where the settings are good and the mesh stands."""
    from r4b_jax.common import processes
    from r4b_jax.evaluation import report

    if (content := report.read(workdir)) is not None:
        report.show(content, workdir)
        return content

    from r4b_jax.common.metrics import warn
    from r4b_jax.curation.curate import curate
    from r4b_jax.evaluation.evaluate import evaluate_once
    from r4b_jax.rl.loop import run_bpo
    from r4b_jax.training.loop import run_stage

    clock = report.StageClock(workdir)
    with clock("preparation"), processes.first_goes_first("preparation"):
        tokenizer = tokenizer_of(config, workdir)
    params = params_of(config)
    with clock("preparation"):
        _check_data(config, workdir)
        if not config.init_from and all(s.path != "world" for s in config.sources.values()):
            warn("no init_from: random weights, and the tokenizer of the small world")
    for name in STAGES:
        if name == "annealing" and config.curation.in_run:
            with clock("curation"):
                curate(config, params, tokenizer, workdir)
        if getattr(config, name).num_steps > 0:
            with clock(name):
                params = run_stage(config, name, params, tokenizer, workdir, trace_steps)
    with clock("evaluation"):
        evaluate_once(config, params, tokenizer, workdir, "before")
    if config.bpo.num_steps > 0:
        with clock("bpo"):
            params = run_bpo(config, params, tokenizer, workdir, trace_steps)
        with clock("evaluation"):
            evaluate_once(config, params, tokenizer, workdir, "after")
    with processes.first_goes_first("report"):
        if processes.is_first():
            return report.write(config, workdir, clock.seconds)
    return report.read(workdir)


def _check_data(config: Config, workdir: str):
    """Open what the stages and BPO read, before the first of them takes its hours; but not what the
    run itself has yet to write.

    Raises:
      ConfigError: files or topics that are not there.
    """
    from r4b_jax.data.mixture import queries, stage_stream

    def made_here(names: tuple[str, ...]) -> bool:
        return any("{workdir}" in config.sources[n].path for n in names or config.sources)

    for name in STAGES:
        stage = getattr(config, name)
        if stage.num_steps > 0 and not made_here(stage.sources):
            stage_stream(config, name, workdir)
    bpo, curation = config.bpo, config.curation
    if bpo.num_steps > 0 and not made_here(bpo.sources):
        queries(config, bpo.sources, bpo.topics, "bpo", workdir, endless=True)
    if curation.in_run and not made_here(curation.sources):
        args = (curation.sources, curation.topics, "curation", workdir)
        queries(config, *args, number=curation.num_queries)


def tokenizer_of(config: Config, workdir: str):
    """The checkpoint's tokenizer, or that of the small world."""
    from r4b_jax.common.checkpoint import ORIGINALS
    from r4b_jax.data.worlds import world_tokenizer
    from r4b_jax.decoding.chat import talk

    if not config.init_from:
        return world_tokenizer(config.world, workdir)
    _check_model(config)
    tokenizer, _ = talk(os.path.join(config.init_from, ORIGINALS))
    tokenizer.save(workdir)
    return tokenizer


def params_of(config: Config) -> dict:
    """The parameters before the first stage, on the mesh: the checkpoint's, or random.

    Raises:
      ConfigError: the mesh does not divide them.
    """
    import jax

    from r4b_jax.common import sharding
    from r4b_jax.common.checkpoint import restore_model
    from r4b_jax.models import r4b
    from r4b_jax.models.layers import logical_axes

    def init():
        return sharding.pin(r4b.init(config.model, jax.random.key(config.seed)), logical_axes)

    mesh = sharding.current()
    shapes = sharding.abstract(jax.eval_shape(init), logical_axes, mesh)
    if mesh is not None:
        sharding.check_replication(shapes)
    if config.init_from:
        return restore_model(config.init_from, shapes)[1]
    return init() if mesh is None else jax.jit(init)()


def _check_model(config: Config):
    """
    Raises:
      ConfigError: the checkpoint's model is not `config.model`; the message names what differs.
    """
    from r4b_jax.common.checkpoint import MODEL_FILE, model_sizes

    if not os.path.exists(os.path.join(config.init_from, MODEL_FILE)):
        raise ConfigError(
            f"config.init_from: {config.init_from} is no converted checkpoint; make one with "
            "python -m r4b_jax.convert import"
        )
    ours, theirs = (
        json.loads(to_config_dict(model).to_json())
        for model in (config.model, model_sizes(config.init_from))
    )
    free = {f"config.model.{name}" for name in ("compute_dtype", "remat", "loss_chunk")}
    changed = sorted(set(_differences(ours, theirs, "config.model")) - free)
    if changed:
        raise ConfigError(f"{config.init_from} holds another model: {', '.join(changed)} differ")


def claim(config: Config, workdir: str):
    """Make `workdir` this run's: its settings are written there, and another run's are refused."""
    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, "config.json")
    ours = json.loads(to_config_dict(config).to_json())
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            theirs = json.load(f)
        changed = [
            name for name in sorted(_differences(ours, theirs)) if not PLACEMENT.search(name)
        ]
        if changed:
            raise ConfigError(
                f"{workdir} holds a run with other settings ({', '.join(changed)}); "
                "choose another --workdir, or remove it"
            )
        return
    with open(path + ".part", "w", encoding="utf-8") as f:
        json.dump(ours, f, indent=1)
    os.replace(path + ".part", path)


def _differences(ours: dict, theirs: dict, path: str = "config"):
    """The names of the settings in which two nested dicts differ."""
    for key in ours.keys() | theirs.keys():
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{path}.{key}")
        elif a != b:
            yield f"{path}.{key}"


def parse(argv):
    """Flags; a mistake in them is one line and exit code 2."""
    try:
        check_overrides(argv)
        rest = flags.FLAGS(argv)
        if CONFIG.value is None:
            raise ConfigError("--config is missing; try --config=configs/tiny.py")
        _ = CONFIG.value.seed  # a config file that cannot be read raises here
    except (flags.Error, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        key = str(error).strip("'\"")
        names = [arg.lstrip("-").partition("=")[0] for arg in argv]
        missing = [name for name in names if name.endswith(f".{key}")]
        if missing:  # ml_collections names no more than the key
            error = ConfigError(f"{missing[0]} is not in the config file; write it there")
        stop(error)
    return rest


def workdir_of(config: Config) -> str:
    """The run's folder: --workdir, or one named after the config."""
    return _WORKDIR.value or os.path.join("runs", f"{config.name}-seed{config.seed}")


def stop(error: Exception):
    """One line to standard error, and exit code 2."""
    text = " ".join(str(error.args[0] if error.args else error).split())
    print(f"r4b_jax: {text}", file=sys.stderr)
    sys.exit(2)


def front(check, work):
    """A main for `app.run` that reads settings, joins other processes, and does
    `work(config, workdir)`.

    Args:
      check: function (config); told before the other processes are waited for.
    """

    def main(argv):
        if len(argv) > 1:
            problem = f"unknown argument {argv[1]!r}; settings are given as --config.name=value"
            stop(ConfigError(problem))
        logging.set_verbosity(logging.WARNING)  # the libraries' chatter; our own is on the console
        try:
            config = from_config_dict(Config, CONFIG.value)
            check(config)
            given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
            if given.count(None) in (1, 2) and not _DISTRIBUTED.value:
                raise ConfigError("--coordinator, --num_processes and --process_id go together")
            if _DISTRIBUTED.value or None not in given:
                from r4b_jax.common import processes

                processes.start(*given)
            work(config, workdir_of(config))
        except (ConfigError, RecordError) as error:
            stop(error)

    return main


if __name__ == "__main__":
    main = front(check, lambda config, workdir: run(config, workdir, _TRACE_STEPS.value))
    app.run(main, flags_parser=parse)
