"""generate: cached = uncached for all modes at once, and what may and may not be sampled."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODEL, one_a_row, questions, with_reply

from r4b_jax.data import dialogue
from r4b_jax.data.examples import encode_prompt
from r4b_jax.decoding.generate import Ids, forced_array, generate
from r4b_jax.decoding.prompts import bucket, pad_prompts
from r4b_jax.decoding.sampling import Sampling, choose
from r4b_jax.models.attention import attend

PROMPT_LEN, NEW = 44, 8
PATCHES = MODEL.vision.num_patches
MODES = dialogue.MODES


@pytest.fixture(scope="module")
def ids(tokenizer) -> Ids:
    return Ids.of(tokenizer)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Three prompts of different lengths, two of them with a picture."""
    made = [encode_prompt(tokenizer, MODEL.vision, q) for q in questions()]
    assert len({len(p.tokens) for p in made}) == 3 and max(len(p.tokens) for p in made) < PROMPT_LEN
    return made


@pytest.fixture(scope="module")
def forced(tokenizer):
    return [dialogue.forced_ids(tokenizer, mode) for mode in MODES]


@pytest.fixture(scope="module")
def run(prompts, forced, ids, tokenizer):
    """(params, temperature) -> the three prompts answered in the three modes."""

    def run(params, temperature, seed=5, padded=None, max_direct_tokens=None, **at_once):
        padded = padded or pad_prompts(prompts, PROMPT_LEN, tokenizer.pad_id, PATCHES)
        keys = jax.random.split(jax.random.key(seed), (3, 3))
        array = forced_array(forced, 3)
        out = generate(
            MODEL,
            params,
            padded,
            array,
            keys,
            ids,
            max_new_tokens=NEW,
            sampling=Sampling.of(temperature, max_direct_tokens=max_direct_tokens),
            **at_once,
        )
        return jax.device_get(out)

    return run


@pytest.fixture(scope="module")
def greedy(run, params):
    return run(params, 0.0)


@pytest.fixture(scope="module")
def sampled(run, params):
    return run(params, 1.0)


def rigged(params, rows: dict[int, np.ndarray]) -> dict:
    """`params` with other rows in the embedding, which is the head as well."""
    table = np.array(params["language_model"]["embed_tokens"])
    for token, row in rows.items():
        table[token] = row
    return params | {"language_model": params["language_model"] | {"embed_tokens": table}}


def axis(value: float) -> np.ndarray:
    """A row of the head whose logit is `value` times the hidden state's first number."""
    return np.eye(MODEL.language.width, dtype=np.float32)[0] * value


def plain_rows(tokenizer, out):
    """Every reply behind its prompt as an ordinary sequence: a Batch, and (q, r, places) a row."""
    examples, rows = [], []
    for q, question in enumerate(questions()):
        for r in range(out.tokens.shape[1]):
            length = out.lengths[q, r]
            example = with_reply(tokenizer, question, out.tokens[q, r, :length])
            start = len(example.tokens) - length
            rows.append((q, r, slice(start, start + length)))
            examples.append(example)
    return one_a_row(examples, PROMPT_LEN + NEW, tokenizer.pad_id), rows


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_log_probabilities_are_those_of_the_plain_forward_pass(
    temperature, greedy, sampled, params, logps_of, tokenizer, ids
):
    """Cache, shared prefix and positions at once: BPO's ratios rest on this equality."""
    out = sampled if temperature else greedy
    batch, rows = plain_rows(tokenizer, out)
    logps = np.asarray(logps_of(params, batch, never=ids.never))
    for row, (q, r, places) in enumerate(rows):
        length = out.lengths[q, r]
        np.testing.assert_allclose(out.logps[q, r, :length], logps[row, places], atol=3e-5)
        assert not out.logps[q, r, length:].any()


def test_greedy_tokens_are_the_most_likely_of_the_plain_forward_pass(
    greedy, params, logits_of, tokenizer, ids, forced
):
    """The free tokens of all three modes, with and without pictures, from one prefill."""
    batch, rows = plain_rows(tokenizer, greedy)
    best = np.asarray(logits_of(params, batch, never=ids.never)).argmax(-1)
    replies = set()
    for row, (q, r, places) in enumerate(rows):
        free = slice(len(forced[r]), greedy.lengths[q, r])
        reply = greedy.tokens[q, r, free]
        np.testing.assert_array_equal(reply, best[row, places][free])
        replies.add(tuple(reply))
    assert len(replies) >= 8  # prompts and modes lead to different replies


