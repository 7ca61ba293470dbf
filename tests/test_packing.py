"""Examples, packing and the loader: packed = unpacked, and resumed = uninterrupted."""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest
from helpers import CONFIG, MODEL, assert_trees_close, one_a_row, picture, questions, with_reply

from r4b_jax import config as c
from r4b_jax.data import images
from r4b_jax.data.examples import Packer, empty_batch, encode, encode_sample, place, place_tiles
from r4b_jax.data.loader import Loader, Position, examples
from r4b_jax.data.mixture import stream_seed
from r4b_jax.data.samples import RecordError
from r4b_jax.models import r4b
from r4b_jax.training.losses import supervised_loss

VISION = MODEL.vision


@pytest.fixture(scope="module")
def samples(tokenizer):
    """Six examples, four with pictures of their own, thinking and direct, of different lengths."""
    made = []
    for i, question in enumerate(2 * questions()):
        thinks, masked, power = (True, False, 0.0) if i < 3 else (False, True, 0.7)
        thought = question.last.thought if thinks else None
        question = question.answered(question.answer, thought)
        if question.images:
            last = dataclasses.replace(question.last, images=(picture(20 + i),))
            question = dataclasses.replace(question, turns=(last,))
        settings = dict(mask_empty_block=masked, length_power=power)
        made.append(encode_sample(tokenizer, VISION, question, **settings))
    assert len({len(e.tokens) for e in made}) >= 5
    return made


@pytest.fixture(scope="module")
def packed(samples, tokenizer):
    """The six in two rows, several to a row."""
    packer = Packer(2, 130, 3, VISION, tokenizer.pad_id)
    assert all(packer.add(example) for example in samples)
    for placed in packer.placements:
        place_tiles(packer.batch, placed.row, placed.tile, placed.example)
    assert packer.segments.min() >= 2 and packer.tiles_used.max() >= 2
    return packer.batch


def test_packed_equals_unpacked_in_loss_and_gradients(samples, packed, params, tokenizer):
    """Packing is an optimisation: no example may see another, nor another's picture."""

    @jax.jit
    def loss_and_grads(params, batch):
        def loss(params):
            total, weight = supervised_loss(r4b.bind(MODEL, params), batch, MODEL.loss_chunk)
            return total, weight

        return jax.value_and_grad(loss, has_aux=True)(params)

    (total, weight), grads = loss_and_grads(params, packed)
    length = max(len(e.tokens) for e in samples)
    alone = []
    for example in samples:
        batch = empty_batch(1, length, 1, VISION, tokenizer.pad_id)
        place(batch, 0, 0, 0, 1, example, VISION.num_patches)
        alone.append(jax.device_get(loss_and_grads(params, batch)))
    summed = jax.tree.map(lambda *x: sum(x), *alone)
    np.testing.assert_allclose(total, summed[0][0], rtol=1e-5)
    expected = sum(e.loss_weights.sum() for e in samples)
    np.testing.assert_allclose([weight, summed[0][1]], expected, rtol=1e-5)
    assert_trees_close(jax.device_get(grads), summed[1], 1e-4)
    for component in ("vision_tower", "projector", "language_model"):  # no vacuous zeros
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads[component]))


def test_packing_changes_no_log_probability(samples, packed, params, logps_of, tokenizer):
    """Place by place, beside a row as long as the example is, with no padding at all."""
    inside = np.asarray(logps_of(params, packed))
    found = {}
    for row, segment in itertools.product(range(2), range(1, 6)):
        places = packed.segment_ids[row] == segment
        if places.any():
            found[tuple(packed.tokens[row][places])] = inside[row][places]
    assert len(found) == len(samples)
    for example in (samples[0], samples[4], samples[5]):
        bare = one_a_row([example], len(example.tokens), tokenizer.pad_id)
        logps = np.asarray(logps_of(params, bare))[0]
        got = found[tuple(example.tokens)]
        np.testing.assert_allclose(got[1:], logps[1:], rtol=1e-4, atol=1e-5)


def test_a_poisoned_neighbour_changes_nothing(packed, params, logps_of):
    """Other tokens and another picture in segment 1 must not reach segment 2, in any digit."""
    row = 0
    first, rest = packed.segment_ids[row] == 1, packed.segment_ids[row] > 1
    tokens, tiles = packed.tokens.copy(), packed.tiles.copy()
    tokens[row, first] = np.random.default_rng(0).integers(6, 290, first.sum())
    tiles[row, 0] = picture(9)
    poisoned = dataclasses.replace(packed, tokens=tokens, tiles=tiles)
    before, after = (np.asarray(logps_of(params, b))[row] for b in (packed, poisoned))
    np.testing.assert_array_equal(before[rest], after[rest])
    assert np.abs(before - after)[first].max() > 0.1
    assert packed.plan.weight[row][rest].any()  # a later segment has a picture of its own


