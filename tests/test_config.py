"""Settings: all of them are read, none is swallowed, and a mistake is told at once with a name."""

import ast
import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from helpers import CLASSES, CONFIG, MODEL

from r4b_jax import config as c
from r4b_jax import main
from r4b_jax.models import r4b
from r4b_jax.rules import check
from r4b_jax.training.optimizer import RATES

ROOT = pathlib.Path(__file__).parent.parent


def names_read() -> set[str]:
    """Names that the package's code reads as `.name` or names in a string (`getattr`)."""
    names = set()
    for path in (ROOT / "r4b_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)  # a docstring is no field name
    return names


def test_every_class_of_settings_is_looked_at():
    """A new dataclass of settings must be added here, or its fields would go unwatched."""
    found = {v for v in vars(c).values() if isinstance(v, type) and dataclasses.is_dataclass(v)}
    assert found == set(CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_is_read_somewhere(cls):
    """A setting that nothing reads lies to whoever sets it (tunix's rope_theta)."""
    read = names_read()
    assert [f.name for f in dataclasses.fields(cls) if f.name not in read] == []


@pytest.mark.parametrize("size", ["full", "smoke"])
def test_the_tiny_config_passes_its_own_check_and_survives_the_way_there_and_back(tiny, size):
    """What the command line hands over must be what the file meant, field by field."""
    values = tiny(size)
    config = c.from_config_dict(c.Config, values)
    check(config)
    assert c.from_config_dict(c.Config, c.to_config_dict(config)) == config
    assert c.to_config_dict(config).to_dict() == values.to_dict()
    hash(config.model)  # it is a static argument of jitted functions


def test_a_size_that_the_tiny_config_does_not_have_is_an_error(tiny):
    """`configs/tiny.py:smokee` must not quietly start the run of an hour."""
    with pytest.raises((ValueError, KeyError), match="smokee"):
        tiny("smokee")


def test_every_default_survives_the_way_there_and_back():
    """A default of a type that its own field does not accept could never be set again."""
    for cls in CLASSES:
        assert c.from_config_dict(cls, c.to_config_dict(cls())) == cls()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"bpo": {"gg": 8}}, "config.bpo.gg is not a setting; did you mean config.bpo.g?"),
        ({"sed": 1}, "did you mean config.seed?"),
        ({"model": {"language": {"rope_tetha": 1.0}}}, "did you mean config.model.language.rope_t"),
        ({"seed": 1.5}, "config.seed takes int, not float 1.5"),
        ({"seed": True}, "config.seed takes int, not bool True"),
        ({"model": {"remat": 1}}, "config.model.remat takes str, not int 1"),
        ({"name": 3}, "config.name takes str, not int 3"),
        ({"bpo": {"topics": {"ocr": "much"}}}, "config.bpo.topics.ocr takes float, not str"),
        ({"joint": {"mixture": {"ocr": ("much",)}}}, "config.joint.mixture.ocr[0] takes float"),
        ({"sources": {"a": {"pth": "x"}}}, "did you mean config.sources.a.path?"),
        ({"model": 3}, "config.model"),
        ({"bpo": {"topics": "ocr"}}, "config.bpo.topics"),
    ],
)
def test_a_wrong_setting_is_an_error_with_its_name(values, message):
    """The nearest valid name, or the type, belongs in the message: a traceback helps nobody."""
    with pytest.raises(c.ConfigError, match=re.escape(message)):
        c.from_config_dict(c.Config, values)


