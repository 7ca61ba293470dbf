"""The plan: what XLA for TPU says of the project's own programs, on a machine without one."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
from helpers import CONFIG

from r4b_jax import config as c
from r4b_jax import plan
from r4b_jax.models import tpu_attention
from r4b_jax.scaling.estimate import Estimate, row_ids, seen_pairs

ROOT = pathlib.Path(__file__).parent.parent
# The full model's widths at two layers of each kind, a short row with a picture on each device.
SMALL = (
    "--config.model.language.num_layers=2",
    "--config.model.vision.num_layers=2",
    "--config.model.language.vocab_size=8192",
    "--config.annealing.batch_rows=16",
    "--config.annealing.packed_len=2048",
    "--config.annealing.packed_tiles=2",
    "--config.bpo.packed_tiles=2",
    "--config.bpo.packed_len=2048",
    "--config.bpo.micro_rows=1",
    "--config.generate.prompt_len=1024",
    "--config.generate.max_new_tokens=64",
)


def command(*arguments) -> tuple[dict, str]:
    """The JSON of the last line, and all that was said."""
    call = [sys.executable, "-m", "r4b_jax.plan", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.fixture(scope="module")
def annealing() -> dict:
    pytest.importorskip("libtpu")
    return command("--config=configs/annealing.py", "--topology=v5e:2x4", *SMALL)[0]


def test_the_plan_says_what_a_device_needs(annealing):
    """The line a script reads; its numbers are the compiler's, so they can only be bounded."""
    names = {field.name for field in dataclasses.fields(Estimate)}
    assert set(annealing) == names and annealing["topology"] == "v5e:2x4"
    # Two decoder layers of 101M, 2 of the tower, the table of 21M, the projector: float32 with two
    # moments over 8 devices, and the rows.
    assert 0.35 < annealing["arguments_gib"] < 0.45
    assert annealing["arguments_gib"] < annealing["peak_gib"] < annealing["hbm_gib"] == 15.75
    assert annealing["fits"] and 0 < annealing["mfu_ceiling"] < 1
    assert annealing["executed_flops"] > annealing["useful_flops"] > 0
    assert annealing["tokens_per_second"] == pytest.approx(
        16 * 2048 / annealing["step_seconds"], rel=1e-6
    )


def test_kernels_are_gathered_layer_by_layer_and_their_gradients_split(annealing):
    """FSDP as the compiler wrote it: were the table or the stack gathered whole, memory would tell
    only at full size."""
    kinds = {line["kind"] for line in annealing["collectives"]}
    assert "all-gather" in kinds
    assert kinds & {"reduce-scatter", "collective-permute"}  # a gradient, at once or around a ring


def test_rollouts_and_the_update_are_planned_too():
    """All that a BPO step runs, with what each part leaves on the device while another runs."""
    pytest.importorskip("libtpu")
    small = ("--config=configs/bpo.py", "--topology=v5e:2x4", *SMALL)
    found, _ = command(*small, "--program=bpo", "--config.generate.tensor=8")
    parts = [found, *found["parts"]]
    names = ("rollouts", "gradients", "optimiser", "reference")
    assert {p["program"] for p in parts} == {f"bpo {name}" for name in names}
    assert parts[0]["resident_gib"] > 0 and all(p["fits"] for p in parts)
    found, _ = command(*small, "--program=rollout", "--config.generate.tensor=8")
    assert found["fits"] and found["tokens_per_second"] > 0


def test_what_does_not_fit_is_told_with_ways_out_that_were_tried():
    """Before hardware is rented: a device too small, and what would make it large enough."""
    pytest.importorskip("libtpu")
    large = [x for x in SMALL if "packed_len" not in x and "layers" not in x]
    found, said = command(
        "--config=configs/annealing.py",
        "--topology=v5e:1x1",
        *large,
        "--config.model.language.num_layers=12",
        "--config.model.vision.num_layers=2",
        "--config.annealing.packed_len=2048",
    )
    assert not found["fits"] and "It does not fit" in said
    assert "--config.model.remat=offload: peak" in said


def test_the_pairs_of_a_row_are_those_under_its_mask():
    """The formula's attention must be that of the rows, or MFU would flatter long documents."""
    config = dataclasses.replace(
        CONFIG,
        annealing=c.StageConfig(num_steps=1, packed_len=48),
        bpo=dataclasses.replace(CONFIG.bpo, packed_len=100),
    )
    for name, documents in (("annealing", 1), ("annealing", 5), ("bpo gradients", 1)):
        ids = row_ids(config, type("Program", (), {"name": name}), documents)
        mask = tpu_attention.layout(*ids, 1)  # blocks of one token: visits are pairs
        assert seen_pairs(*ids) == int(mask.counts.sum())


def test_ways_out_begin_with_the_cheapest_and_are_settings_that_exist():
    """An advice that is refused as unknown would be worse than none."""
    config = dataclasses.replace(CONFIG, annealing=c.StageConfig(num_steps=1, batch_rows=8))
    for program in ("train", "bpo", "rollout"):
        ways = plan.ways_out(config, program, {"data": 2, "fsdp": 2, "tensor": 1})
        assert len(ways) >= plan.TRIED - 1
        for settings in ways:
            assert plan.changed(config, settings) != config
    assert plan.as_flags({"model__remat": "offload"}) == "--config.model.remat=offload"


def test_an_unknown_topology_is_one_line_with_the_known_ones():
    """A typo must not end in libtpu's own words."""
    pytest.importorskip("libtpu")
    call = [sys.executable, "-m", "r4b_jax.plan", "--config=configs/annealing.py"]
    done = subprocess.run(
        [*call, "--topology=v9:2x2"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "v5e" in done.stderr.splitlines()[-1]
