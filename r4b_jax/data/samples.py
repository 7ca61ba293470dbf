"""What everything else works with: a conversation, its pictures, and how each turn is answered."""

import dataclasses
from typing import Any

# Unicode's own mark for "an embedded object stands here": where a question shows a picture.
PLACE = "\ufffc"


class RecordError(ValueError):
    """A record or a picture that cannot be used: it is set aside, counted, and named."""


@dataclasses.dataclass(frozen=True)
class SetAside:
    """What stands in a stream in the place of a sample that cannot be used."""

    id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question and how it is answered."""

    question: str  # PLACE where a picture is shown; without any, the pictures come first
    images: tuple[Any, ...] = ()  # paths, bytes, arrays uint8[h, w, 3]: see images.read
    answer: str = ""
    thought: str | None = None  # None = answered directly


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation of one turn or more; the last one is what is asked."""

    topic: str
    turns: tuple[Turn, ...]
    id: str = ""  # names it wherever something is told about it
    system: str = ""  # the system prompt, "" = none

    @classmethod
    def ask(cls, topic: str, image, question: str, answer: str, thought: str | None = None):
        """A single question, with one picture or None."""
        images = () if image is None else (image,)
        return cls(topic, (Turn(question, images, answer, thought or None),))

    @property
    def last(self) -> Turn:
        return self.turns[-1]

    @property
    def question(self) -> str:
        """What is asked, without the marks of pictures."""
        return self.last.question.replace(PLACE, "").strip()

    @property
    def answer(self) -> str:
        return self.last.answer

    @property
    def images(self) -> tuple[Any, ...]:
        """The pictures of all turns, in the order they are shown."""
        return tuple(image for turn in self.turns for image in turn.images)

    def answered(self, answer: str, thought: str | None) -> "Sample":
        """The same with another reply to what is asked."""
        last = dataclasses.replace(self.last, answer=answer, thought=thought)
        return dataclasses.replace(self, turns=(*self.turns[:-1], last))