def test_a_whole_number_is_a_float_where_one_is_wanted():
    """`--config.bpo.kl_beta=0` must work, and mean 0.0."""
    config = c.from_config_dict(c.Config, {"bpo": {"kl_beta": 0, "topics": {"maths": 1}}})
    assert type(config.bpo.kl_beta) is float and type(config.bpo.topics["maths"]) is float


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.bpo.gg=8", "config.bpo.gg is not a setting; did you mean config.bpo.g?"),
        ("--config.bpoo.g=8", "config.bpoo is not a setting; did you mean config.bpo?"),
        ("--config.bpo.g=eight", "config.bpo.g takes int, not 'eight'"),
        ("--config.bpo.g=1.5", "config.bpo.g takes int, not '1.5'"),
        ("-config.bpo.kl_beta=no", "config.bpo.kl_beta takes float, not 'no'"),
        ("--config.model.vision=3", "config.model.vision is a group: image_size, patch_size"),
        ("--config.sources.a.pth=x", "did you mean config.sources.a.path?"),
    ],
)
def test_a_wrong_override_is_an_error_with_its_name(argument, message):
    """ml_collections would only say that a key does not exist."""
    with pytest.raises(c.ConfigError, match=re.escape(message)):
        c.check_overrides(["main.py", "--config=configs/tiny.py", argument])


def test_right_overrides_pass():
    """Every leaf can be set, and topics, whose names are data."""
    right = ["--config=x.py", "--config.bpo.g=8", "--config.seed", "1", "--workdir=a.b=c"]
    c.check_overrides(["main.py", *right, "--config.joint.mixture.ocr=(0.5, 0.0)"])
    c.check_overrides(["main.py", "--config.sources.mine.path=x.jsonl"])


# What must not pass `check`: one change to the tiny config each, and the setting it names.
REFUSED = {
    "model.language.num_heads": {"model": {"language": {"num_heads": 5}}},
    "model.vision.width": {"model": {"vision": {"width": 95}}},
    "bpo.algorithm": {"bpo": {"algorithm": "bpoo"}},
    "bpo.mode_tokens": {"bpo": {"mode_tokens": "polcy"}},
    "bpo.g": {"bpo": {"g": 0}},
    "bpo.temperature": {"bpo": {"temperature": 0.0}},
    "bpo.packed_len": {"bpo": {"packed_len": 100}},
    "generate.prompt_len": {"generate": {"prompt_len": 9}},
    "world.vocab_size": {"world": {"vocab_size": 600}},
    "joint.schedule": {"joint": {"schedule": "cosin"}},
    "joint.optimizer": {"joint": {"optimizer": "adam"}},
    "joint.sources is one of curated, world": {"joint": {"sources": ("wrld",)}},
    "joint.mixture.ocr is (weight": {"joint": {"mixture": {"ocr": (1.0,)}}},
    "joint.mixture weighs nothing": {"joint": {"mixture": {"ocr": (0.0, 0.0)}}},
    "joint has no mixture: the small world": {"joint": {"mixture": {}}},
    "joint.epochs: the small world has no end": {"joint": {"epochs": 1}},
    "joint.epochs must be": {"joint": {"epochs": -1}},
    "sources.world.path is empty": {
        "sources": {"world": c.SourceConfig(), "curated": c.SourceConfig(path="x")}
    },
    "curation.num_answers": {"curation": {"num_answers": 0}},
    "curation.duplicate_similarity": {"curation": {"duplicate_similarity": 0.0}},
    "curation.judge.model is empty": {"curation": {"judge": {"url": "http://x/v1"}}},
    "workers": {"workers": 0},
    "warmup trains nothing": {"warmup": {"lr_projector": 0.0}},
    "curation has no data": {"sources": {}},
    "language has no data": {"sources": {}, "curation": {"in_run": False}},
    "bpo has no data": {"bpo": {"topics": {}}},
    "bpo learns nothing": {"bpo": {"rewards": {}}},
    "bpo learns nothing: bpo.rewards names math, bpo.topics": {
        "bpo": {"rewards": {"math": "maths"}}
    },
    "bpo.reward_workers": {"bpo": {"reward_workers": -1}},
    "bpo.reward_deadline": {"bpo": {"reward_deadline": 0.0}},
    "bpo.max_importance": {"bpo": {"max_importance": 0.5}},
    "bpo.frozen is one of": {"bpo": {"frozen": ("vision",)}},
    "bpo trains nothing": {"bpo": {"frozen": c.COMPONENTS}},
    "bpo.overlap_rewards and bpo.int8_rollouts compare": {
        "bpo": {"overlap_rewards": True, "temperature": 0.7}
    },
    "bpo.overlap_rewards and bpo.int8_rollouts both": {
        "bpo": {"overlap_rewards": True, "int8_rollouts": True}
    },
    "generate.max_direct_tokens": {"generate": {"max_direct_tokens": 1000}},
    "generate.queries_at_once": {"generate": {"queries_at_once": 0}},
    "generate.rollouts_at_once": {"generate": {"rollouts_at_once": 0}},
    "bpo.updates_per_rollout": {"bpo": {"updates_per_rollout": 0}},
    "bpo.eval_every": {"bpo": {"eval_every": 0}},
    "log_every": {"log_every": 0},
    "checkpoint_every": {"checkpoint_every": 0},
    "generate.max_new_tokens": {"generate": {"max_new_tokens": 1}},  # the direct mode forces two
}


