"""What a run needs, before hardware is rented: the project's own programs, compiled for it.

    python -m r4b_jax.plan --config=configs/annealing.py --topology=v5e:16x16
    python -m r4b_jax.plan --config=configs/bpo.py --topology=v5e:2x4 --program=bpo
    python -m r4b_jax.plan --config=configs/bpo.py --topology=v6e:2x4 --program=rollout --sweep

Programs: `train`, the step of the config's last stage that has steps; `bpo`, all that a BPO step
runs; `rollout`, its replies alone, with nothing trained on the same devices; `evaluate`, those of a
call in evaluation. Needs libtpu (`pip install 'r4b_jax[aot]'`) and no TPU. Memory and collectives
are the compiler's, times are the least that the chips' data sheets allow. For a GPU (h200:8) the
program is compiled for as many v5p chips.

The last line is JSON.
"""

import dataclasses
import importlib.util
import json
import math
import os

from absl import app, flags, logging

from r4b_jax import main as front
from r4b_jax.config import Config, ConfigError, from_config_dict
from r4b_jax.rules import check

_TOPOLOGY = flags.DEFINE_string(
    "topology", "v5e:4x4", "Chips and their arrangement: v5e:2x4, v5p:2x2x1, v6e:2x2, h200:8."
)
_PROGRAM = flags.DEFINE_enum(
    "program", "train", ("train", "bpo", "rollout", "evaluate"), "What to compile."
)
_DOCUMENTS = flags.DEFINE_integer(
    "documents",
    1,
    "Equal documents that a row of `train` is taken to hold, for its attention's FLOPs.",
    lower_bound=1,
)
_SCHEDULE = flags.DEFINE_bool(
    "schedule",
    False,
    "Compile as for a run, with collectives overlapped: slower than without, which gives "
    "the memory to within 0.5 GiB.",
)
_SWEEP = flags.DEFINE_bool(
    "sweep", False, "Try meshes, remat policies and micro-batches; rank them."
)
TRIED = 3  # ways out that are tried where a program does not fit