def test_mode_log_probabilities_are_those_of_the_first_auto_token(
    greedy, params, logits_of, tokenizer, ids
):
    """P(think) is read off the prefill: it must be what auto mode really samples from."""
    batch, rows = plain_rows(tokenizer, greedy)
    logits = logits_of(params, batch, never=ids.never)
    logps = np.asarray(jax.nn.log_softmax(logits))
    for row, (q, _, places) in enumerate(rows):
        expected = logps[row, places.start, [ids.thinking, ids.direct]]
        np.testing.assert_allclose(greedy.mode_logps[q], expected, atol=3e-5)
    thinking, direct = MODES.index("thinking"), MODES.index("non-thinking")
    forced = greedy.logps[:, [thinking, direct], 0]
    np.testing.assert_allclose(forced, greedy.mode_logps, rtol=1e-6)


def test_a_rollouts_samples_do_not_depend_on_its_neighbours(
    sampled, params, prompts, forced, ids, tokenizer
):
    """Same key, alone or in company: groups may be split over machines and batches at will."""
    keys = jax.random.split(jax.random.key(5), (3, 3))
    for q, r in ((1, 2), (2, 1)):
        alone = generate(
            MODEL,
            params,
            pad_prompts([prompts[q]], PROMPT_LEN, tokenizer.pad_id, PATCHES),
            forced_array([forced[r]], 1),
            keys[q : q + 1, r : r + 1],
            ids,
            max_new_tokens=NEW,
            sampling=Sampling.of(1.0),
        )
        np.testing.assert_array_equal(alone.tokens[0, 0], sampled.tokens[q, r])
        np.testing.assert_allclose(alone.logps[0, 0], sampled.logps[q, r], atol=3e-5)


@pytest.mark.parametrize("queries_at_once, rollouts_at_once", [(1, 1), (1, 3), (3, 1), (2, 2)])
def test_rows_that_enter_late_are_answered_as_if_there_had_been_room_for_all(
    queries_at_once, rollouts_at_once, run, params, ids
):
    """Refill = no refill: slots, prompts' caches and columns of the ring change hands, and some
    rollouts end early, others are cut off."""
    rig = rigged(params, {ids.end: axis(-5.0)})
    roomy = run(rig, 1.0, seed=9)
    assert len(set(roomy.lengths.ravel())) > 2 and roomy.lengths.max() == NEW
    tight = run(
        rig, 1.0, seed=9, queries_at_once=queries_at_once, rollouts_at_once=rollouts_at_once
    )
    np.testing.assert_array_equal(tight.tokens, roomy.tokens)
    np.testing.assert_array_equal(tight.lengths, roomy.lengths)
    np.testing.assert_allclose(tight.logps, roomy.logps, atol=3e-5)
    np.testing.assert_allclose(tight.mode_logps, roomy.mode_logps, atol=3e-5)
    # What it is for: slots stand idle less.
    assert tight.occupancy > roomy.occupancy
    slots = queries_at_once * rollouts_at_once
    assert tight.occupancy == pytest.approx(tight.lengths.sum() / (tight.steps * slots))
    if slots == 1:
        assert tight.steps == tight.lengths.sum()


def test_rollouts_at_work_together_take_no_longer_than_the_longest(run, params):
    """Steps are those of the longest reply, not of their sum: rows really run side by side."""
    out = run(params, 0.0)
    assert out.steps == out.lengths.max()


def test_no_query_waits_while_there_is_room_for_it(params, prompts, ids, tokenizer):
    """Queries enter some at a time; the last ones are fewer, and must not wait for another group to
    end: twice the steps, with every slot free."""
    many = (prompts * 6)[:17]
    keys = jax.random.split(jax.random.key(5), (17, 1))
    out = generate(
        MODEL,
        params,
        pad_prompts(many, PROMPT_LEN, tokenizer.pad_id, PATCHES),
        forced_array([[]], 17),
        keys,
        ids,
        max_new_tokens=3,
        sampling=Sampling.of(1.0),
    )
    assert out.steps == 3


