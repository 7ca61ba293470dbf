"""Replies in OpenAI's shape: thought and answer apart, whole or piece by piece."""

import time
import uuid

import numpy as np

from r4b_jax.decoding.chat import Model
from r4b_jax.serving.api import Asked
from r4b_jax.serving.engine import Ticket

# What the content is where there is no answer: harnesses take an empty one for a failure and ask
# again. Neither can be read as a choice, a number, a yes or a no.
CUT_OFF = "[cut off before the answer]"
NO_ANSWER = "[empty answer]"


class Reply:
    """The reply of one ticket, as it grows.

    Attributes:
      text: field of the message -> all of it so far.
      ended: nothing more will come, at its own end, at a stop string, or cut off.
    """

    def __init__(self, model: Model, asked: Asked, name: str):
        self.model, self.asked, self.name = model, asked, name
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.text = {"reasoning_content": "", "content": ""}
        self.ids: list[int] = []
        self.p_think: float | None = None
        self.ended = self.stopped = False

    def update(self, ticket: Ticket) -> dict[str, str]:
        """What is new since the last call: field -> text, the thought first."""
        done = ticket.done  # read first: what is there by then is all
        self.ids, self.p_think = ticket.ids[:], ticket.p_think
        (_, thought), (_, answer) = self.model._parts(np.array(self.ids, np.int32), done)
        closed = self.model.ids.end_think in self.ids
        answer = self._until_stop(answer, done)
        self.ended = done or self.stopped
        if self.ended and not answer and not (self.asked.inline and not closed):
            answer = NO_ANSWER if self._finish_reason() == "stop" else CUT_OFF
        if self.asked.inline:
            opened = "<think>\n" if self.ids else ""
            between = "\n</think>\n\n" if closed else ""
            thought, answer = "", opened + thought + between + answer
        new = {}
        for field, whole in (("reasoning_content", thought), ("content", answer)):
            if len(whole) > len(self.text[field]):
                new[field] = whole[len(self.text[field]) :]
                self.text[field] = whole
        return new

    def _until_stop(self, answer: str, done: bool) -> str:
        """The answer up to the first stop string; while more may come, without an end that may be
        the beginning of one."""
        found = [place for stop in self.asked.stop if (place := answer.find(stop)) >= 0]
        if found:
            self.stopped = True
            return answer[: min(found)].rstrip()
        if self.asked.stop and not done:
            held = max(map(len, self.asked.stop)) - 1
            return answer[: max(0, len(answer) - held)].rstrip()
        return answer

    def _finish_reason(self) -> str:
        return "stop" if self.stopped or self.model.ids.end in self.ids else "length"

    @property
    def _thinks(self) -> bool:
        return self.ids[:1] == [self.model.ids.thinking]

    def _usage(self) -> dict:
        prompt, close = len(self.asked.request.prompt.tokens), self.model.ids.end_think
        thought = self.ids.index(close) if close in self.ids else len(self.ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": len(self.ids),
            "total_tokens": prompt + len(self.ids),
            "completion_tokens_details": {"reasoning_tokens": thought if self._thinks else 0},
        }

    def _body(self, kind: str, choices: list[dict]) -> dict:
        """`p_think` and `mode` are ours: the model's own P(thinking), and what was done."""
        own = {}
        if self.ids:
            own = {"p_think": self.p_think, "mode": "thinking" if self._thinks else "non-thinking"}
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.name}
        return head | {"choices": choices} | own

    def completion(self) -> dict:
        """The answer to a request that is not streamed."""
        message = {
            "role": "assistant",
            "content": self.text["content"],
            "reasoning_content": self.text["reasoning_content"] or None,
            "refusal": None,
        }
        choice = {"index": 0, "message": message, "finish_reason": self._finish_reason()}
        body = self._body("chat.completion", [choice | {"logprobs": None}])
        return body | {"usage": self._usage()}

    def chunk(self, delta: dict, last: bool = False) -> dict:
        """A piece of a streamed answer."""
        reason = self._finish_reason() if last else None
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return self._body("chat.completion.chunk", [choice])

    def usage_chunk(self) -> dict:
        """The piece after the last one, for those who ask for it."""
        return self._body("chat.completion.chunk", []) | {"usage": self._usage()}
