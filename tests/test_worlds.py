"""The small world: honest traces and answers, splits that do not leak, and pure randomness."""

import functools
import operator
import pathlib
import re
import runpy

import easy_vqa
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from r4b_jax.config import STAGES, WorldConfig
from r4b_jax.data import worlds
from r4b_jax.data.mixture import SmallWorld
from r4b_jax.data.samples import Sample
from r4b_jax.data.tokenizer import train_tokenizer
from r4b_jax.data.worlds import (
    DIGIT,
    PLACES,
    ROWS,
    TOPICS,
    World,
    corpus,
    world_tokenizer,
)

SHAPES = {"circle", "rectangle", "triangle"}
COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "%": operator.mod}
TINY = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "configs" / "tiny.py"))
# The world's test topics, and whatever else configs/tiny.py trains on.
ALL_TOPICS = sorted({*TOPICS}.union(*(TINY["get_config"]()[name].mixture for name in STAGES)))


@pytest.fixture(scope="module")
def train() -> World:
    return World(WorldConfig(), "train")


@pytest.fixture(scope="module")
def test() -> World:
    return World(WorldConfig(), "test")


def ask(world: World, topic: str, seed: int) -> Sample:
    return world.question(topic, np.random.default_rng((seed, 5)))


def same(a: Sample, b: Sample) -> bool:
    """Two questions are equal, pictures too."""
    texts = [(q.topic, q.question, q.answer, q.last.thought) for q in (a, b)]
    return texts[0] == texts[1] and same_pictures(a, b)


def same_pictures(a: Sample, b: Sample) -> bool:
    return len(a.images) == len(b.images) and all(map(np.array_equal, a.images, b.images))


@functools.cache
def drawn_digits() -> dict[bytes, int]:
    """Every handwritten digit as a test picture shows it -> what it is, from the data itself."""
    data, labels = load_digits(), {}
    for image, label in zip(data.images, data.target):
        small = Image.fromarray((image * 255 / 16).astype(np.uint8))
        large = np.asarray(small.resize((DIGIT, DIGIT), Image.Resampling.BILINEAR))
        labels[large.tobytes()] = int(label)
    return labels


def digits_in(question: Sample) -> np.ndarray:
    """The 3 x 3 digits a test question is about, found in its picture or read from its text."""
    if not question.images:
        return np.array([int(c) for c in question.question.split("\n")[0]]).reshape(3, 3)
    grid = np.zeros((3, 3), int)
    for row, column in np.ndindex(3, 3):
        cell = question.images[0][row * DIGIT :, column * DIGIT :, 0][:DIGIT, :DIGIT]
        grid[row, column] = drawn_digits()[cell.tobytes()]
    return grid


def solve(question: Sample, grid: np.ndarray) -> str:
    """The answer to a question about digits, worked out from its words alone."""
    text = question.question.split("\n")[-1]
    rows = [ROWS.index(w) for w in re.findall("|".join(ROWS), text)]
    places = [PLACES.index(w) for w in re.findall("|".join(PLACES), text)]
    sums = grid.sum(1)
    if text == "Describe the picture.":
        return " ".join(f"{ROWS[r]} {''.join(map(str, grid[r]))}" for r in range(3))
    if text == "Which row has the largest sum?":
        assert sorted(sums)[-1] > sorted(sums)[-2], "two rows are the largest"
        return ROWS[int(np.argmax(sums))]
    if text.startswith("How many digits are larger than"):
        return str(np.sum(grid > int(re.search(r"\d+", text)[0])))
    if text.startswith("Read the"):
        return "".join(map(str, grid[rows[0]]))
    if re.fullmatch(r"What is the \w+ digit of the \w+ row\?", text):
        return str(grid[rows[0], places[0]])
    if re.search(r"times the \w+ \w+ digit plus the \w+ row", text):
        return str(grid[rows[0], places[0]] * grid[rows[1], places[1]] + sums[rows[2]])
    if "row minus the" in text:
        return str(sums[rows[0]] - sums[rows[1]])
    total = sums[rows[0]] + sums[rows[1]]
    if remainder := re.fullmatch(r"What is the remainder of .* rows' sum by (\d+)\?", text):
        return str(total % int(remainder[1]))
    assert re.fullmatch(r"What is the sum of the \w+ and \w+ rows\?", text), text
    return str(total)