def test_padding_carries_no_loss_and_belongs_to_no_segment(packed, samples):
    """Rows are seldom full: what is left over must weigh nothing and be seen by nothing."""
    empty = packed.segment_ids == 0
    assert empty.sum() == packed.tokens.size - sum(len(e.tokens) for e in samples)
    assert not packed.loss_weights[empty].any() and not packed.plan.weight[empty].any()


def test_a_row_without_room_for_tokens_or_tiles_is_passed_over(samples, tokenizer):
    """Either limit alone must close a row, or shapes would no longer be fixed."""
    with_picture, text = samples[0], samples[1]
    packer = Packer(2, 200, 1, VISION, tokenizer.pad_id)
    assert [packer.add(with_picture) for _ in range(3)] == [True, True, False]  # tiles are full
    assert packer.segments.tolist() == [1, 1]
    while packer.add(text):
        pass
    assert np.all(packer.used + len(text.tokens) > 200) and packer.used.max() <= 200
    assert not Packer(2, 20, 1, VISION, tokenizer.pad_id).fits_empty(text)
    assert not Packer(2, 200, 0, VISION, tokenizer.pad_id).fits_empty(with_picture)


def test_pictures_and_placeholders_must_agree(tokenizer):
    """One image token too few would shift every patch of the picture unseen."""
    tokens = [tokenizer.image_id] * 3
    with pytest.raises(ValueError, match="3 image tokens for 4"):
        encode(tokenizer, VISION, tokens, np.zeros(3), images.prepare([picture(0)], VISION))
    with pytest.raises(ValueError, match="for 0"):
        encode(tokenizer, VISION, tokens, np.zeros(3), [])


def test_a_picture_of_another_size_is_scaled_and_of_the_right_size_untouched():
    """The model's tile is what the config says, whatever the data's size."""
    (prepared,) = images.prepare([picture(1)], VISION)
    np.testing.assert_array_equal(prepared.tiles[0], picture(1))
    assert prepared.index.tolist() == [[i, 0, 0, 0] for i in range(VISION.num_patches)]
    assert prepared.weight.tolist() == [[1, 0, 0, 0]] * VISION.num_patches
    halves = np.zeros((30, 48, 3), np.uint8)
    halves[:, 24:] = 200
    (scaled,) = images.prepare([halves], VISION)
    assert scaled.tiles.shape == (1, 8, 8, 3)
    assert scaled.tiles[0, :, :3].max() < 20 and scaled.tiles[0, :, 5:].min() > 180


