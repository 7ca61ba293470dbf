"""A small world of real images: everything R-4B's recipe needs, with nothing to download.

Pictures: scikit-learn's 1,797 handwritten digits, nine to a picture in three rows of three, train
and test apart by handwriting instance; and easy-VQA's 5,000 shapes with its official questions and
split. Topics:

    ocr         non-reasoning  read a row, or one digit, of the picture
    vqa         non-reasoning  easy-VQA: shapes and colours
    maths       reasoning      sums, differences, products and remainders over the digits of the
    picture arithmetic  reasoning      the same questions with the rows written as text
    compare     unrewarded     which row has the largest sum, how many digits exceed n: reasoning
    that BPO never
                               rewards, to see whether a maths-only reward carries over
    caption     (training)     the whole picture in words
    text        (training)     what the pictures of digits ask, with the digits as text
    words       (training)     what easy-VQA asks, with the shape as words
    facts       (training)     single sums, differences, products and remainders

A question comes with its working, and says nothing of whether its training sample thinks: that is
for the mixture to decide, or for curation.
"""

import functools
import os

import easy_vqa
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from r4b_jax.config import WorldConfig
from r4b_jax.data.samples import Sample
from r4b_jax.data.tokenizer import Tokenizer, train_tokenizer

TOPICS = {
    "ocr": "non-reasoning",
    "vqa": "non-reasoning",
    "maths": "reasoning",
    "arithmetic": "reasoning",
    "compare": "unrewarded",
}
TRAINING_TOPICS = ("caption", "text", "words", "facts")
ROWS = ("top", "middle", "bottom")
PLACES = ("first", "second", "third")
DIGIT, PICTURE = 16, 48  # pixels a side of a digit and of a picture
NUM_TEST_DIGITS = 397
VARIANTS = 9  # forms of each training digit beside the one on file
SHAPES = ("circle", "rectangle", "triangle")
# How often training asks each kind of easy-VQA's questions: of pictures, and of the shape in words.
# "Is there no ..." comes with pictures only: as long as the match itself is not learned, it and its
# contrary cancel each other's lesson.
KIND_WEIGHTS = {
    "shape": 0.25,
    "colour": 0.1,
    "present": 0.2,
    "absent": 0.15,
    "not present": 0.15,  # "is there no ...", and there is one
    "not absent": 0.15,
}
TEXT_KIND_WEIGHTS = {
    "shape": 0.15,
    "colour": 0.15,
    "present": 0.3,
    "absent": 0.3,
    "not present": 0.05,
    "not absent": 0.05,
}


