"""The accuracy/token knob: what is predicted offline is what a run gives, and which bias is
chosen."""

import dataclasses
import itertools
import json
import math
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import CONFIG, MODEL, one_a_row, questions
from transformers import GenerationConfig

import r4b_jax
from r4b_jax import calibrate, convert
from r4b_jax import config as c
from r4b_jax.common.checkpoint import ORIGINALS, StageCheckpoints
from r4b_jax.config import to_config_dict
from r4b_jax.data.examples import encode_sample
from r4b_jax.data.samples import Sample
from r4b_jax.decoding.chat import calibrated_bias
from r4b_jax.decoding.sampling import Sampling, choose
from r4b_jax.evaluation import evaluate as evaluation
from r4b_jax.evaluation import knob
from r4b_jax.evaluation.knob import Target
from r4b_jax.models.convert import CheckpointError
from r4b_jax.training.optimizer import stage_optimizer, trainable
from r4b_jax.training.step import TrainState, init_state, make_train_step


def record(mode: str, n: int = 0, topic: str = "maths", **fields) -> dict:
    """A record of query `n`."""
    return {"topic": topic, "mode": mode, "id": n, "p_think": 0.5, "tokens": 5, "correct": True} | (
        {"thought": "so" if mode == "thinking" else None, "answer": "7"} | fields
    )


def queries_of(odds, direct, thinking, topic="maths") -> knob.Queries:
    """Queries from their log-odds of thinking, and (right, tokens) in the two forced modes."""
    rows = []
    for n, (odd, (right, short), (found, long)) in enumerate(zip(odds, direct, thinking)):
        logps = [odd - 3.0, -3.0]
        rows += [
            record("non-thinking", n, topic, correct=right, tokens=short, mode_logps=logps),
            record("thinking", n, topic, correct=found, tokens=long, mode_logps=logps),
        ]
    return knob.pair(rows)