def prepare():
    """Make jax use libtpu's compiler and no device; to be called before jax is imported.

    Raises:
      ConfigError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("plan compiles with libtpu, which is not here: pip install libtpu")
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # nobody to ask where there is no TPU
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans at once
        "TPU_ACCELERATOR_TYPE": os.environ.get("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",  # libtpu's own troubles with the text of large programs
    }


def plan(config: Config, topology: str, program: str, documents: int = 1) -> list:
    """The estimates of a program's parts, the one with the highest peak first.

    Raises:
      ConfigError: the settings do not fit the devices.
    """
    from r4b_jax.scaling.estimate import devices_of, estimate
    from r4b_jax.scaling.programs import programs

    parts = programs(config, program, devices_of(topology))
    found = [estimate(config, part, topology, documents) for part in parts]
    return sorted(found, key=lambda e: -math.inf if math.isnan(e.peak_gib) else -e.peak_gib)


def changed(config: Config, settings: dict) -> Config:
    """A config with other settings: {"model__remat": "offload"}."""
    for name, value in settings.items():
        group, field = name.split("__")
        inner = dataclasses.replace(getattr(config, group), **{field: value})
        config = dataclasses.replace(config, **{group: inner})
    return config


def worst_with(config: Config, settings: dict, topology: str, program: str, documents: int = 1):
    """The estimate with the highest peak, with other settings.

    Raises:
      ConfigError: they cannot work.
    """
    other = changed(config, settings)
    check(other, has_data=False)
    return plan(other, topology, program, documents)[0]


def ways_out(config: Config, program: str, mesh) -> list[dict]:
    """Settings that take less memory, the cheapest in speed first.

    Args:
      mesh: axis -> size, of training.
    """
    if program in ("rollout", "evaluate"):
        sizes, ways = config.generate, []
        if sizes.rollouts_at_once > 1:
            ways.append({"generate__rollouts_at_once": sizes.rollouts_at_once // 2})
        if sizes.queries_at_once > 1:
            ways.append({"generate__queries_at_once": sizes.queries_at_once // 2})
        if sizes.tensor * 2 <= config.model.language.num_kv_heads:
            ways.append({"generate__tensor": sizes.tensor * 2})
        return ways
    from r4b_jax.scaling.programs import stage_of

    name = "bpo" if program == "bpo" else stage_of(config)
    stage, ways = getattr(config, name), []
    if program == "bpo" and config.generate.queries_at_once > 1:
        ways.append({"generate__queries_at_once": config.generate.queries_at_once // 2})
    if config.model.remat in ("attention", "matmuls"):
        ways.append({"model__remat": "full"})
    if stage.micro_rows != 1:
        ways.append({f"{name}__micro_rows": 1})
    if mesh["data"] > 1:
        ways.append({"mesh__data": mesh["data"] // 2, "mesh__fsdp": mesh["fsdp"] * 2})
    if config.model.remat != "offload":
        ways.append({"model__remat": "offload"})
    if stage.moment_dtype == "float32":
        ways.append({f"{name}__moment_dtype": "bfloat16"})
    if mesh["fsdp"] > 1:
        tensor = {"mesh__fsdp": mesh["fsdp"] // 2, "mesh__tensor": mesh["tensor"] * 2}
        ways += [tensor, {**tensor, "model__remat": "offload"}]
    return ways


def as_flags(settings: dict) -> str:
    """{"model__remat": "offload"} -> "--config.model.remat=offload"."""
    return " ".join(f"--config.{k.replace('__', '.')}={v}" for k, v in settings.items())


def show(estimates: list):
    """A table of a program's parts, and their collectives."""
    import rich.table

    from r4b_jax.common.metrics import console

    def told(value, form: str) -> str:
        return "-" if value is None else form.format(value)

    first = estimates[0]
    table = rich.table.Table(title=f"{first.topology}: what a device needs, and at best does")
    for name in ("", *[e.program for e in estimates]):
        table.add_column(name, justify="right" if name else "left")
    rows = [
        ("arguments, GiB", "arguments_gib", "{:.2f}"),
        ("temporaries, GiB", "temporaries_gib", "{:.2f}"),
        ("held beside, GiB", "resident_gib", "{:.2f}"),
        ("in host memory, GiB", "host_gib", "{:.2f}"),
        ("peak, GiB", "peak_gib", "{:.2f}"),
        (f"fits {first.hbm_gib:.2f} GiB", "fits", "{}"),
        ("useful FLOPs", "useful_flops", "{:.3g}"),
        ("executed FLOPs", "executed_flops", "{:.3g}"),
        ("seconds, at the least", "step_seconds", "{:.2f}"),
        ("bound by", "bound", "{}"),
        ("MFU, at most", "mfu_ceiling", "{:.0%}"),
        ("tokens/s, all devices", "tokens_per_second", "{:,.0f}"),
    ]
    for title, field, form in rows:
        table.add_row(title, *[told(getattr(e, field), form) for e in estimates])
    console.print(table)
    for e in estimates:
        if e.note:
            console.print(f"{e.program}: {e.note}")
        if e.collectives is None and not math.isnan(e.peak_gib):
            console.print(f"{e.program}: no text from the compiler, so no list of collectives")
        for line in e.collectives or []:
            overlap = "overlapped" if line["overlapped"] else "waited for"
            console.print(
                f"{e.program}: {line['kind']}, {overlap}: {line['count']} in the program, "
                f"{line['runs']:.0f} runs, {line['wire'] / 2**30:.2f} GiB sent"
            )