def solve_shape(text: str, caption: str) -> str:
    """The answer to one of easy-VQA's questions about "a blue circle"."""
    _, colour, shape = caption.split()
    words = set(text.removesuffix("?").split())
    if "what" in words:
        return colour if words & {"color"} else shape
    (asked,) = words & (SHAPES | COLOURS)
    negated = bool(words & {"not", "no"})
    return "yes" if (asked in (colour, shape)) != negated else "no"


@pytest.mark.parametrize("topic", sorted({*ALL_TOPICS} - {"caption", "facts"}))
@pytest.mark.parametrize("split", ["test", "train"])
def test_answers_are_those_of_what_is_shown(request, topic, split):
    """The reward trusts the answer: it is worked out again from the pixels and the words."""
    solved = 0
    for seed in range(150):
        question = ask(request.getfixturevalue(split), topic, seed)
        shown, _, text = question.question.rpartition("\n")
        caption = question.last.thought if topic == "vqa" else shown
        if topic == "words":  # nine words of two kinds, each at least once
            colour, shape = sorted(set(shown.split()), key=lambda word: word in SHAPES)
            assert len(shown.split()) == 9 and shape in SHAPES
            caption = f"a {colour} {shape}"
        if caption.startswith("a "):
            if caption == "a shape":  # easy-VQA never asks for this one's shape or colour
                continue
            assert solve_shape(text, caption) == question.answer, question.question
        elif shown or split == "test":
            assert solve(question, digits_in(question)) == question.answer, question.question
        else:  # training digits are shifted and noisy: the trace is what is left to check by
            continue
        solved += 1
    assert solved > 60 or (split == "train" and question.images and topic != "vqa")


@pytest.mark.parametrize("topic", ALL_TOPICS)
def test_every_step_of_a_trace_is_true(train, topic):
    """A model taught one false sum learns to add wrongly; each "a+b=c" is evaluated."""
    steps = 0
    for seed in range(300):
        question = ask(train, topic, seed)
        for chain in f"{question.last.thought or ''} {question.answer}".split():
            parts = chain.split("=")
            for left, right in zip(parts, parts[1:]):
                a, sign, b = re.fullmatch(r"(-?\d+)([-+*%])(\d+)", left).groups()
                result = int(re.match(r"-?\d+", right)[0])
                assert OPERATORS[sign](int(a), int(b)) == result, chain
                steps += 1
    assert steps > 100 or topic not in ("maths", "arithmetic", "compare", "text", "facts")


@pytest.mark.parametrize("topic", ["maths", "arithmetic", "compare"])
def test_a_trace_ends_in_the_answer(train, topic):
    """Thinking must pay: the last result of the working is what is then answered."""
    signs = set()
    for seed in range(200):
        question = ask(train, topic, seed)
        assert question.last.thought.split()[-1].split("=")[-1] == question.answer
        signs |= set(re.findall(r"(?<=\d)[-+*%](?=\d)", question.last.thought))
    assert signs == ({"+"} if topic == "compare" else {"+", "-", "*", "%"})  # every kind was seen


def test_test_handwriting_is_not_in_the_training_pictures(train, test):
    """No digit of a test picture was ever seen in training: the same instance would be a leak."""
    kept = {split: worlds._handwriting(split) for split in ("train", "test")}
    drawn = {split: {x.tobytes() for x in digits} for split, (digits, _) in kept.items()}
    assert not drawn["train"] & drawn["test"]
    assert (len(drawn["train"]), len(drawn["test"])) == (1400 * (1 + worlds.VARIANTS), 397)
    originals = kept["train"][0][:: 1 + worlds.VARIANTS, 1:-1, 1:-1].astype(np.uint8)
    assert all(digit.tobytes() in drawn_digits() for digit in originals)
    assert min(len(places) for places in kept["test"][1]) > 20
    assert (train.split, test.split) == ("train", "test")


