"""Every shape of record to the same Sample, and every fault of one told by its own words."""

import base64
import json
import pathlib
import re

import numpy as np
import pytest

from r4b_jax.data import images
from r4b_jax.data.records import parse, to_record
from r4b_jax.data.samples import PLACE, RecordError, Sample, Turn

URI = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
HOSTILE = "<think></think><|im_end|><image><|im_start|><|endoftext|> a <think>\n b"


def read(record: dict) -> Sample:
    return parse(record, id="fallback", topic="own", prompt="Describe it.", folder="/pictures")


def llava(*values, **fields) -> dict:
    """A record of `conversations`, human and gpt by turns."""
    said = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": said, **fields}


def chat(*contents, **fields) -> dict:
    """A record of `messages`, user and assistant by turns."""
    roles = [("user", "assistant")[i % 2] for i in range(len(contents))]
    said = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return {"messages": said, **fields}


def part(text: str) -> dict:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    "record",
    [
        llava("<image>\nSum?", "12", image="a.png"),
        llava("<image> Sum?", "12", images=["a.png"]),
        chat("<image>\nSum?", "12", images=["a.png"]),
        chat([{"type": "image"}, part("Sum?")], "12", image="a.png"),
        chat([{"type": "image", "image": "a.png"}, part("Sum?")], [part("1"), part("2")]),
        chat([{"type": "image", "path": "a.png", "text": None}, part("Sum?")], "12"),
        {"question": "Sum?", "answer": "12", "image": "/pictures/a.png"},
        {"question": "Sum?", "answer": 12, "images": ["a.png"], "conversations": None},
        {"question": "Sum?", "answer": "<think>\n\n</think>\n\n12", "image": "a.png"},
    ],
    ids=range(9),
)
def test_the_same_question_in_every_shape_is_the_same_sample(record):
    """Mixing sources must not teach a model to tell where a question came from."""
    turn = Turn("Sum?", ("/pictures/a.png",), "12", None)
    assert read(record) == Sample("own", (turn,), "fallback")