def advise(config: Config, topology: str, program: str, estimates: list):
    """Where a program does not fit: try the cheapest ways out and tell what each gives."""
    from r4b_jax.common.metrics import console
    from r4b_jax.common.sharding import training_mesh
    from r4b_jax.scaling.estimate import devices_of

    console.print("It does not fit. What could be changed:")
    mesh = dict(training_mesh(config.mesh, devices_of(topology)).shape)
    for settings in ways_out(config, program, mesh)[:TRIED]:
        text = as_flags(settings)
        try:
            worst = worst_with(config, settings, topology, program)
        except ConfigError as error:
            console.print(f"  {text}: {error}")
            continue
        fits = "fits" if worst.fits else "does not fit"
        console.print(f"  {text}: peak {worst.peak_gib:.2f} GiB, {fits}")


def candidates(config: Config, program: str, devices: int) -> list[dict]:
    """What `--sweep` tries."""
    powers = [2**i for i in range(devices.bit_length()) if devices % 2**i == 0]
    if program in ("rollout", "evaluate"):
        heads = config.model.language.num_kv_heads
        return [{"generate__tensor": n} for n in powers if heads % n == 0]
    from r4b_jax.scaling.programs import stage_of

    name = "bpo" if program == "bpo" else stage_of(config)
    # Wider than 32 splits a kernel so thin that its gradient is reduced whole.
    meshes = []
    for tensor in (n for n in (1, 2, 4) if devices % n == 0):
        fsdp = min(devices // tensor, 32)
        mesh = {"data": devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
        meshes.append({f"mesh__{axis}": size for axis, size in mesh.items()})
    work = [("attention", 1), ("full", 1), ("full", 2), ("offload", 1), ("offload", 2)]
    return [
        {**mesh, "model__remat": remat, f"{name}__micro_rows": rows}
        for mesh in meshes
        for remat, rows in work
    ]


def sweep(config: Config, topology: str, program: str, documents: int) -> list[tuple]:
    """Try `candidates`: (settings, worst estimate), those that fit and are fast first."""
    from r4b_jax.common.metrics import Progress, console
    from r4b_jax.scaling.estimate import devices_of

    tried, found = candidates(config, program, len(devices_of(topology))), []
    with Progress("sweep", len(tried)) as progress:
        for settings in tried:
            try:
                worst = worst_with(config, settings, topology, program, documents)
                found.append((settings, worst))
            except (ConfigError, RuntimeError) as error:
                console.print(f"{as_flags(settings)}: {error}")
            progress.advance()
    if not found:
        raise ConfigError("nothing that was tried can be compiled")
    found.sort(key=lambda x: (not x[1].fits, x[1].step_seconds or math.inf, x[1].peak_gib))
    for settings, e in found:
        seconds = "" if e.step_seconds is None else f", {e.step_seconds:.2f} s a step at the least"
        fits = "fits" if e.fits else "does not fit"
        console.print(f"{as_flags(settings)}: peak {e.peak_gib:.2f} GiB, {fits}{seconds}")
    return found


def run(argv):
    if len(argv) > 1:
        front.stop(ConfigError(f"unknown argument {argv[1]!r}"))
    logging.set_verbosity(logging.ERROR)
    topology, program, documents = _TOPOLOGY.value, _PROGRAM.value, _DOCUMENTS.value
    try:
        config = from_config_dict(Config, front.CONFIG.value)
        check(config, has_data=False)
        prepare()
        import jax

        if not _SCHEDULE.value:
            jax.config.update("jax_optimization_level", "O1")
        if _SWEEP.value:
            found = sweep(config, topology, program, documents)
            last = [dataclasses.asdict(e) | {"settings": as_flags(s)} for s, e in found]
        else:
            estimates = plan(config, topology, program, documents)
            show(estimates)
            if not all(e.fits for e in estimates):
                advise(config, topology, program, estimates)
            last = [dataclasses.asdict(e) for e in estimates]
    except ConfigError as error:
        front.stop(error)
    last = [{k: None if v != v else v for k, v in part.items()} for part in last]  # no NaN in JSON
    print(json.dumps(last[0] | ({"parts": last[1:]} if len(last) > 1 else {})))


if __name__ == "__main__":
    app.run(run, flags_parser=front.parse)
