"""The whole run at its smallest: the report, the second call, and runs that were interrupted."""

import contextlib
import dataclasses
import json
import os
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLASSES, CONFIG, MODEL

from r4b_jax import config as c
from r4b_jax import main
from r4b_jax.common.metrics import Progress, StepClock, Trace, read_metrics
from r4b_jax.data.dialogue import MODES
from r4b_jax.data.loader import examples
from r4b_jax.data.tokenizer import Tokenizer
from r4b_jax.data.worlds import TOPICS
from r4b_jax.rl import loop
from r4b_jax.rl.rewards import Answered
from r4b_jax.training.loop import run_stage

QUESTIONS = 3


def spy_on_reads(patch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(class, field) of every setting that the package reads from now on, those that only look
    whether they are good apart."""
    reads, package = set(), os.path.dirname(main.__file__) + os.sep
    for cls in CLASSES:
        names = {field.name for field in dataclasses.fields(cls)}

        def read(self, name, cls=cls, names=names):
            if name in names:
                code = sys._getframe(1).f_code
                name_of_file = code.co_filename.removeprefix(package)
                checks = ("config.py", "rules.py")
                inside = name_of_file != code.co_filename and name_of_file not in checks
                if inside or code.co_name == "num_patches":
                    reads.add((cls.__name__, name))
            return object.__getattribute__(self, name)

        patch.setattr(cls, "__getattribute__", read, raising=False)
    return reads


def fourth_tokens(rollouts) -> list[Answered]:
    """In place of the answers, which an untrained model hardly ever gets to: a token of each."""
    return [
        Answered(question.topic, question.question, question.answer, str(tokens[3]))
        for question, replies in zip(rollouts.questions, rollouts.generation.tokens)
        for tokens in replies
    ]


@pytest.fixture(scope="module", autouse=True)
def game():
    """BPO's loop as it is, with a reward in place of maths, which would be 0 throughout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "answered", fourth_tokens)
        yield


@pytest.fixture(scope="module")
def config(tiny) -> c.Config:
    """configs/tiny.py:smoke with the tests' model and still fewer steps."""
    smoke = c.from_config_dict(c.Config, tiny("smoke"))
    language = dataclasses.replace(MODEL.language, vocab_size=smoke.model.language.vocab_size)
    short = dict(num_steps=2, batch_rows=2)
    return dataclasses.replace(
        smoke,
        **{name: dataclasses.replace(getattr(smoke, name), **short) for name in c.STAGES},
        model=dataclasses.replace(MODEL, language=language),
        bpo=dataclasses.replace(
            smoke.bpo,
            num_steps=2,
            packed_len=256,
            eval_questions=1,
            rewards=dict.fromkeys(smoke.bpo.topics, "even:even"),
        ),
        generate=dataclasses.replace(smoke.generate, max_new_tokens=12, batch_size=7),
        eval_questions=QUESTIONS,
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """(work folder, content of the report, settings read) of one whole run."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        reads = spy_on_reads(patch)
        content = main.run(config, str(workdir))
    return workdir, content, reads


def modified(workdir, pattern: str = "**/*") -> dict:
    """Every file of a folder with the time it was last written."""
    return {p: p.stat().st_mtime_ns for p in workdir.glob(pattern) if p.is_file()}


def test_the_report_has_the_documented_shape(finished, config):
    """Whoever compares runs reads report.json: topic by mode, before and after."""
    workdir, content, _ = finished
    assert json.loads((workdir / "report.json").read_text()) == content
    assert content["name"] == "tiny-smoke" and content["seed"] == config.seed
    assert content["topics"] == TOPICS
    assert c.from_config_dict(c.Config, content["config"]) == config
    for when in ("before", "after"):
        assert set(content[when]) == set(TOPICS)
        for modes in content[when].values():
            assert set(modes) == set(MODES)
            for mode, row in modes.items():
                assert {"accuracy", "think_rate", "tokens", "count"} <= set(row)
                assert row["count"] == QUESTIONS
                assert 0 <= row["accuracy"] <= 1 and 0 <= row["p_think"] <= 1
                assert 1 <= row["tokens"] <= config.generate.max_new_tokens
                if mode != "auto":  # the forced modes are what they were forced to be
                    assert row["think_rate"] == (mode == "thinking")
    assert set(content["seconds"]) == {
        "preparation",
        *c.STAGES,
        "curation",
        "bpo",
        "evaluation",
    }
    assert all(value >= 0 for value in content["seconds"].values())


def test_the_table_is_made_of_the_records(finished):
    """A number in the report must be one that can be counted in the answers."""
    workdir, content, _ = finished
    for when in ("before", "after"):
        lines = (workdir / "evaluation" / f"{when}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert len(records) == len(TOPICS) * len(MODES) * QUESTIONS
        for topic in TOPICS:
            for mode in MODES:
                rows = [r for r in records if (r["topic"], r["mode"]) == (topic, mode)]
                cell = content[when][topic][mode]
                assert cell["accuracy"] == np.mean([r["answer"] == r["reference"] for r in rows])
                assert cell["tokens"] == np.mean([r["tokens"] for r in rows])


def test_the_figures_and_the_text_exist_and_name_one_another(finished):
    """A report whose pictures are missing is found out by its reader; better here."""
    workdir, _, _ = finished
    text = (workdir / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    drawn = {"accuracy.png", "tokens.png", "think_rate_steps.png", "accuracy_steps.png"}
    assert drawn <= set(linked)
    for name in linked:
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    assert all(topic in text for topic in TOPICS)


def test_every_stage_and_small_evaluation_left_its_records(finished, config):
    """The figures over steps are drawn from metrics.jsonl: step 0, every so many, and the last."""
    workdir, _, _ = finished
    for name in c.STAGES:
        records = read_metrics(str(workdir), name)
        assert [r["step"] for r in records] == [2]
        assert all(np.isfinite(v) for r in records for v in r.values() if v != name)
    records = read_metrics(str(workdir), "bpo")
    evaluated = [r["step"] for r in records if "eval/maths/think_rate" in r]
    assert evaluated == [0, 2]
    updates = [r for r in records if "reward/mean" in r]
    assert [r["step"] for r in updates] == [1, 2]
    for record in updates:
        assert record["ratio"] == 1.0 and record["think_rate"] == 0.5
        for mode in ("thinking", "non-thinking"):  # sampler and trainer mean the same distribution
            assert record[f"logp_gap/{mode}/mean"] <= record[f"logp_gap/{mode}/max"] < 1e-4
        assert 0 < record["occupancy"] <= 1 and record["reward_faults"] == 0
        assert 0 < record["mode_token_share"] < 1
        assert {"seconds/rollout", "seconds/reward", "seconds/update"} <= set(record)
        assert record["tokens_per_second/rollout"] > 0 and record["tokens_per_second/update"] > 0
    assert updates[0]["kl"] < 1e-9 and len(list((workdir / "tensorboard").iterdir())) == 7


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_setting_was_read_by_the_run(finished, cls):
    """By its own class, so that a namesake elsewhere cannot stand in for it."""
    _, _, reads = finished
    unread = {f.name for f in dataclasses.fields(cls)} - {n for k, n in reads if k == cls.__name__}
    unread -= {"max_grid_tiles"}  # this run's pictures are one tile each: tests/test_images.py
    unread -= {"max_importance"}  # of quantised rollouts alone: tests/test_rollouts.py
    if cls is c.EndpointConfig:  # the run's own model is teacher: tests/test_endpoint.py
        unread -= {f.name for f in dataclasses.fields(cls)} - {"url", "temperature"}
    if cls is c.CurationConfig:  # the world's thoughts need no reasoner: tests/test_curation.py
        unread -= {"banned", "max_thought_words", "num_traces"}
    assert unread == set()


def test_a_second_call_returns_the_report_and_touches_nothing(finished, config):
    """The same command again shows the report: no training, no file written."""
    workdir, content, _ = finished
    before = modified(workdir)
    assert main.run(config, str(workdir)) == content
    assert modified(workdir) == before


def test_other_settings_in_the_same_folder_are_refused_by_name(finished, config):
    """Half of one run and half of another would make a report of neither."""
    workdir, _, _ = finished
    before = modified(workdir)
    bpo = dataclasses.replace(config.bpo, g=3, topics={"maths": 1.0})
    other = dataclasses.replace(config, seed=1, bpo=bpo)
    with pytest.raises(c.ConfigError, match="other settings") as error:
        main.run(other, str(workdir))
    named = set(re.findall(r"config\.[\w.]+", str(error.value)))
    assert named == {"config.seed", "config.bpo.g"} | {
        f"config.bpo.topics.{topic}" for topic in config.bpo.topics
    }
    assert modified(workdir) == before


def test_a_lost_report_is_written_again_without_training(finished, config):
    """Stages that are done are read from their checkpoints, and evaluations from their files."""
    workdir, content, _ = finished
    (workdir / "report.json").unlink()
    kept = {"*/[0-9]*/**/*", "evaluation/*", "metrics.jsonl", "tokenizer.json"}
    before = [modified(workdir, pattern) for pattern in kept]
    again = main.run(config, str(workdir))
    assert [modified(workdir, pattern) for pattern in kept] == before
    assert again | {"seconds": 0} == content | {"seconds": 0}
    assert set(again["seconds"]) == set(content["seconds"])
    assert all(len(files) > 0 for files in before)


# Interrupted runs


class Killed(Exception):
    """Stands for the machine going away."""


@pytest.fixture(scope="module")
def world_tokenizer(finished):
    """The finished run's tokenizer."""
    return Tokenizer((finished[0] / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def resumable(config, finished, world_tokenizer) -> c.Config:
    """Six steps a stage, a checkpoint every two, a record of each, rows too short for some."""
    stream, _ = examples(config, "annealing", world_tokenizer, str(finished[0]))
    room = sorted(len(stream[i].tokens) for i in range(40))[25]
    stage = dataclasses.replace(config.annealing, num_steps=6, lr_vision=0.0, packed_len=room)
    bpo = dataclasses.replace(config.bpo, num_steps=4, updates_per_rollout=2)
    curated = c.SourceConfig(path=str(finished[0] / "curation" / "samples.jsonl"))
    return dataclasses.replace(
        config,
        sources=config.sources | {"curated": curated},
        annealing=stage,
        bpo=bpo,
        log_every=1,
        checkpoint_every=2,
    )


@pytest.fixture(scope="module")
def start(resumable, params):
    """Parameters for the resumable config: the tests' own, with as many embeddings as it wants."""
    language = dict(params["language_model"])
    shape = (resumable.model.language.vocab_size, resumable.model.language.width)
    table = np.random.default_rng(0).standard_normal(shape, np.float32) * 0.3
    language["embed_tokens"] = jnp.asarray(table)
    return params | {"language_model": language}


@pytest.fixture(scope="module")
def run_part(resumable, start, world_tokenizer):
    """(stage name, folder, kill after step) -> the parameters after the stage."""

    def run_part(name, workdir, kill_at=None):
        advance = Progress.advance

        def killing(self, count=1, **figures):
            advance(self, count, **figures)
            if count and (self.title, self.done) == (name.split()[-1], kill_at):
                raise Killed

        def go():
            given = jax.tree.map(jnp.array, start)  # a stage takes what it is given
            if name == "bpo":
                return loop.run_bpo(resumable, given, world_tokenizer, str(workdir))
            if name == "overlapped bpo":
                bpo = dataclasses.replace(resumable.bpo, overlap_rewards=True)
                ahead = dataclasses.replace(resumable, bpo=bpo)
                return loop.run_bpo(ahead, given, world_tokenizer, str(workdir))
            return run_stage(resumable, name, given, world_tokenizer, str(workdir))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Progress, "advance", killing)
            if kill_at is None:
                return jax.device_get(go())
            with pytest.raises(Killed):
                go()

    return run_part


@pytest.fixture(scope="module")
def uninterrupted(run_part, tmp_path_factory):
    """name -> (parameters, records) of a run that was left alone."""
    done = {}

    def get(name):
        if name not in done:
            workdir = tmp_path_factory.mktemp(f"whole-{name}")
            done[name] = run_part(name, workdir), records_of(workdir, name)
        return done[name]

    return get


def records_of(workdir, name) -> list[dict]:
    """The records of metrics.jsonl, times apart."""
    return [
        {k: v for k, v in record.items() if "second" not in k}
        for record in read_metrics(str(workdir), name.split()[-1])
    ]


@pytest.mark.parametrize(
    "name, kill_at", [("annealing", 1), ("annealing", 3), ("bpo", 3), ("overlapped bpo", 3)]
)
def test_an_interrupted_run_ends_bitwise_where_an_uninterrupted_one_does(
    name, kill_at, run_part, uninterrupted, tmp_path
):
    """Before the first checkpoint or after it: data, keys and moments all go on from there."""
    params, records = uninterrupted(name)
    run_part(name, tmp_path, kill_at)
    assert [r["step"] for r in records_of(tmp_path, name)][-1] == kill_at  # was on its way
    resumed = run_part(name, tmp_path)
    different = jax.tree.map(lambda x, y: not np.array_equal(x, y), params, resumed)
    assert not any(jax.tree.leaves(different))
    assert records_of(tmp_path, name) == records


def test_bpo_killed_before_its_first_checkpoint_leaves_no_record_twice(
    run_part, uninterrupted, tmp_path
):
    """The evaluation of step 0 is made again; the figures over steps must show it once."""
    _, records = uninterrupted("bpo")
    run_part("bpo", tmp_path, 1)
    run_part("bpo", tmp_path)
    assert records_of(tmp_path, "bpo") == records


def test_rollouts_sampled_ahead_are_one_step_old_and_no_older(uninterrupted):
    """Off by default: it changes what is learned. After a checkpoint nothing was sampled ahead."""
    ahead = uninterrupted("overlapped bpo")[1]
    gaps = [
        [r[f"logp_gap/{mode}/max"] for r in ahead if "loss" in r]
        for mode in ("thinking", "non-thinking")
    ]
    for gap in gaps:  # steps 1 and 3 are on-policy, 2 and 4 were sampled ahead
        assert max(gap[0], gap[2]) < 1e-4 < min(gap[1], gap[3])


def test_the_samples_set_aside_are_told_once_whatever_interrupts_the_stage(
    run_part, uninterrupted, tmp_path
):
    """Their number must not start anew, and each line of the log must be there once."""
    counts = [r["set_aside"] for r in uninterrupted("annealing")[1]]
    assert 0 < counts[1] < counts[-1]
    run_part("annealing", tmp_path, 3)
    run_part("annealing", tmp_path)
    assert [r["set_aside"] for r in records_of(tmp_path, "annealing")] == counts
    lines = (tmp_path / "set_aside.jsonl").read_text().splitlines()
    assert len(lines) == counts[-1]
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] <= 6


def test_people_train_on_their_own_files(config, tmp_path, monkeypatch):
    """A stage and BPO on a file, with no small world anywhere: no questions of its either."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    records = [
        {"id": i, "topic": "sums", "question": f"What is {i} + 1?", "answer": i + 1}
        | ({"thought": f"{i}+1={i + 1}"} if i % 2 else {})
        for i in range(30)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    none = {name: c.StageConfig() for name in c.STAGES}
    stage = dataclasses.replace(config.annealing, sources=(), mixture={"sums": (1.0, 1.0)})
    bpo = dataclasses.replace(
        config.bpo,
        sources=(),
        topics={"sums": 1.0},
        rewards={"sums": "even:even"},
        num_steps=1,
        eval_questions=0,
    )
    own = dataclasses.replace(
        config,
        **none | {"annealing": stage},
        sources={"mine": c.SourceConfig(path=str(tmp_path / "sums.jsonl"))},
        curation=c.CurationConfig(),
        bpo=bpo,
        eval_questions=0,
    )
    content = main.run(own, str(tmp_path / "run"))
    assert content["before"] == content["after"] == {}
    assert set(content["seconds"]) >= {"annealing", "bpo"}
    absent = dataclasses.replace(stage, mixture={"sumss": (1.0, 0.0)})
    with pytest.raises(c.ConfigError, match="did you mean sums"):
        main.run(dataclasses.replace(own, annealing=absent), str(tmp_path / "other"))


def test_a_finished_stage_returns_its_parameters_without_a_step(run_part, tmp_path):
    """Called again it must neither train nor write."""
    params = run_part("annealing", tmp_path)
    before = modified(tmp_path)
    again = run_part("annealing", tmp_path)
    assert modified(tmp_path) == before
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, again)))


def test_a_loss_that_is_not_finite_stops_the_stage_by_name_and_saves_nothing(
    resumable, start, world_tokenizer, tmp_path
):
    """Training on after a NaN wastes the night and overwrites the last good checkpoint."""
    config = dataclasses.replace(resumable, log_every=3, checkpoint_every=1)
    broken = jax.tree.map(jnp.array, start)
    broken |= {"image_newline": start["image_newline"] * np.nan}
    broken["projector"] = jax.tree.map(lambda x: x * np.nan, start["projector"])
    with pytest.raises(FloatingPointError, match="annealing, step"):
        run_stage(config, "annealing", broken, world_tokenizer, str(tmp_path))
    assert not list(tmp_path.glob("annealing/[0-9]*"))


def test_settings_that_cannot_work_leave_no_folder(tmp_path):
    """The check comes before anything is written."""
    bpo = dataclasses.replace(CONFIG.bpo, g=0, num_steps=1, rewards={"arithmetic": "maths"})
    broken = dataclasses.replace(CONFIG, bpo=bpo)
    with pytest.raises(c.ConfigError, match="bpo.g"):
        main.run(broken, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_on_other_devices_and_with_other_memory_but_not_as_another_run(tmp_path):
    """A pod of another size must be able to take over what one began."""
    main.claim(CONFIG, str(tmp_path))
    model = dataclasses.replace(CONFIG.model, remat="full")
    moved = dataclasses.replace(CONFIG, mesh=c.MeshConfig(data=2), model=model)
    main.claim(moved, str(tmp_path))
    with pytest.raises(c.ConfigError, match="config.seed"):
        main.claim(dataclasses.replace(moved, seed=1), str(tmp_path))


def test_a_trace_is_written_of_the_steps_asked_for_and_of_no_others(tmp_path):
    """A profile of all steps fills the disk; of none, the flag would lie."""
    for count, written in ((0, 0), (2, 1)):
        with contextlib.closing(Trace(str(tmp_path / str(count)), 2, count)) as trace:
            for step in range(1, 6):
                trace.step(step, jnp.ones(2))
                assert trace.runs == (2 <= step < 2 + count)
        assert len(list((tmp_path / str(count)).rglob("*.xplane.pb"))) == written


def test_the_clock_tells_waiting_from_working():
    """Whether a run is short of data or of devices is the first question to a slow one."""
    clock = StepClock()
    with clock.waiting():
        time.sleep(0.02)
    clock.step(tokens=300)
    clock.step(tokens=100)
    values = clock.record(flops_per_token=1.0)
    assert 0.01 <= values["seconds/input"] <= values["seconds/step"]
    total = 2 * values["seconds/step"]
    np.testing.assert_allclose(values["tokens_per_second"], 400 / total, rtol=1e-6)