def changed(config, changes: dict):
    """A nested dataclass with nested changes."""
    return dataclasses.replace(
        config,
        **{
            name: changed(getattr(config, name), value)
            if dataclasses.is_dataclass(getattr(config, name))
            else value
            for name, value in changes.items()
        },
    )


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_work_are_refused_by_name(tiny, name):
    """Before anything is computed, not after an hour of training."""
    config = changed(c.from_config_dict(c.Config, tiny()), REFUSED[name])
    with pytest.raises(c.ConfigError, match=re.escape(f"config.{name}")):
        check(config)


def test_a_wrong_choice_is_answered_with_the_nearest_one(tiny):
    """`polcy` is a typo of `policy`, and the message says so."""
    config = changed(c.from_config_dict(c.Config, tiny()), REFUSED["bpo.mode_tokens"])
    with pytest.raises(c.ConfigError, match="did you mean policy"):
        check(config)


def run_main(*arguments: str) -> subprocess.CompletedProcess:
    """`python -X importtime -m r4b_jax.main ...` in the repository's root."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "r4b_jax.main", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/tiny.py", "--config.bpo.gg=8"], "did you mean config.bpo.g?"),
        (["--config=configs/tiny.py", "--config.bpo.mode_tokens=polcy"], "did you mean policy?"),
        (["--config=configs/tiny.py", "seed=1"], "unknown argument 'seed=1'"),
        (["--config=configs/tinny.py"], "tinny.py"),
        (["--config=configs/tiny.py", "--config.model.remat=maybe"], "config.model.remat"),
        (
            ["--config=configs/tiny.py", "--config.bpo.topics.compare=1"],
            "config.bpo.topics.compare",
        ),
        (["--config=configs/tiny.py", "--wrkdir=x"], "workdir"),
        ([], "--config is missing"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    """And told before jax is imported, so within a second."""
    result = run_main(*arguments, f"--workdir={tmp_path / 'run'}")
    lines = [x for x in result.stderr.splitlines() if not x.startswith("import time:")]
    assert result.returncode == 2
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("r4b_jax: ")
    imported = re.findall(r"^import time:.*\| +(\S+)$", result.stderr, re.MULTILINE)
    assert "ml_collections" in imported  # the list is real
    assert not {"jax", "flax", "optax", "grain", "tokenizers", "matplotlib"} & set(imported)
    assert not (tmp_path / "run").exists()


def test_the_components_are_those_of_the_model_and_each_has_a_rate():
    """One list of names for freezing, rates and parameters."""
    shapes = jax.eval_shape(lambda: r4b.init(MODEL, jax.random.key(0)))
    assert set(c.COMPONENTS) == set(shapes) == set(RATES)


def test_a_reward_that_does_not_exist_is_told_before_anything_is_written(tmp_path):
    """Found out after five stages, it would have cost the night."""
    wrong = {"arithmetic": "math"}
    config = dataclasses.replace(CONFIG, bpo=dataclasses.replace(CONFIG.bpo, rewards=wrong))
    with pytest.raises(c.ConfigError, match="did you mean maths"):
        main.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