def random_queries(count: int, seed: int = 0) -> knob.Queries:
    """Thinking helps where its log-odds are high, with much noise."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0, 2, count)
    direct = [(bool(x), 4) for x in rng.random(count) < 1 / (1 + np.exp(odds))]
    thinking = [(bool(x), int(n)) for x, n in zip(rng.random(count) < 0.8, rng.poisson(20, count))]
    return queries_of(odds, direct, thinking)


# What is predicted is what a run gives


@pytest.fixture(scope="module")
def trained(params, tokenizer):
    """(parameters, questions): MODEL after it learned a dozen questions in both modes, thinking
    more or less likely by question; of some the direct answer it learned is not the right one."""
    asked = [
        q.answered(answer, thought)
        for q, answer, thought in zip(questions(), ("7", "6", "12"), ("3+4", "1", "top"))
    ]
    for i in range(9):
        asked.append(Sample.ask("maths", None, f"{i}?", f"{3 * i % 10}", f"{i}+{i}={2 * i}"))
    examples = []
    for i, question in enumerate(asked):
        direct = question.answered("5" if i % 4 == 0 else question.answer, None)
        for sample, weight in ((question, 0.4 + 0.1 * (i % 7)), (direct, 1 - 0.1 * (i % 7))):
            example = encode_sample(tokenizer, MODEL.vision, sample)
            weights = example.loss_weights * weight
            examples.append(dataclasses.replace(example, loss_weights=weights))
    batch = one_a_row(examples, max(len(e.tokens) for e in examples), tokenizer.pad_id)
    rates = dict(lr_language=1e-2, lr_projector=1e-2, lr_vision=1e-3)
    stage = c.StageConfig(num_steps=70, warmup_steps=5, **rates)
    state = init_state(params, stage_optimizer(stage), trainable(stage))
    state, train_step = jax.tree.map(jnp.array, state), make_train_step(MODEL, stage)
    for _ in range(stage.num_steps):
        state, _ = train_step(state, batch)
    return state.params, asked


@pytest.fixture(scope="module")
def evaluate(tokenizer):
    """(parameters, questions, settings of `evaluate`) -> records as they are read from a file."""
    sizes = dict(prompt_len=80, max_new_tokens=24, batch_size=6, queries_at_once=2)
    config = dataclasses.replace(CONFIG, generate=c.GenerateConfig(**sizes))

    def evaluate(params, asked, **settings):
        records = evaluation.evaluate(config, params, tokenizer, asked, **settings)
        return [json.loads(json.dumps(evaluation._as_json(record))) for record in records]

    return evaluate


OUTCOME = ("topic", "question", "thinks", "thought", "answer", "tokens", "correct")


def outcome(record: dict) -> tuple:
    return tuple(record[key] for key in OUTCOME)


@pytest.mark.parametrize("of_auto", [0.0, 50.0], ids=["plain", "all auto replies think"])
def test_what_is_predicted_for_a_bias_is_what_a_run_gives(trained, evaluate, of_auto):
    """The claim itself, record by record: mode, thought, answer, tokens, at three biases; also
    where the auto run had nothing to tell of direct replies, as their certificates do."""
    params, asked = trained
    queries = knob.pair(evaluate(params, asked, think_bias=of_auto))
    assert queries.certain.all() and knob.auto_differs(queries) == []
    curve = knob.curve(queries)
    assert curve.think_rate[0] == 0 and curve.think_rate[-1] == 1
    places = [len(curve.bias) // 4, len(curve.bias) // 2, 3 * len(curve.bias) // 4]
    seen = set()
    for place in places:
        bias = float(curve.bias[place])
        real = evaluate(params, asked, modes=("auto",), think_bias=bias)
        assert [outcome(r) for r in queries.predict(bias)] == [outcome(r) for r in real]
        assert curve.at(bias) == place
        assert curve.accuracy[place] == np.mean([r["correct"] for r in real])
        assert curve.tokens[place] == np.mean([r["tokens"] for r in real])
        assert curve.think_rate[place] == np.mean([r["thinks"] for r in real])
        seen.add((curve.accuracy[place], curve.think_rate[place]))
    assert len(seen) == 3  # the biases were not all alike


def test_a_model_that_would_take_neither_way_is_said_to_be_uncertain(params, trained, evaluate):
    """Random weights begin with any token, and the threshold is against that one: nothing may be
    called proven. What auto wrote where it did not think still stands for what lies below."""
    asked = trained[1][:6]
    queries = knob.pair(evaluate(params, asked))
    assert not queries.certain.any()
    assert any(row[knob.BELOW] is not row[knob.DIRECT] for row in queries.rows)
    low = evaluate(params, asked, modes=("auto",), think_bias=-50.0)
    assert [outcome(r) for r in queries.predict(-50.0)] == [outcome(r) for r in low]


@pytest.mark.parametrize(
    "thinking, direct, close, certain, certain_with_auto",
    [
        (0.5, 0.3, 0.9, True, True),
        (0.5, 0.2, 0.9, False, False),  # another token may have 0.3
        (0.98, 0.015, 0.9, True, True),
        (0.5, 0.3, 0.4, False, True),  # something else than </think> may have 0.6
    ],
)
def test_what_is_proven_is_proven_from_probabilities(
    thinking, direct, close, certain, certain_with_auto
):
    """A certificate that lies is worse than none: each of its two conditions is needed."""
    logps = {"mode_logps": [math.log(thinking), math.log(direct)]}
    direct = record("non-thinking", close_logp=math.log(close), **logps)
    queries = knob.pair([direct, record("thinking", **logps)])
    assert queries.certain.tolist() == [certain]
    old = knob.pair([record("non-thinking"), record("thinking")])  # P(think) alone
    assert old.certain.tolist() == [False]
    own = record("auto", **logps)  # it did not think: what follows the direct token is known
    both = knob.pair([direct, record("thinking", **logps), own])
    assert both.certain.tolist() == [certain_with_auto]


def test_auto_records_that_contradict_the_prediction_are_counted():
    """Records of two different checkpoints, or machines, give no curve; someone must notice."""
    rows = [record("non-thinking"), record("thinking", tokens=30)]
    agrees = record("auto", think_bias=-1.0)
    assert knob.auto_differs(knob.pair([*rows, agrees])) == []
    assert knob.auto_differs(knob.pair([*rows, agrees | {"thought": "so", "tokens": 31}])) == [0]


# The curve


def test_the_curve_by_hand():
    """Four queries that begin to think at -2, 0.5 and, two at once, 3."""
    queries = queries_of(
        [2.0, -3.0, -0.5, -3.0],
        [(0, 2), (1, 4), (1, 2), (0, 4)],
        [(1, 10), (1, 20), (0, 30), (1, 40)],
    )
    curve = knob.curve(queries)
    assert curve.lowest.tolist() == [-np.inf, -2.0, 0.5, 3.0]
    assert curve.highest.tolist() == [-2.0, 0.5, 3.0, np.inf]
    assert curve.think_rate.tolist() == [0, 0.25, 0.5, 1]
    assert curve.accuracy.tolist() == [0.5, 0.75, 0.5, 0.75]
    assert curve.tokens.tolist() == [3, 5, 12, 25]
    assert curve.ends.tolist() == [[0.5, 3], [0.75, 25]]
    assert curve.bias[1] == 0  # the model as it is, where that is the point
    assert [curve.at(b) for b in (-9, -2, -1, 0.5, 2.9, 3, 9)] == [0, 1, 1, 2, 2, 3, 3]
    assert all(curve.at(b) == i for i, b in enumerate(curve.bias))


def test_queries_that_float32_cannot_tell_apart_move_as_one():
    """A bias between two thresholds that rounding may swap would promise what no run keeps; and at
    the threshold itself greedy auto mode thinks, as the thinking token has the lower id."""
    queries = queries_of([1.0, 1.0, 1.0 + 1e-5, 0.9], [(0, 1)] * 4, [(1, 2)] * 4)
    curve = knob.curve(queries)
    assert curve.think_rate.tolist() == [0, 0.75, 1]
    assert [r["mode"] for r in queries.predict(-1.0)] == ["thinking"] * 3 + ["non-thinking"]
    thinking, direct = 1, 4
    logits = np.zeros((1, 6), np.float32)
    logits[0, [thinking, direct]] = 2.0, 3.0
    keys = jax.random.split(jax.random.key(0), 1)
    for bias, token in ((1.0, thinking), (0.999, direct)):
        biased = jnp.asarray(logits).at[:, thinking].add(bias)
        assert choose(biased, keys, Sampling.of())[0].tolist() == [token]


def test_the_thinking_token_has_the_lower_id(tokenizer):
    """The rule for equal logits rests on it; Qwen3's are 198 and 271."""
    assert tokenizer.thinking_id < tokenizer.direct_id