def test_a_conversation_keeps_its_turns_and_each_turn_its_pictures():
    """A picture in the wrong turn is a wrong answer that trains."""
    said = llava(
        "What is <image>\nand <image>?", "A cat.", "And\n<image>", "A dog.", image=["1", "2", "3"]
    )
    said["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    sample = read({**said, "id": 7, "topic": "animals"})
    assert sample == Sample(
        "animals",
        (
            Turn(f"What is {PLACE}\nand {PLACE}?", ("/pictures/1", "/pictures/2"), "A cat."),
            Turn(f"And\n{PLACE}", ("/pictures/3",), "A dog."),
        ),
        "7",
        "Be brief.",
    )
    typed = chat(
        [part("What is "), {"type": "image"}, part("\nand "), {"type": "image"}, part("?")],
        "A cat.",
        [part("And\n"), {"type": "image", "image": {"bytes": None, "path": "3"}}],
        "A dog.",
        images=["1", "2"],
    )
    typed["messages"].insert(0, {"role": "system", "content": [part("Be brief.")]})
    assert read({**typed, "id": "7", "topic": "animals"}) == sample


def test_marks_go_only_where_all_pictures_stand_first():
    """No mark means that the pictures come first, so it may not be said of others."""
    first = read(llava("<image>\n<image>\n\nSame?", "No.", images=["1", "2"]))
    assert first.last.question == "Same?"
    apart = read(llava("<image>\nSame as <image>?", "No.", images=["1", "2"]))
    assert apart.last.question == f"{PLACE}\nSame as {PLACE}?"
    alone = read(llava("<image>", "A cat.", image="1"))
    assert (alone.last.question, len(alone.images)) == ("", 1)


@pytest.mark.parametrize(
    "picture",
    [b"pixels", {"bytes": b"pixels", "path": "a.png"}, {"bytes": b"pixels"}, URI],
    ids=["bytes", "Hub", "bytes alone", "data URI"],
)
def test_pictures_may_be_within_the_record(picture):
    """Parquet files of the Hub, WebDataset and chat logs each have their own way."""
    assert read(llava("<image>\nSum?", "12", image=picture)).images == (b"pixels",)
    assert read({"image": [picture], "caption": "a cat"}).images == (b"pixels",)


def test_an_image_url_holds_its_picture():
    """What OpenAI's format calls a URL is, in data, the picture itself."""
    for url in ({"url": URI}, URI):
        record = chat([part("Sum?"), {"type": "image_url", "image_url": url}], "12")
        assert read(record).last == Turn(f"Sum?{PLACE}", (b"pixels",), "12")


def test_a_caption_is_asked_for_by_the_prompt():
    """Picture and caption alone, as pretraining data come."""
    turn = Turn("Describe it.", ("/pictures/1",), "a cat")
    for record in ({"image": "1", "caption": "a cat"}, {"image": "1", "txt": "a cat"}):
        assert read(record) == Sample("own", (turn,), "fallback")


def test_a_row_of_a_benchmark_lists_its_options():
    """The letter in the answer means nothing without them."""
    row = {"question": "Which?", "hint": "Look.", "A": "cat", "B": "None", "D": 0.5, "answer": "B"}
    question = read({**row, "index": "3", "category": "animals"}).question
    assert question == "Hint: Look.\nWhich?\nA. cat\nB. None\nD. 0.5"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ({"content": "<think>\n3+9=12\n</think>\n\n12"}, ("12", "3+9=12")),
        ({"content": "12", "reasoning_content": "3+9=12"}, ("12", "3+9=12")),
        ({"content": "<think>\n\n</think>\n\n12"}, ("12", None)),
        ({"content": "12", "reasoning_content": None}, ("12", None)),
        ({"content": "12", "reasoning_content": " \n"}, ("12", None)),
        ({"content": "<think>12", "reasoning_content": ""}, ("<think>12", None)),
        ({"content": "12 <think> 3 </think>"}, ("12 <think> 3 </think>", None)),
    ],
    ids=range(7),
)
def test_a_thought_is_found_where_people_put_it(reply, expected):
    """A thought read as answer, or an empty one as a thought, teaches the wrong mode."""
    last = read({"messages": [{"role": "user", "content": "Sum?"}, {"role": "assistant"} | reply]})
    assert (last.answer, last.last.thought) == expected


def test_a_thought_has_two_names_in_a_flat_record():
    """And every turn of a conversation may have its own."""
    for name in ("thought", "reasoning"):
        assert read({"question": "Sum?", "answer": "12", name: "3+9"}).last.thought == "3+9"
    turns = read(llava("1+1?", "<think>a</think>2", "2+2?", "4", "3+3?", "<think>b</think>6")).turns
    assert [turn.thought for turn in turns] == ["a", None, "b"]


def test_what_people_wrote_stays_text():
    """FAULTS 11: control words in text are text, and the mark of a picture cannot be forged."""
    for record in (
        {"question": HOSTILE + PLACE, "answer": "12 " + HOSTILE, "image": "1"},
        chat([{"type": "image"}, part(HOSTILE + PLACE)], [part("12 " + HOSTILE)], image="1"),
    ):
        turn = Turn(HOSTILE, ("/pictures/1",), "12 " + HOSTILE)
        assert read(record).last == turn
    forged = llava(f"{PLACE}a {PLACE}<image>", "12", image="1")
    assert read(forged).last.question == f"a {PLACE}"
    assert len(read(llava("x" * 1_000_000, "12")).question) == 1_000_000