def test_each_mode_has_its_own_budget(run, greedy, params, ids):
    """A direct answer that does not end must not cost what a trace may."""
    out = run(params, 0.0, max_direct_tokens=4)
    thinks = greedy.tokens[..., 0] == ids.thinking
    assert thinks.any() and not thinks.all()
    np.testing.assert_array_equal(out.lengths, np.where(thinks, NEW, 4).clip(max=greedy.lengths))
    for q, r in np.ndindex(out.lengths.shape):
        kept = out.lengths[q, r]
        np.testing.assert_array_equal(out.tokens[q, r, :kept], greedy.tokens[q, r, :kept])
        assert np.all(out.tokens[q, r, kept:] == ids.pad)


def largest_array(compiled) -> int:
    """Numbers in the largest array of a compiled program."""
    shapes = re.findall(r"\b[a-z]+[0-9]+\[([0-9,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_no_buffer_of_the_compiled_program_holds_the_prefix_once_a_rollout(
    params, prompts, ids, tokenizer
):
    """Sharing that the compiler undoes is none: 16 copies of a 7,000-token prompt fill a TPU."""
    rollouts, kv, head_dim = 16, MODEL.language.num_kv_heads, MODEL.language.head_dim
    padded = pad_prompts(prompts, PROMPT_LEN, tokenizer.pad_id, PATCHES)
    copies = len(prompts) * rollouts * PROMPT_LEN * kv * head_dim
    keys = jax.random.split(jax.random.key(0), (3, rollouts))
    compiled = generate.lower(
        MODEL,
        params,
        padded,
        forced_array([[]] * rollouts, 3),
        keys,
        ids,
        max_new_tokens=NEW,
        sampling=Sampling.of(1.0),
    ).compile()
    assert largest_array(compiled) < copies
    # The check can fail: attention on repeated keys has such a buffer.
    q = np.zeros((3 * rollouts, 1, MODEL.language.num_heads, head_dim), np.float32)
    k = np.zeros((3, PROMPT_LEN, kv, head_dim), np.float32)
    repeated = jax.jit(
        lambda q, k: attend(q, jnp.repeat(k, rollouts, 0), jnp.repeat(k, rollouts, 0), None)
    )
    assert largest_array(repeated.lower(q, k).compile()) >= copies


def test_samples_depend_on_their_keys(run, sampled, params):
    """2g rollouts that were all alike would have no advantage ever."""
    other = run(params, 1.0, seed=6)
    assert np.all(np.any(other.tokens != sampled.tokens, -1))


def test_forced_tokens_come_first_and_auto_is_forced_to_nothing(greedy, sampled, tokenizer):
    """The three modes of the paper's table; in auto mode the model's own token decides."""
    for out in (greedy, sampled):
        for r, mode in enumerate(MODES):
            begin = dialogue.forced_ids(tokenizer, mode)
            np.testing.assert_array_equal(out.tokens[:, r, : len(begin)], [begin] * 3)
    auto = sampled.tokens[:, MODES.index("auto"), 0]
    assert not set(auto) & {tokenizer.thinking_id, tokenizer.direct_id}  # of 300, by its own choice


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_may_not_be_sampled_never_are_even_when_their_logits_win(
    temperature, run, params, ids, logits_of, tokenizer
):
    """A second `<think>` or a picture token out of nowhere would break every reader of replies."""
    up, down, *_ = ids.never
    rig = rigged(params, {up: axis(900.0), down: axis(-900.0)})
    out = run(rig, temperature)
    batch, rows = plain_rows(tokenizer, out)
    logits = np.asarray(logits_of(rig, batch))
    for row, (q, r, places) in enumerate(rows):
        # Unbanned, one of the two would win nearly everywhere ...
        assert np.isin(logits[row, places].argmax(-1), [up, down]).mean() > 0.8
        # ... and neither it nor another of them ever does.
        assert not np.isin(out.tokens[q, r, : out.lengths[q, r]], ids.never).any()