@pytest.mark.parametrize("power, total", [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_long_replies_weigh_as_the_length_power_says(tokenizer, power, total):
    """n tokens of n^-power each sum to n^(1-power); masked tokens are none of the n."""
    for thinks, masked in ((True, False), (False, True), (False, False)):
        question = questions()[1]
        question = question.answered(question.answer, question.last.thought if thinks else None)
        settings = dict(mask_empty_block=masked, length_power=power)
        example = encode_sample(tokenizer, VISION, question, **settings)
        count = np.count_nonzero(example.loss_weights)
        np.testing.assert_allclose(example.loss_weights.sum(), count**total, rtol=1e-5)
        assert len(set(example.loss_weights)) == 2


# The loader

STAGE = c.StageConfig(
    mixture={"maths": (0.25, 0.25), "arithmetic": (0.2, 0.1), "vqa": (0.2, 0.0)},
    num_steps=9,
    batch_rows=2,
    packed_len=180,
    packed_tiles=2,
)


def source_config(seed: int = 0, **changes) -> c.Config:
    return dataclasses.replace(CONFIG, seed=seed, annealing=dataclasses.replace(STAGE, **changes))


def take(tokenizer, count: int, position: Position | None = None, config=None):
    """`count` packed batches from a position on."""
    batches = Loader(config or source_config(), "annealing", tokenizer).batches(
        position or Position()
    )
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def same(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def segments_of(packed) -> list[tuple]:
    """The tokens of each segment of a batch."""
    batch = packed.batch
    return [
        tuple(batch.tokens[row][batch.segment_ids[row] == segment])
        for row in range(len(batch.tokens))
        for segment in range(1, batch.segment_ids[row].max() + 1)
    ]


def test_batches_from_a_saved_position_are_those_of_an_uninterrupted_run(tokenizer):
    """A resumed run must see exactly what it would have seen, bit for bit, whatever was waiting."""
    whole = take(tokenizer, 5)
    assert any(packed.position.waiting for packed in whole)
    for k in (1, 3):
        resumed = take(tokenizer, 5 - k, whole[k - 1].position)
        for packed, again in zip(whole[k:], resumed):
            assert same(packed.batch, again.batch) and packed.position == again.position
    counters = [packed.position.counter for packed in whole]
    assert counters == sorted(set(counters)) and counters[0] > 2


def test_the_number_of_threads_changes_nothing(tokenizer):
    """Threads finish in any order; batches must not."""
    one, many = (
        take(tokenizer, 3, config=dataclasses.replace(source_config(), workers=n)) for n in (1, 7)
    )
    assert all(same(a.batch, b.batch) and a.position == b.position for a, b in zip(one, many))


def test_another_seed_or_stage_gives_other_batches(tokenizer):
    """A seed that changed nothing would make error bars meaningless."""
    (first,), (other,) = (take(tokenizer, 1, config=source_config(seed)) for seed in (0, 1))
    assert not same(first.batch, other.batch)
    assert same(first.batch, take(tokenizer, 1)[0].batch)
    seeds = {stream_seed(seed, name) for seed in range(3) for name in ("joint", "annealing")}
    assert len(seeds) == 6


def test_every_sample_is_used_once_or_set_aside_with_its_id(tokenizer):
    """An example too long for a row must not end the stream, nor vanish without its name."""
    stream, _ = examples(source_config(), "annealing", tokenizer)
    room = sorted(len(stream[i].tokens) for i in range(40))[25]
    taken = take(tokenizer, 8, config=source_config(packed_len=room))
    position = taken[-1].position
    seen = [stream[i] for i in range(position.counter) if i not in position.waiting]
    fitting = [e for e in seen if len(e.tokens) <= room]
    aside = [aside for packed in taken for aside in packed.set_aside]
    assert sorted(a.id for a in aside) == sorted(e.id for e in seen if len(e.tokens) > room)
    assert aside and all(f"packed_len = {room}" in a.reason for a in aside)
    segments = [segment for packed in taken for segment in segments_of(packed)]
    assert sorted(segments) == sorted(tuple(e.tokens) for e in fitting)


def test_what_waits_is_never_overtaken_for_long(tokenizer):
    """A long sample that small ones keep out of every row would never be learned."""
    position = Position()
    batches = Loader(source_config(), "annealing", tokenizer).batches(position)
    waited: dict[int, int] = {}
    for _ in range(30):
        position = next(batches).position
        waited = {number: waited.get(number, 0) + 1 for number in position.waiting}
        assert all(age < 30 for age in waited.values())
    oldest = max(waited, key=waited.get)
    assert position.counter - oldest < 300
    batches.close()


def test_rows_that_no_sample_fits_stop_the_stage_instead_of_hanging_it(tokenizer):
    """An endless stream of samples that are all too long would be searched for ever."""
    with pytest.raises(RecordError, match="packed_len = 9"):
        take(tokenizer, 1, config=source_config(packed_len=9))


@pytest.mark.parametrize(
    "mixture, told",
    [
        ({"mathss": (1.0, 0.0)}, "config.annealing.mixture: no source has the topic 'mathss'"),
        ({"mathss": (1.0, 0.0)}, "did you mean maths?"),
    ],
)
def test_a_topic_that_no_source_has_is_an_error(tokenizer, mixture, told):
    """Told when the sources are opened, with what there is."""
    with pytest.raises(c.ConfigError, match=re.escape(told)):
        take(tokenizer, 1, config=source_config(mixture=mixture))


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.75, 0.25)])
def test_topics_and_modes_come_by_their_weights_whatever_their_sum(tokenizer, weights):
    """The paper's table is counts of samples: neither normalised nor ordered."""
    maths, ocr = weights
    mixture = {"ocr": (0.0, ocr), "maths": (maths / 3, 2 * maths / 3), "vqa": (0.0, 0.0)}
    stream, _ = examples(source_config(mixture=mixture), "annealing", tokenizer)
    drawn = [stream[i].id.split("/")[2:4] for i in range(400)]
    assert drawn.count(["ocr", "thinking"]) == 100
    assert drawn.count(["maths", "direct"]) == 100 and drawn.count(["maths", "thinking"]) == 200


@pytest.mark.parametrize("mask", [False, True])
def test_the_empty_block_is_masked_where_the_stage_says_so(tokenizer, mask):
    """Stage 3 masks the block of direct answers; annealing masks nothing."""
    config = source_config(mask_empty_block=mask)
    stream, _ = examples(config, "annealing", tokenizer)
    modes = set()
    for i in range(25):
        example = stream[i]
        start = np.flatnonzero(example.tokens == tokenizer.think_id)[0] + 1
        thinks = example.tokens[start] == tokenizer.thinking_id
        modes.add(bool(thinks))
        assert not example.loss_weights[:start].any()
        masked = 2 if mask and not thinks else 0
        assert not example.loss_weights[start : start + masked].any()
        assert example.loss_weights[start + masked :].all()
    assert modes == {True, False}


def test_the_reply_helper_builds_what_training_builds(tokenizer):
    """The other tests lean on it, so it is checked against the real thing."""
    question = questions()[0]
    real = encode_sample(tokenizer, VISION, question)
    length = int(real.loss_weights.sum())
    ours = with_reply(tokenizer, question, real.tokens[-length:])
    np.testing.assert_array_equal(real.tiles, ours.tiles)
    for name in ("tokens", "positions", "branch_ids", "predecessors", "loss_weights"):
        np.testing.assert_array_equal(getattr(real, name), getattr(ours, name))
    np.testing.assert_array_equal(real.plan_index, ours.plan_index)
    np.testing.assert_array_equal(real.plan_weight, ours.plan_weight)