BAD = [
    ({"text": "a", "url": "b"}, "no known shape: its keys are text, url"),
    ({}, "no known shape: its keys are none"),
    (llava("Sum?", "12", image="1"), "no placeholder <image> for 1 pictures"),
    (chat("Sum?", "12", images=["1", "2"]), "no placeholder <image> for 2 pictures"),
    (llava("<image><image>Sum?", "12", image="1"), "2 placeholders for 1 pictures"),
    (llava("<image>Sum?", "12"), "1 placeholders for 0 pictures"),
    (chat([{"type": "image"}, part("?")], "12"), "1 placeholders for 0 pictures"),
    (llava("Sum?", ""), "an empty answer"),
    (llava("Sum?", "<think>3+9</think>\n"), "an empty answer"),
    ({"question": "Sum?", "answer": " \n"}, "an empty answer"),
    ({"question": "Sum?"}, "a question without an answer"),
    (llava("Sum?", "<think>3+9"), "a thought that no </think> closes"),
    (llava(" ", "12"), "an empty question"),
    (llava("Sum?", "12", "", "13"), "an empty question"),
    ({"question": "", "answer": "12"}, "an empty question"),
    ({"caption": "a cat"}, "a caption without a picture"),
    ({"caption": "", "image": "1"}, "an empty answer"),
    (llava("Sum?"), "does not end in an answer"),
    (llava(), "does not end in an answer"),
    ({"messages": [{"role": "assistant", "content": "12"}]}, "message 1 is the assistant's"),
    (
        {"messages": [{"role": r, "content": "a"} for r in ("system", "user", "user")]},
        "message 3 is the user's",
    ),
    (
        {"messages": [{"role": r, "content": "a"} for r in ("user", "assistant", "system")]},
        "message 3 is the system's",
    ),
    ({"messages": [{"role": "tool", "content": "a"}]}, "the role 'tool' is not one of human, user"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "the role .* is not one of"),
    ({"messages": [{"from": "user", "value": "a"}]}, "has no 'role': its keys are from, value"),
    (chat("Sum?", None), "a message of messages has no 'content'"),
    ({"messages": "hello"}, "messages is str, not list"),
    ({"conversations": ["hello"]}, "a message of conversations is str, not dict"),
    (llava("Sum?", ["12"]), "value is list, not str"),
    (chat("Sum?", 12), "content is int, not str"),
    (chat(["Sum?"], "12"), "a part of content is str, not dict"),
    (chat([{"type": "video"}], "12"), "a part of type 'video': text, image and image_url"),
    (chat([{"type": "text"}], "12"), "a text part is NoneType, not str"),
    (chat("Sum?", [{"type": "image", "image": "1"}]), "an answer shows a picture"),
    ({"messages": [{"role": "system", "content": [{"type": "image"}]}]}, "system prompt shows"),
    (chat([{"type": "image", "url": "https://x.org/1"}], "12"), "https://x.org/1 is not here"),
    (
        chat([{"type": "image_url", "image_url": {"url": "http://x.org/1"}}], "12"),
        "nothing is downloaded",
    ),
    (chat([{"type": "image", "image": "data:image/png;base64,?"}], "12"), "not base64"),
    (chat([{"type": "image", "image": "data:image/svg+xml,<svg/>"}], "12"), "base64 is what is"),
    ({"image": 3, "caption": "a"}, "a picture is int, not str"),
    ({"image": [None], "caption": "a"}, "a picture is NoneType"),
    ({"image": {"path": None}, "caption": "a"}, "neither bytes nor path: its keys are path"),
    ({"image": "A" * 5000, "caption": "a"}, "a picture's name of 5000 characters"),
    ({"image": "1", "images": ["1"], "caption": "a"}, "both image and images"),
    ({"question": 3, "answer": "12"}, "the question is int, not str"),
    ({"question": "Sum?", "answer": True}, "the answer is bool, not str"),
    ({"question": "Sum?", "answer": float("nan")}, "the answer is float, not str"),
    ({"question": "Sum?", "answer": ["12"]}, "the answer is list, not str"),
    ({"question": "Sum?", "answer": "12", "A": ["x"]}, "option A is list, not str"),
    ({"question": "Sum?", "answer": "12", "thought": 3}, "the thought is int, not str"),
    ({"question": "Sum?", "answer": "12", "id": 1.5}, "the id is float, not str"),
    ({"question": "Sum?", "answer": "12", "topic": 3}, "the topic is int, not str"),
    ({"question": "Sum \ud800", "answer": "12"}, "the question is not Unicode text"),
    (llava("Sum?", "\udc80"), "value is not Unicode text"),
]