def test_a_row_ends_at_the_end_token_with_padding_after_it_and_goes_on_without(run, params, ids):
    """Lengths count the end token; what was written after a row's end must not be read."""
    out = run(rigged(params, {ids.end: axis(-5.0)}), 1.0, seed=9)
    ended = 0
    for tokens, logps, length in zip(
        out.tokens.reshape(9, -1), out.logps.reshape(9, -1), out.lengths.ravel()
    ):
        if ids.end in tokens:
            ended += 1
            assert length == list(tokens).index(ids.end) + 1
            assert np.all(tokens[length:] == ids.pad) and not logps[length:].any()
        else:
            assert length == NEW and ids.pad not in tokens
    assert 1 < ended < 9
    assert len(set(out.lengths.ravel())) > 2


def test_what_stands_in_the_padding_of_prompts_changes_nothing(
    run, greedy, params, prompts, tokenizer
):
    """Prompts of a batch differ in length: the places after them must be out of sight."""
    padded = pad_prompts(prompts, PROMPT_LEN, tokenizer.pad_id, PATCHES)
    noise = np.random.default_rng(0).integers(6, 290, padded.tokens.shape)
    real = np.arange(PROMPT_LEN) < padded.lengths[:, None]
    dirty = dataclasses.replace(padded, tokens=np.where(real, padded.tokens, noise).astype("int32"))
    out = run(params, 0.0, padded=dirty)
    np.testing.assert_array_equal(out.tokens, greedy.tokens)
    np.testing.assert_array_equal(out.logps, greedy.logps)


def test_the_length_prompts_are_padded_to_changes_nothing(run, greedy, params, prompts, tokenizer):
    """Buckets of other lengths must give the same answers."""
    out = run(params, 0.0, padded=pad_prompts(prompts, PROMPT_LEN + 7, tokenizer.pad_id, PATCHES))
    np.testing.assert_array_equal(out.tokens, greedy.tokens)
    np.testing.assert_allclose(out.logps, greedy.logps, atol=3e-5)


@pytest.mark.parametrize("needed, length", [(1, 11), (11, 11), (12, 22), (22, 22), (23, 44)])
def test_prompts_are_padded_to_few_lengths(needed, length):
    """A length is a compilation: three at most, and none four times too long."""
    assert bucket(needed, 44) == length


def test_a_prompt_that_is_too_long_is_refused(prompts, tokenizer):
    """Cutting it would ask another question."""
    with pytest.raises(ValueError, match="prompt_len = 20"):
        pad_prompts(prompts, 20, tokenizer.pad_id, PATCHES)


def test_drawing_by_blocks_follows_the_distribution_and_never_gives_what_has_no_weight():
    """A vocabulary of several blocks, the last padded, most tokens and one block impossible."""
    size, count = 400, 20_000
    rng = np.random.default_rng(0)
    weights = rng.random(size) * (rng.random(size) < 0.3)
    weights[128:256] = 0
    weights[[0, 399]] = 2.0, 3.0
    expected = weights / weights.sum()
    logits = np.where(weights > 0, np.log(np.maximum(weights, 1e-9)), -1e30).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), count)
    tokens, logps = jax.jit(choose)(np.tile(logits, (count, 1)), keys, Sampling.of(1.0))
    assert np.all(weights[tokens] > 0)
    np.testing.assert_allclose(np.exp(logps), expected[tokens], rtol=1e-4)
    found = np.bincount(tokens, minlength=size) / count
    assert np.all(np.abs(found - expected) < 5 * np.sqrt(expected / count) + 1e-12)


def test_choosing_follows_the_distribution_at_any_temperature():
    """Temperature divides logits, 0 is greedy, and the log-probability is that of the sampler."""
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32)).repeat(4000, 0)
    keys = jax.random.split(jax.random.key(0), 4000)
    for temperature, expected in ((1.0, [0.5, 0.3, 0.2]), (0.5, [25 / 38, 9 / 38, 4 / 38])):
        tokens, logps = choose(logits, keys, Sampling.of(temperature))
        np.testing.assert_allclose(np.bincount(tokens) / 4000, expected, atol=0.03)
        np.testing.assert_allclose(np.exp(logps), np.array(expected)[tokens], rtol=1e-5)
    tokens, logps = choose(logits, keys, Sampling.of())
    assert not tokens.any()
    np.testing.assert_allclose(np.exp(logps), 0.5, rtol=1e-5)