def test_probabilities_rounded_to_0_and_1_never_move():
    """Old records hold P(think) alone: where it is 1 no finite bias is known to change the mode."""
    rows = []
    for n, p in enumerate((1.0, 0.5, 0.0)):
        rows += [
            record(m, n, p_think=p, tokens=t) for m, t in (("non-thinking", 1), ("thinking", 7))
        ]
    curve = knob.curve(knob.pair(rows))
    np.testing.assert_allclose(curve.think_rate, [1 / 3, 2 / 3])
    assert curve.tokens.tolist() == [3, 5] and np.isfinite(curve.bias).all()


def test_the_curve_is_the_mean_of_what_is_predicted_at_every_point():
    """Sums along the sorted thresholds against one prediction a query, with and without weights."""
    queries = random_queries(60)
    for some in (queries, dataclasses.replace(queries, weights=np.arange(1.0, 61))):
        curve = knob.curve(some)
        for i, bias in enumerate(curve.bias):
            rows = some.predict(bias)
            for values, field in ((curve.accuracy, "correct"), (curve.tokens, "tokens")):
                wanted = np.average([r[field] for r in rows], weights=some.weights)
                np.testing.assert_allclose(values[i], wanted, rtol=1e-12)


def test_random_mixing_is_the_expectation_over_all_ways_to_mix():
    """The baseline is exact: every subset of queries that may think, with its probability."""
    queries, p = random_queries(6), 0.3
    expected = np.zeros(2)
    for thinks in itertools.product((0, 1), repeat=6):
        side = np.array(thinks) + knob.DIRECT
        both = [v[np.arange(6), side].mean() for v in (queries.scores, queries.tokens)]
        expected += p ** sum(thinks) * (1 - p) ** (6 - sum(thinks)) * np.array(both)
    np.testing.assert_allclose(knob.random_mixing(queries.ends(), np.array([p]))[:, 0], expected)