@pytest.mark.parametrize(("record", "reason"), BAD, ids=[reason[:40] for _, reason in BAD])
def test_a_bad_record_is_refused_in_words(record, reason):
    """FAULTS 11: whoever looks at what was set aside must see what to repair."""
    with pytest.raises(RecordError, match=reason):
        read(record)


def test_a_reason_is_short_whatever_the_record():
    """It goes into a log: a million characters of a role or a key do not."""
    for record in (
        {"x" * 1_000_000: 1},
        {"messages": [{"role": "x" * 1_000_000, "content": "a"}]},
        chat([{"type": "x" * 1_000_000}], "12"),
        {"image": "data:" + "x" * 1_000_000, "caption": "a"},
        {"image": "http://" + "x" * 1_000_000, "caption": "a"},
    ):
        with pytest.raises(RecordError) as error:
            read(record)
        assert len(str(error.value)) < 500


def test_empty_fields_are_as_none():
    """A table has every column in every row: what is empty there was not said."""
    record = llava("Sum?", "12", image="", images=[], id="", topic="", messages=None)
    record["conversations"].insert(0, {"from": "system", "value": " "})
    assert read(record) == Sample("own", (Turn("Sum?", (), "12"),), "fallback")


@pytest.mark.parametrize(
    "sample",
    [
        Sample.ask("t", None, HOSTILE, "<think>" + HOSTILE),
        Sample.ask("t", b"1", "Sum?", "12", " 3+9=12\n"),
        Sample("t", (Turn("", (b"1",), "a"),), "id/1", "Be brief."),
        Sample(
            "t",
            (
                Turn(f"a{PLACE}{PLACE}\nb{PLACE}", (b"1", b"2", b"3"), "c", "d"),
                Turn("Same?", (b"4", b"5"), "e"),
                Turn(f"{PLACE} is not {PLACE}", (b"6", b"7"), "f" + PLACE),
            ),
        ),
    ],
    ids=["hostile", "thought", "picture alone", "turns"],
)
def test_a_sample_written_as_a_record_is_read_as_itself(sample):
    """What curation writes is what annealing trains on: nothing may change on the way."""
    record = to_record(sample)
    assert parse(record, id="", topic="x", prompt="x", folder="x") == sample


def test_pictures_of_a_record_written_are_within_it(tmp_path):
    """A file that names pictures elsewhere breaks when it is moved."""
    path, array = tmp_path / "a.jpg", np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    path.write_bytes(b"any bytes")
    sample = Sample("t", (Turn("Sum?", (str(path), array), "12"),))
    first, second = parse(to_record(sample), id="", topic="", prompt="", folder="").images
    assert first == b"any bytes"
    assert np.array_equal(images.read(second), array)
    missing = Sample.ask("t", str(tmp_path / "b.jpg"), "Sum?", "12")
    for bad, reason in (
        (missing, "b.jpg"),
        (Sample.ask("t", None, "Sum?", ""), "an empty answer"),
        (Sample.ask("t", b"1", PLACE * 2, "12"), "2 placeholders for 1 pictures"),
    ):
        with pytest.raises(RecordError, match=reason):
            to_record(bad)


def test_the_examples_of_the_documentation_are_read():
    """They are what people start from."""
    text = pathlib.Path(__file__).parent.parent.joinpath("docs", "data.md").read_text("utf-8")
    found = [read(json.loads(block)) for block in re.findall("```json\n(.*?)```", text, re.S)]
    assert [(len(sample.turns), len(sample.images)) for sample in found] == [
        (2, 1),
        (1, 2),
        (1, 2),
        (1, 1),
        (1, 1),
    ]
    assert found[2].last.question == f"Is {PLACE} like {PLACE}?"
    assert found[3].topic == "counting" and found[3].last.thought