@functools.cache
def _handwriting(split: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Digits with a dark border of a pixel, float32[n, 18, 18], and the places of each class.

    The split is by handwriting instance and the same for every seed. The training split holds each
    instance as it is and in VARIANTS slanted, turned and stretched forms.
    """
    data = load_digits()
    order = np.random.default_rng(1797).permutation(len(data.target))
    order = order[:NUM_TEST_DIGITS] if split == "test" else order[NUM_TEST_DIGITS:]
    copies = 1 + (VARIANTS if split == "train" else 0)
    digits = np.zeros((len(order), copies, DIGIT + 2, DIGIT + 2), np.float32)
    rng = np.random.default_rng(1797)
    for place, i in enumerate(order):
        small = Image.fromarray((data.images[i] * 255 / 16).astype(np.uint8))
        large = small.resize((DIGIT, DIGIT), Image.Resampling.BILINEAR)
        for copy in range(copies):
            digits[place, copy, 1:-1, 1:-1] = np.asarray(_rewritten(large, rng) if copy else large)
    labels = np.repeat(data.target[order], copies)
    digits = digits.reshape(-1, *digits.shape[2:])
    return digits, [np.flatnonzero(labels == digit) for digit in range(10)]


def _rewritten(digit: Image.Image, rng) -> Image.Image:
    """A digit as another hand might write it: a random affine map about its middle."""
    angle, slant = rng.uniform(-0.2, 0.2, 2)
    stretch = np.diag(rng.uniform(0.9, 1.15, 2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, slant], [0, 1]]) @ stretch
    middle = np.full(2, (DIGIT - 1) / 2)
    offset = middle - matrix @ middle
    affine = (*matrix[0], offset[0], *matrix[1], offset[1])
    return digit.transform(digit.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)


@functools.cache
def _easy_vqa(split: str):
    """(pictures uint8[n, 48, 48, 3], questions [(text, answer, picture)], captions by picture)."""
    if split == "train":
        paths, asked = easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()
    else:
        paths, asked = easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()
    texts, answers, ids = asked
    pictures = np.zeros((len(paths), PICTURE, PICTURE, 3), np.uint8)
    for i, path in paths.items():
        with Image.open(path) as image:
            small = image.convert("RGB").resize((PICTURE, PICTURE), Image.Resampling.BILINEAR)
        pictures[i] = np.asarray(small)
    shapes, colours = {}, {}
    for answer, i in zip(answers, ids):
        if answer in SHAPES:
            shapes[i] = answer
        elif answer not in ("yes", "no"):
            colours[i] = answer
    captions = {i: f"a {colours[i]} {shapes[i]}" for i in sorted(shapes) if i in colours}
    return pictures, list(zip(texts, answers, ids)), captions


def _kind(text: str, answer: str) -> str:
    """What an easy-VQA question is about: a key of KIND_WEIGHTS."""
    if answer in SHAPES:
        return "shape"
    if answer not in ("yes", "no"):
        return "colour"
    if {"not", "no"}.isdisjoint(text.split()):
        return "present" if answer == "yes" else "absent"
    return "not absent" if answer == "yes" else "not present"


def _running(terms, sign: str = "+", start: int | None = None) -> str:
    """ "4+7=11+2=13": the terms added one by one; with a start, "+7=11+2=13" going on from it."""
    total, steps = (terms[0], str(terms[0])) if start is None else (start, "")
    for term in terms[1:] if start is None else terms:
        total += term if sign == "+" else -term
        steps += f"{sign}{term}={total}"
    return steps


def _maths(rng, grid) -> tuple[str, str, str]:
    """(question, answer, trace) over int[3, 3]: easy step by step, hard in one go."""
    order = [int(i) for i in rng.permutation(3)]
    kind = ("sum", "difference", "product", "remainder")[rng.integers(4)]
    if kind == "difference":
        order[:2] = sorted(order[:2], key=lambda i: -grid[i].sum())  # no result below 0
    a, b, c = order
    first, second, third = (grid[i].tolist() for i in order)
    read = f"{_row_text(grid, a)} {_row_text(grid, b)}"
    total = sum(first + second)
    if kind == "sum":
        trace = f"{read} {_running(first + second)}"
        return f"What is the sum of the {ROWS[a]} and {ROWS[b]} rows?", str(total), trace
    if kind == "difference":
        trace = f"{read} {_running(first)}{_running(second, '-', sum(first))}"
        question = f"What is the sum of the {ROWS[a]} row minus the {ROWS[b]} row?"
        return question, str(sum(first) - sum(second)), trace
    if kind == "product":
        product = first[0] * second[2]
        steps = f"{first[0]}*{second[2]}={product}{_running(third, '+', product)}"
        question = (
            f"What is the first {ROWS[a]} digit times the third {ROWS[b]} digit "
            f"plus the {ROWS[c]} row?"
        )
        return question, str(product + sum(third)), f"{read} {_row_text(grid, c)} {steps}"
    divisor = int(rng.integers(3, 6))
    trace = f"{read} {_running(first + second)} {total}%{divisor}={total % divisor}"
    question = f"What is the remainder of the {ROWS[a]} and {ROWS[b]} rows' sum by {divisor}?"
    return question, str(total % divisor), trace


def _facts(rng) -> tuple[str, str, str]:
    """Five sums, differences, products or remainders of the kind the traces are made of."""
    facts = []
    for kind in rng.choice(4, 5, p=[0.5, 0.15, 0.15, 0.2]):
        n, d = int(rng.integers(0, 60)), int(rng.integers(0, 10))
        if kind == 0:
            facts.append((f"{n}+{d}", n + d))
        elif kind == 1:
            facts.append((f"{n % 28}-{min(d, n % 28)}", n % 28 - min(d, n % 28)))
        elif kind == 2:
            facts.append((f"{n % 10}*{d}", n % 10 * d))
        else:
            facts.append((f"{n}%{d % 3 + 3}", n % (d % 3 + 3)))
    question = " ".join(text for text, _ in facts)
    return question, " ".join(f"{text}={value}" for text, value in facts), ""


def _compare(rng, grid) -> tuple[str, str, str]:
    if rng.random() < 0.5:
        while len(set(sums := grid.sum(1).tolist())) < 3:
            grid[:] = rng.integers(0, 10, (3, 3))
        steps = [f"{ROWS[i]} {_running(grid[i].tolist())}" for i in range(3)]
        leader = ROWS[int(np.argmax(sums[:2]))], ROWS[int(np.argmax(sums))]
        trace = f"{steps[0]} {steps[1]} {leader[0]} {steps[2]} {leader[1]}"
        return "Which row has the largest sum?", leader[1], trace
    limit, count, steps = int(rng.integers(2, 8)), 0, []
    for i, row in enumerate(grid.tolist()):
        over = [str(d) for d in row if d > limit]
        count += len(over)
        steps.append(f"{_row_text(grid, i)} {''.join(over) or '-'} {count}")
    return f"How many digits are larger than {limit}?", str(count), " ".join(steps)


def _ocr(rng, grid) -> tuple[str, str, str]:
    row = int(rng.integers(3))
    trace = _row_text(grid, row)
    if rng.random() < 0.5:
        return f"Read the {ROWS[row]} row.", trace.split()[1], trace
    place = int(rng.integers(3))
    digit = str(grid[row, place])
    return f"What is the {PLACES[place]} digit of the {ROWS[row]} row?", digit, trace


def _row_text(grid, row: int) -> str:
    return f"{ROWS[row]} {''.join(map(str, grid[row].tolist()))}"


def _digits_text(grid) -> str:
    """The nine digits as text, in the places of the nine patches of their picture."""
    return "".join(map(str, grid.ravel().tolist()))


def _shape_text(rng, caption: str) -> str:
    """Colour and shape as nine words, " red circle red ...", in the places of a picture's patches,
    each of which may show either."""
    _, colour, shape = caption.split()
    chosen = rng.permutation([0, 1, *rng.integers(0, 2, 7)])
    return "".join(f" {(colour, shape)[i]}" for i in chosen)


def _describe(rng, grid) -> tuple[str, str, str]:
    return "Describe the picture.", " ".join(_row_text(grid, row) for row in range(3)), ""


class World:
    """Questions of one split, a pure function of the generator handed in.

    Args:
      split: "train" (pictures with noise, shifts and flips) or "test" (as they are).
    """

    topics = (*TOPICS, *TRAINING_TOPICS)

    def __init__(self, config: WorldConfig, split: str):
        self.config, self.split, self.train = config, split, split == "train"
        self.shapes, self.shape_questions, self.captions = _easy_vqa(split)
        self.shape_kinds = {kind: [] for kind in KIND_WEIGHTS}
        for place, (text, answer, _) in enumerate(self.shape_questions):
            self.shape_kinds[_kind(text, answer)].append(place)

    def question(self, topic: str, rng: np.random.Generator) -> Sample:
        """One question of a topic. Raises KeyError for a topic this world does not have."""
        if topic == "vqa":
            text, answer, picture = self._shape_question(rng, KIND_WEIGHTS)
            trace = self.captions.get(picture, "a shape")
            return Sample.ask(topic, self._shape(picture, rng), text, answer, trace)
        if topic == "caption" and rng.random() < 0.6:
            picture = list(self.captions)[rng.integers(len(self.captions))]
            caption = self.captions[picture]
            return Sample.ask(
                topic, self._shape(picture, rng), "Describe the picture.", caption, ""
            )
        if topic == "facts":
            text, answer, trace = _facts(rng)
            return Sample.ask(topic, None, text, answer, trace)
        grid = rng.integers(0, 10, (3, 3))
        if topic == "arithmetic":
            text, answer, trace = _maths(rng, grid)
        elif topic == "words":
            text, answer, picture = self._shape_question(rng, TEXT_KIND_WEIGHTS)
            caption = self.captions.get(picture)
            if caption is None:
                return self.question(topic, rng)
            text = f"{_shape_text(rng, caption)}\n{text}"
            return Sample.ask(topic, None, text, answer, "")  # known at once
        elif topic == "text":
            text, answer, trace = (_ocr, _compare, _describe)[rng.integers(3)](rng, grid)
        else:
            make = {"ocr": _ocr, "maths": _maths, "compare": _compare, "caption": _describe}[topic]
            text, answer, trace = make(rng, grid)
            return Sample.ask(topic, self._digits(grid, rng), text, answer, trace)
        return Sample.ask(topic, None, f"{_digits_text(grid)}\n{text}", answer, trace)

    def _shape_question(self, rng, weights: dict[str, float]) -> tuple[str, str, int]:
        """One of easy-VQA's questions; for training by kind: five of six of its yes/no questions
        are about what is not there, and few ask for the shape."""
        if not self.train:
            return self.shape_questions[rng.integers(len(self.shape_questions))]
        places = self.shape_kinds[rng.choice(list(weights), p=list(weights.values()))]
        return self.shape_questions[places[rng.integers(len(places))]]

    def _digits(self, grid, rng) -> np.ndarray:
        """A picture uint8[48, 48, 3] of nine handwritten digits, light on dark."""
        digits, places = _handwriting(self.split)
        chosen = [places[d][rng.integers(len(places[d]))] for d in grid.ravel().tolist()]
        shift, light = np.ones((9, 2), int), np.ones((9, 1, 1), np.float32)
        if self.train:
            shift, light = rng.integers(0, 3, (9, 2)), rng.uniform(0.7, 1.1, (9, 1, 1))
        rows = (shift[:, 0, None] + np.arange(DIGIT))[:, :, None]
        columns = (shift[:, 1, None] + np.arange(DIGIT))[:, None, :]
        cells = digits[np.array(chosen)[:, None, None], rows, columns] * light
        canvas = cells.reshape(3, 3, DIGIT, DIGIT).swapaxes(1, 2).reshape(PICTURE, PICTURE)
        return self._noisy(np.repeat(canvas[..., None], 3, -1), rng)

    def _shape(self, picture: int, rng) -> np.ndarray:
        image = self.shapes[picture]
        if self.train:
            image = image[:, ::-1] if rng.random() < 0.5 else image
            padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), "edge")
            down, right = rng.integers(0, 7, 2)
            image = padded[down : down + PICTURE, right : right + PICTURE]
        return self._noisy(image, rng)

    def _noisy(self, image, rng) -> np.ndarray:
        if not self.train:
            return image.astype(np.uint8)
        noise = rng.standard_normal((*image.shape[:2], 1), np.float32) * self.config.pixel_noise
        return np.clip(image + noise, 0, 255).astype(np.uint8)


def corpus(config: WorldConfig, num_texts: int = 4000) -> list[str]:
    """Text of the world to train its tokenizer on; the same for every seed."""
    world, texts = World(config, "train"), []
    for i in range(num_texts):
        rng = np.random.default_rng((448, i))
        question = world.question((*TOPICS, "caption", "facts")[i % 7], rng)
        thought = question.last.thought or ""
        texts += [question.question, "\n" + thought + "\n", "\n\n" + question.answer]
    return texts + ["user ", "user\n", "assistant\n"] * 100


def world_tokenizer(config: WorldConfig, workdir: str) -> Tokenizer:
    """The world's tokenizer: read from `workdir`/tokenizer.json, or trained and written there."""
    path = os.path.join(workdir, "tokenizer.json")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            return Tokenizer(f.read())
    tokenizer = train_tokenizer(corpus(config), config.vocab_size)
    tokenizer.save(workdir)
    return tokenizer