def test_areas_by_hand_and_of_a_knob_that_knows_nothing():
    """Two of four need the thought: known, the area is 1/8; equal odds for all, it is 0."""
    direct, thinking = [(0, 1), (0, 1), (1, 1), (1, 1)], [(1, 5)] * 4
    for odds, area in (
        ([4.0, 3.0, 2.0, 1.0], 0.125),
        ([1.0] * 4, 0),
        ([1.0, 2.0, 3.0, 4.0], -0.125),
    ):
        curve = knob.curve(queries_of(odds, direct, thinking))
        found = knob.areas(curve.think_rate, curve.accuracy, curve.tokens, curve.ends)
        np.testing.assert_allclose(found, [area, area], atol=1e-12)
    longer = queries_of([1.0, 2.0], [(1, 5)] * 2, [(1, 5)] * 2)  # thinking takes no more
    curve = knob.curve(longer)
    assert np.isnan(knob.areas(curve.think_rate, curve.accuracy, curve.tokens, curve.ends)[1])


# How sure


def test_intervals_are_those_of_a_mean_and_repeat_with_their_seed():
    """The width of a proportion is known; and a report must not change when it is made again."""
    queries = random_queries(400)
    points = np.array([0, 200, 400])
    one, same, other = (knob.resample(queries, points, 500, seed) for seed in (0, 0, 1))
    assert np.array_equal(one.accuracy, same.accuracy)
    assert not np.array_equal(one.accuracy, other.accuracy)
    curve = knob.curve(queries)
    for i, point in enumerate(points):
        p = curve.accuracy[point]
        low, high = knob.interval(one.accuracy[:, i])
        assert low < p < high
        np.testing.assert_allclose(high - low, 2 * 1.96 * (p * (1 - p) / 400) ** 0.5, rtol=0.15)
    assert np.array_equal(one.ends[:, 1, 0], one.accuracy[:, 2])  # the same queries throughout


def test_resamples_keep_each_topics_number_of_queries():
    """The benchmarks are chosen, not drawn: their mixture is no source of noise."""
    sure, never = ([(x, 1)] * 30 for x in (1, 0))
    rows = [
        r for t, d in (("a", sure), ("b", never)) for r in _rows(queries_of([0.0] * 30, d, d, t))
    ]
    sample = knob.resample(knob.pair(rows), np.array([0]), 20)
    assert np.ptp(sample.accuracy) == 0 and sample.accuracy[0, 0] == 0.5


def _rows(queries: knob.Queries) -> list[dict]:
    return [r for row in queries.rows for r in row[1:]]


def test_topics_of_equal_weight():
    """A benchmark of many queries must not decide alone, where that is asked for."""
    many, few = (
        queries_of([0.0] * 9, [(1, 2)] * 9, [(1, 4)] * 9, "many"),
        queries_of([1.0], [(0, 8)], [(0, 16)], "few"),
    )
    queries = knob.pair(_rows(many) + _rows(few))
    assert knob.curve(queries).accuracy[0] == 0.9
    np.testing.assert_allclose(queries.equal_topics().ends(), [[0.5, 5], [0.5, 10]])


# Which bias


