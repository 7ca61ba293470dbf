"""One record of a person's data, a plain dict, to a Sample and back: docs/data.md shows the shapes.

A record that is not of a known shape, or that contradicts itself, is a RecordError whose message
tells what is wrong with it: nothing is guessed, for a wrong guess trains silently. What a person
wrote stays text: only `<image>` in a string of `conversations` or `messages` has a meaning.
"""

import base64
import binascii
import io
import os
import re
import reprlib
import string

from r4b_jax.data import images
from r4b_jax.data.samples import PLACE, RecordError, Sample, Turn

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES["system"] = "system"
NEXT = object()  # a place that shows the next of the record's own pictures
MAX_NAME = 4096  # characters of a path, on Linux


def parse(record: dict, *, id: str, topic: str, prompt: str, folder: str) -> Sample:
    """The sample that a record means. No picture is opened.

    Args:
      id, topic: for a record that names none.
      prompt: asks what a record has that is pictures and a caption.
      folder: where pictures that are named are looked for.
    Raises:
      RecordError: the record cannot be used; the message says why.
    """
    record = {key: value for key, value in record.items() if value is not None}
    pictures = _pictures(record, folder)
    system = ""
    if "messages" in record or "conversations" in record:
        system, turns = _conversation(record, pictures, folder)
    elif "question" in record:
        turns = (_flat(record, pictures),)
    elif "caption" in record or "txt" in record:
        if not pictures:
            raise RecordError("a caption without a picture")
        caption = _text(record.get("caption", record.get("txt")), "the caption")
        turns = (_turn(PLACE * len(pictures) + prompt, pictures, caption, None),)
    else:
        raise RecordError(f"no known shape: its keys are {_keys(record)}")
    own = record.get("id", "")
    own = str(own) if isinstance(own, int) and not isinstance(own, bool) else own
    topic = _text(record.get("topic", ""), "the topic") or topic
    return Sample(topic, turns, _text(own, "the id") or id, system)


def to_record(sample: Sample) -> dict:
    """The record of shape `messages` that `parse` reads as `sample`, pictures as bytes within.

    Pictures given as paths are read as they are, arrays become PNG.

    Raises:
      RecordError: a picture cannot be read, or the sample could not be read back: it has no answer.
    """
    messages = [{"role": "system", "content": sample.system}] if sample.system else []
    for turn in sample.turns:
        pictures = [{"type": "image", "image": _packed(image)} for image in turn.images]
        texts = [{"type": "text", "text": text} for text in turn.question.split(PLACE)]
        if len(texts) == 1:
            content = [*pictures, *texts]
        else:
            _expect_places(len(texts) - 1, len(pictures))
            content = [part for pair in zip(texts, pictures) for part in pair] + texts[-1:]
        # The key says that a `<think>` in the answer is text.
        reply = {"content": turn.answer, "reasoning_content": turn.thought or ""}
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", **reply})
    record = {"id": sample.id, "topic": sample.topic, "messages": messages}
    parse(record, id="", topic="", prompt="", folder="")
    return record


def _conversation(record: dict, pictures: list, folder: str) -> tuple[str, tuple[Turn, ...]]:
    """The system prompt and the turns of `messages` or, as LLaVA has them, `conversations`."""
    messages = "messages" in record
    key, who, what = (
        ("messages", "role", "content") if messages else ("conversations", "from", "value")
    )
    _expect(record[key], list, key)
    said = [_message(message, key, who, what) for message in record[key]]
    system, first = "", 1
    if said and said[0][0] == "system":
        system, shown = _content(said.pop(0)[1], what, folder, asked=False)
        first = 2
        if shown:
            raise RecordError("the system prompt shows a picture")
    for i, (role, _, _) in enumerate(said):
        if role != ("user", "assistant")[i % 2]:
            raise RecordError(
                f"message {i + first} is the {role}'s: user and assistant must alternate, the user "
                "first"
            )
    if not said or len(said) % 2:
        raise RecordError("the conversation does not end in an answer of the assistant")
    asked = [_content(content, what, folder, asked=True) for _, content, _ in said[::2]]
    _expect_places(sum(shown.count(NEXT) for _, shown in asked), len(pictures))
    rest, turns = iter(pictures), []
    for (question, shown), (_, content, thought) in zip(asked, said[1::2]):
        answer, in_answer = _content(content, what, folder, asked=False)
        if in_answer:
            raise RecordError("an answer shows a picture")
        shown = [next(rest) if picture is NEXT else picture for picture in shown]
        turns.append(_turn(question, shown, answer, thought))
    return system if system.strip() else "", tuple(turns)


def _message(message, key: str, who: str, what: str) -> tuple:
    """(role, content, thought) of a message; thought None = it is not named apart."""
    _expect(message, dict, f"a message of {key}")
    for name in (who, what):
        if message.get(name) is None:
            raise RecordError(f"a message of {key} has no {name!r}: its keys are {_keys(message)}")
    role = ROLES.get(message[who]) if isinstance(message[who], str) else None
    if role is None:
        raise RecordError(f"the role {reprlib.repr(message[who])} is not one of {', '.join(ROLES)}")
    return role, message[what], message.get("reasoning_content")