def test_shapes_use_the_official_split(train, test):
    """easy-VQA's own train and test questions, in their order, with their own pictures."""
    for world, official, count in (
        (train, easy_vqa.get_train_questions(), 4000),
        (test, easy_vqa.get_test_questions(), 1000),
    ):
        assert world.shape_questions == list(zip(*official))
        assert len(world.shapes) == count
        assert world.shapes.any((1, 2, 3)).all()


def test_captions_of_shapes_agree_with_the_official_answers(test):
    """A caption is put together from two questions about one picture; both must be its own."""
    for text, answer, picture in test.shape_questions:
        if answer not in ("yes", "no") and picture in test.captions:
            assert answer in test.captions[picture].split(), text


@pytest.mark.parametrize("topic", ALL_TOPICS)
def test_a_question_is_a_function_of_its_generator_alone(train, topic):
    """Resuming needs it: what was asked before must leave no trace in what is asked now."""
    first = ask(train, topic, 0)
    others = [ask(train, t, seed) for t in ALL_TOPICS for seed in range(1, 4)]
    assert same(first, ask(train, topic, 0))
    assert same(first, ask(World(WorldConfig(), "train"), topic, 0))
    assert not any(same(first, other) for other in others)


def test_an_unknown_topic_is_an_error(train):
    """A typo in a mixture must not become another topic's questions."""
    with pytest.raises(KeyError, match="mathss"):
        ask(train, "mathss", 0)


def test_noise_is_for_training_pictures_only():
    """Test pictures must be the same for every setting of the noise; training ones must not."""
    quiet, loud = WorldConfig(pixel_noise=0.0), WorldConfig(pixel_noise=40.0)
    for topic in ("ocr", "vqa"):
        a, b = (ask(World(config, "test"), topic, 1).images[0] for config in (quiet, loud))
        np.testing.assert_array_equal(a, b)
        a, b = (ask(World(config, "train"), topic, 1).images[0] for config in (quiet, loud))
        assert np.abs(a.astype(int) - b).mean() > 5


def test_nothing_in_a_question_tells_whether_its_sample_thinks(tokenizer):
    """If the questions differed, auto mode could learn the mode from them and not from need."""
    world = SmallWorld(WorldConfig())
    for topic in ("maths", "vqa", "arithmetic"):
        direct, thinking = (world.stream(topic, mode, "any", 3) for mode in ("direct", "thinking"))
        for i in range(20):
            assert direct[i].question == thinking[i].question
            assert same_pictures(direct[i], thinking[i])
            assert direct[i].last.thought is None and thinking[i].last.thought


def test_the_same_texts_give_the_same_tokenizer_and_it_survives_a_file(tokenizer, tmp_path):
    """A resumed run reads the file; a rerun trains anew; both must mean the same ids."""
    again = train_tokenizer(corpus(WorldConfig(), 300), 300)
    assert again.json == tokenizer.json
    config = WorldConfig(vocab_size=310)
    written = world_tokenizer(config, str(tmp_path))
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == written.json
    assert world_tokenizer(config, str(tmp_path)).json == written.json
    assert written.vocab_size == 310


@pytest.mark.parametrize("topic", ALL_TOPICS)
def test_every_topic_survives_its_tokenizer(train, tokenizer, topic):
    """A text that does not come back from its ids could never be answered right."""
    for seed in range(20):
        question = ask(train, topic, seed)
        for text in (question.question, question.answer, question.last.thought or ""):
            assert tokenizer.decode(tokenizer.encode(text)) == text