def hand_made() -> knob.Curve:
    """Accuracy 0.5, 0.75, 0.5, 0.75 at 3, 5, 12, 25 tokens, thinking of 0, 1, 2, 4 of 4."""
    return knob.curve(
        queries_of(
            [2.0, -3.0, -0.5, -3.0],
            [(0, 2), (1, 4), (1, 2), (0, 4)],
            [(1, 10), (1, 20), (0, 30), (1, 40)],
        )
    )


@pytest.mark.parametrize(
    "rule, value, point",
    [
        ("tokens", 12, 1),  # more tokens would be allowed, and are worse
        ("tokens", 4.9, 0),
        ("tokens", 99, 1),  # of equals the fewer tokens
        ("think_rate", 0.6, 2),
        ("think_rate", 0.75, 2),  # as near as 1: fewer tokens
        ("drop", 0.0, 1),
        ("drop", 0.25, 0),
        ("best", 0.0, 1),
        ("bias", 2.0, 2),
    ],
)
def test_each_rule_chooses_what_it_says(rule, value, point):
    """The words of the help are the contract."""
    assert knob.choose(hand_made(), Target(rule, value)) == point


def test_targets_that_cannot_be_met_are_refused():
    """A bias that misses the budget must not be written."""
    with pytest.raises(ValueError, match="3.00 tokens, the fewest"):
        knob.choose(hand_made(), Target("tokens", 2))
    for rule, value in (("think_rate", 1.2), ("drop", -0.1), ("fastest", 0), ("bias", math.inf)):
        with pytest.raises(ValueError):
            Target(rule, value)


def test_the_held_out_figure_is_without_the_winners_luck():
    """Where nothing is to be gained, the best point of many looks better than it is."""
    rng = np.random.default_rng(0)
    seen, apart = [], []
    for _ in range(20):
        coin = [(bool(x), 5) for x in rng.random(60) < 0.5]
        other = [(bool(x), 5) for x in rng.random(60) < 0.5]
        queries = queries_of(rng.normal(size=60), coin, other)
        curve, target = knob.curve(queries), Target("best")
        seen.append(curve.accuracy[knob.choose(curve, target)])
        apart.append(knob.held_out(queries, target)[1])
    assert np.mean(seen) > 0.56 > 0.53 > np.mean(apart)
    fixed = knob.held_out(queries, Target("bias", 0.1))
    assert fixed[1] == pytest.approx(curve.accuracy[curve.at(0.1)])  # nothing chosen, nothing lost
    assert knob.held_out(queries.take(np.arange(19)), target) is None


# Records


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no records"),
        ([record("thinking")], "not answered in mode non-thinking"),
        ([record("thinking"), record("thinking")], "twice"),
        ([record("thinking", question="a"), record("non-thinking", question="b")], "same question"),
        ([record("thinking", p_think=2), record("non-thinking", p_think=2)], "P\\(think\\)"),
        ([record("thinking", correct=3), record("non-thinking")], "from 0 to 1"),
        ([{"loss": 1.0}], "no record of an evaluation"),
    ],
)
def test_records_that_make_no_curve_are_named(rows, message):
    """Half an evaluation gives half a curve, and nobody would see which."""
    with pytest.raises(ValueError, match=message):
        knob.pair(rows)


def test_queries_without_ids_pair_in_the_order_of_their_records():
    """The records of a run name none; many of the small world's questions read alike."""
    rows = [record(m, tokens=n) for n in range(3) for m in ("auto", "thinking", "non-thinking")]
    for row in rows:
        del row["id"]
    assert knob.pair(rows).tokens[:, knob.THINKING].tolist() == [0, 1, 2]


# What is written, and read again


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """A Hugging Face folder whose generation config has a setting of its own."""
    folder = tmp_path_factory.mktemp("whole")
    return reference.save(reference.whole(tokenizer), tokenizer, folder, released=False)