def _content(content, what: str, folder: str, *, asked: bool) -> tuple[str, list]:
    """A message's text, PLACE where it shows a picture, and those pictures, or NEXT for each that
    the record itself has.

    Args:
      asked: whether it is a question, where `<image>` in a string is such a place. In a typed part
        it is text.
    """
    if what == "value" or not isinstance(content, list):
        text = _text(content, what)
        if asked:
            text = text.replace(PLACE, "").replace(PLACEHOLDER, PLACE)
        return text, [NEXT] * text.count(PLACE) if asked else []
    text, shown = "", []
    for part in content:
        _expect(part, dict, "a part of content")
        kind = part.get("type")
        if kind == "text":
            written = _text(part.get("text"), "a text part")
            text += written.replace(PLACE, "") if asked else written
        elif kind in ("image", "image_url"):
            names = (kind, "url", "bytes", "path")
            given = [part[name] for name in names if part.get(name) is not None]
            picture = given[0] if given else NEXT
            if isinstance(picture, dict) and "url" in picture:
                picture = picture["url"]
            text += PLACE
            shown.append(picture if picture is NEXT else _picture(picture, folder))
        else:
            raise RecordError(
                f"a part of type {reprlib.repr(kind)}: text, image and image_url are known"
            )
    return text, shown


def _flat(record: dict, pictures: list) -> Turn:
    """`question` and `answer`; a hint and the options A, B, ... where a row of VLMEvalKit's has
    them."""
    lines = [_text(record["question"], "the question")]
    if record.get("hint"):
        lines.insert(0, f"Hint: {_text(record['hint'], 'the hint')}")
    for letter in string.ascii_uppercase:
        if option := _number_or_text(record.get(letter, ""), f"option {letter}"):
            lines.append(f"{letter}. {option}")
    if "answer" not in record:
        raise RecordError("a question without an answer")
    answer = _number_or_text(record["answer"], "the answer")
    thought = record.get("thought", record.get("reasoning"))
    question = "\n".join(lines).replace(PLACE, "")
    return _turn(PLACE * len(pictures) + question, pictures, answer, thought)


def _turn(question: str, pictures: list, answer: str, thought) -> Turn:
    """A turn as it is kept.

    Marks that all stand before the text go, with the white space after them: pictures come first
    anyway. A thought that is not named apart is what the answer begins with, in `<think>`; an empty
    one means that it was answered directly.
    """
    before = re.match(f"(?:\\s*{PLACE})*\\s*", question)[0]
    if pictures and before.count(PLACE) == len(pictures):
        question = question[len(before) :]
    if not question.strip() and not pictures:
        raise RecordError("an empty question")
    if thought is None and answer.lstrip().startswith("<think>"):
        thought, closed, answer = answer.lstrip()[len("<think>") :].partition("</think>")
        if not closed:
            raise RecordError("a thought that no </think> closes")
        thought, answer = thought.strip(), answer.lstrip()
    thought = None if thought is None else _text(thought, "the thought")
    if not answer.strip():
        raise RecordError("an empty answer")
    return Turn(question, tuple(pictures), answer, thought if thought and thought.strip() else None)


def _pictures(record: dict, folder: str) -> list:
    """The record's own pictures, in order: paths and bytes."""
    given = [record.get(key, "") for key in ("image", "images")]
    given = [value for value in given if value not in ("", [])]
    if len(given) == 2:
        raise RecordError("both image and images")
    pictures = given[0] if given else []
    return [_picture(p, folder) for p in (pictures if isinstance(pictures, list) else [pictures])]


def _picture(picture, folder: str) -> str | bytes:
    """Bytes, or the path of a file that is not looked at here."""
    if isinstance(picture, dict):  # as the parquet files of the Hugging Face Hub have them
        given = [picture[key] for key in ("bytes", "path") if picture.get(key) is not None]
        if not given:
            raise RecordError(f"a picture of neither bytes nor path: its keys are {_keys(picture)}")
        picture = given[0]
    if isinstance(picture, bytes):
        return picture
    name = _text(picture, "a picture")
    if name.startswith(("http://", "https://")):
        raise RecordError(f"the picture {name[:200]} is not here: nothing is downloaded")
    if name.startswith("data:"):
        head, _, data = name.partition(",")
        if not head.endswith(";base64"):
            raise RecordError(f"a picture as {head[:80]!r}: base64 is what is read")
        return from_base64(data)
    if not 0 < len(name) <= MAX_NAME:
        raise RecordError(f"a picture's name of {len(name)} characters")
    return os.path.join(folder, name)


def from_base64(data: str) -> bytes:
    """A picture's bytes. Raises RecordError where it is not base64."""
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError(f"a picture that is not base64: {error}") from None


def _packed(image) -> bytes:
    """A sample's picture as the bytes of a file."""
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    try:
        if isinstance(image, (str, os.PathLike)):
            with open(image, "rb") as f:
                return f.read()
        out = io.BytesIO()
        images.read(image).save(out, "PNG")
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read a picture: {error}") from None
    return out.getvalue()


def _text(value, what: str) -> str:
    """`value`, if it is text that can be written as UTF-8."""
    _expect(value, str, what)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{what} is not Unicode text: {error.reason}") from None
    return value


def _number_or_text(value, what: str) -> str:
    """JSON and parquet may have an answer as a number; not a number is how some say "none"."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        return str(value)
    return _text(value, what)


def _keys(record: dict) -> str:
    return ", ".join(map(str, record))[:300] or "none"


def _expect(value, kind: type, what: str):
    if not isinstance(value, kind):
        raise RecordError(f"{what} is {type(value).__name__}, not {kind.__name__}")


def _expect_places(places: int, pictures: int):
    if places != pictures:
        shown = f"{places} placeholders" if places else f"no placeholder {PLACEHOLDER}"
        raise RecordError(f"{shown} for {pictures} pictures")