def copy_of(folder, target):
    """Its side files alone."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".json":
            (target / path.name).write_text(path.read_text())
    return target


def test_a_loaded_model_takes_its_calibrated_bias_unless_another_is_asked_for(whole):
    """What `--write` is for; and it must stay possible to ask for the model as it was trained."""
    settings = dict(mode="auto", max_new_tokens=4)
    plain = r4b_jax.load(whole)
    assert plain.think_bias == 0
    try:
        file = calibrate.write_bias(str(whole), 60.0)
        model = r4b_jax.load(whole)
        assert model.think_bias == 60.0
        reply = model.chat("Sum?", **settings)
        assert reply.mode == "thinking" and reply == plain.chat("Sum?", think_bias=60.0, **settings)
        direct = model.chat("Sum?", mode="short", max_new_tokens=4)
        assert direct == plain.chat("Sum?", mode="short", max_new_tokens=4)
        own = model.chat("Sum?", think_bias=0.0, **settings)
        assert own == plain.chat("Sum?", **settings)
        # Others read the same file, and find in it what they did before.
        assert GenerationConfig.from_pretrained(whole).think_bias == 60.0
        assert json.loads(open(file).read()) == {"do_sample": False, "think_bias": 60.0}
    finally:
        (whole / "generation_config.json").write_text('{"do_sample": false}')


def test_a_generation_config_that_was_not_there_still_ends_replies(whole, tmp_path):
    """transformers reads the end token off config.json only where there is no generation config:
    one with our key alone would make it generate for ever."""
    folder = copy_of(whole, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 42
    config["pad_token_id"] = 41
    (folder / "config.json").write_text(json.dumps(config))
    calibrate.write_bias(str(folder), -1.5)
    written = json.loads((folder / "generation_config.json").read_text())
    assert written["eos_token_id"] == 42 and written["pad_token_id"] == 41
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 42
    assert calibrated_bias(str(folder)) == -1.5


def test_a_file_is_replaced_whole_and_a_link_leaves_what_it_points_to(whole, tmp_path, monkeypatch):
    """Folders of the Hugging Face cache are links to files that other folders share; and a full
    disk must not cost a checkpoint its generation config."""
    folder = copy_of(whole, tmp_path / "model")
    shared, file = tmp_path / "blob", folder / "generation_config.json"
    file.rename(shared)
    file.symlink_to(shared)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        calibrate.write_bias(str(folder), 2.0)
    assert file.is_symlink() and calibrated_bias(str(folder)) == 0
    calibrate.write_bias(str(folder), 2.0)
    assert calibrated_bias(str(folder)) == 2.0
    assert shared.read_text() == '{"do_sample": false}'


def test_a_converted_checkpoint_keeps_its_bias_through_export(whole, params, tmp_path):
    """It is one of the side files that go with the weights."""
    made = types.SimpleNamespace(sources=[str(whole)], target=str(tmp_path / "made"), seed=0)
    convert.import_command(made)
    file = calibrate.write_bias(made.target, 0.75)
    assert file == os.path.join(made.target, ORIGINALS, "generation_config.json")
    assert r4b_jax.load(made.target).think_bias == 0.75
    convert._export(made.target, str(tmp_path / "out"))
    assert calibrated_bias(str(tmp_path / "out")) == 0.75


def test_the_bias_of_a_stage_is_of_the_step_it_was_measured_at(tmp_path, params, tokenizer, capsys):
    """Trained on, the stage has other log-odds: the old bias must not act unseen."""
    run, stage = tmp_path, str(tmp_path / "bpo")
    (run / "config.json").write_text(to_config_dict(CONFIG).to_json())
    tokenizer.save(str(run))

    def save(step):
        checkpoints = StageCheckpoints(stage)
        checkpoints.save(TrainState(jnp.int32(step), params, {}), {"position": 0})
        checkpoints.close()

    (run / "bpo").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        calibrate.write_bias(stage, 1.0)
    save(3)
    assert calibrate.write_bias(stage + os.sep, -0.25) == stage + ".generation_config.json"
    assert r4b_jax.load(stage).think_bias == -0.25
    assert capsys.readouterr().err == ""
    save(5)
    assert r4b_jax.load(stage).think_bias == 0
    assert "is of step 3 and not of 5: not used" in capsys.readouterr().err


def test_a_bias_that_is_none_is_refused_on_both_sides(whole, tmp_path):
    """A forced mode hidden in a checkpoint, or a word in place of a number, helps nobody."""
    folder = copy_of(whole, tmp_path / "model")
    for bias in (math.inf, math.nan):
        with pytest.raises(ValueError, match="infinite"):
            calibrate.write_bias(str(folder), bias)
    with pytest.raises(CheckpointError, match="no config.json"):
        calibrate.write_bias(str(tmp_path / "nothing"), 1.0)
    for value in ('"high"', "Infinity", "true"):
        (folder / "generation_config.json").write_text(f'{{"think_bias": {value}}}')
        with pytest.raises(CheckpointError, match="think_bias is a finite number"):
            calibrated_bias(str(folder))


# The command line


def front(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["calibrate", *map(str, args)])
    calibrate.main()


@pytest.fixture
def records(tmp_path):
    """A file of records of two topics, and of a run folder that holds it."""
    folder = tmp_path / "run" / "evaluation"
    folder.mkdir(parents=True)
    rows = _rows(random_queries(60))
    rows += [row | {"topic": "ocr"} for row in _rows(random_queries(40, 1))]
    (folder / "after.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "after.jsonl"


def test_a_run_is_calibrated_from_the_command_line(records, whole, tmp_path, monkeypatch, capsys):
    """Records in; report, figure and bias out, the same from the folder and from the file."""
    model = copy_of(whole, tmp_path / "model")
    front(monkeypatch, records.parents[1], "--max-drop", 0.02, "--write", model)
    told = capsys.readouterr().out
    content = json.loads((records.parent / "knob.json").read_text())
    queries = knob.pair(knob.read(str(records)))
    curve = knob.curve(queries)
    point = knob.choose(curve, Target("drop", 0.02))
    chosen = content["overall"]["chosen"]
    assert calibrated_bias(str(model)) == chosen["bias"] == curve.bias[point]
    assert f"think_bias {chosen['bias']:g} written to" in told and "tenfold" in told
    assert chosen["tokens"][0] == curve.tokens[point]
    assert chosen["tokens"][1] < chosen["tokens"][0] < chosen["tokens"][2]
    assert set(content["topics"]) == {"maths", "ocr"}
    parts = [content["topics"][t]["chosen"]["accuracy"][0] for t in ("maths", "ocr")]
    np.testing.assert_allclose(0.6 * parts[0] + 0.4 * parts[1], curve.accuracy[point])
    table = (records.parent / "knob.md").read_text()
    assert "| all | never |" in table and "| ocr | never |" in table and "(knob.png)" in table
    assert (records.parent / "knob.png").stat().st_size > 20_000
    front(monkeypatch, records, "--max-drop", 0.02, "--out", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "knob.json").read_text()) == content


def test_without_a_choice_there_is_a_curve_and_nothing_is_written(records, monkeypatch, capsys):
    """One may look before one chooses; and --write alone would have nothing to write."""
    front(monkeypatch, records, "--resamples", 20, "--equal-topics")
    content = json.loads((records.parent / "knob.json").read_text())
    assert "chosen" not in content["overall"] and content["target"] is None
    assert "topics weigh the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        (["none.jsonl"], "there are no records none.jsonl"),
        (["RECORDS", "--target-tokens", "0.5"], "the fewest there are"),
        (["RECORDS", "--write", "model"], "--write needs a choice"),
        (["RECORDS", "--bias", "inf"], "a finite number"),
        (["RECORDS", "--best", "--resamples", "1"], "at least 2"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(args, message, records, monkeypatch, capsys):
    """No trace back for what a person got wrong, and nothing half done."""
    with pytest.raises(SystemExit) as stop:
        front(monkeypatch, *[records if a == "RECORDS" else a for a in args])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("r4b_jax: ") and message in error and error.count("\n") == 1
    assert not (records.parent / "knob.json").exists()
