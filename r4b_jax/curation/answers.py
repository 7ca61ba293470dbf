"""Who answers: the project's own model in its rollout engine, or a model behind an endpoint.

Teacher, judge and reasoner are each one or the other. Both kinds take the same questions and give
the same `Answer`: a text, or the fault why there is none.
"""

import contextlib
import dataclasses
import io
import json
from typing import Protocol

import jax
import numpy as np
import PIL.Image

from r4b_jax.common import processes, sharding
from r4b_jax.common.endpoint import Answer, Endpoint, Request, user_message
from r4b_jax.config import Config, EndpointConfig
from r4b_jax.curation.prompts import FORMS
from r4b_jax.data import dialogue, images
from r4b_jax.data.examples import Example, encode_prompt
from r4b_jax.data.mixture import stream_seed
from r4b_jax.data.records import to_record
from r4b_jax.data.samples import Sample
from r4b_jax.data.tokenizer import Tokenizer
from r4b_jax.decoding.generate import Ids, for_generation, forced_array, generate
from r4b_jax.decoding.prompts import bucket, pad_prompts
from r4b_jax.decoding.sampling import Sampling

CUT_OFF = "cut off (length)"  # the fault of an answer that has no end: an endpoint's words too


@dataclasses.dataclass(frozen=True)
class Ask:
    """A sample whose last question is to be answered."""

    sample: Sample
    number: int  # of the query in the run: what is drawn depends on it and on the try alone
    reward: str = ""  # what will grade the answer


class Answerer(Protocol):
    """A teacher, judge or reasoner."""

    name: str
    counters: dict[str, int]

    def ask(self, asks: list[Ask], count: int = 1, first: int = 0) -> list[list[Answer]]:
        """`count` answers to each, the tries `first`, first + 1, ..."""


@dataclasses.dataclass(frozen=True)
class People:
    """Who is asked; None = there is nobody."""

    teacher: Answerer | None
    judge: Answerer | None
    reasoner: Answerer | None

    @property
    def present(self) -> dict[str, Answerer]:
        roles = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {role: who for role, who in roles.items() if who is not None}


@contextlib.contextmanager
def people(config: Config, params: dict | None, tokenizer: Tokenizer | None, cache: str):
    """Teacher, judge and reasoner as `config.curation` names them.

    Args:
      params, tokenizer: the own model, who is all that have no url; None = there is none.
      cache: folder of the endpoints' answers.
    Raises:
      ConfigError: an endpoint's settings cannot be used.
    """
    curation, own, found = config.curation, None, {}
    modes = {"teacher": "non-thinking", "judge": "non-thinking", "reasoner": "thinking"}
    with contextlib.ExitStack() as stack:
        for role, mode in modes.items():
            settings = getattr(curation, role)
            if settings.url:
                first = processes.is_first()  # the others are told
                endpoint = stack.enter_context(Endpoint(settings, cache)) if first else None
                found[role] = Outside(settings, endpoint)
            elif params is not None:
                own = own or OwnModel(config, params, tokenizer)
                found[role] = Own(own, mode, settings.temperature, f"curation/{role}")
            else:
                found[role] = None
        yield People(**found)


class OwnModel:
    """The project's model with its parameters ready for generation."""

    def __init__(self, config: Config, params: dict, tokenizer: Tokenizer):
        self.config, self.tokenizer, self.ids = config, tokenizer, Ids.of(tokenizer)
        with sharding.for_rollouts(config.generate.tensor):
            self.params = for_generation(config.model, params)
            shards = sharding.row_shards(sharding.current())
        # Queries a call: each copy of the parameters answers the same number.
        self.size = -(-config.generate.batch_size // shards) * shards

    def prompt(self, sample: Sample) -> Example:
        """Raises ValueError: a picture cannot be read, or the prompt is too long."""
        prompt = encode_prompt(self.tokenizer, self.config.model.vision, sample)
        bucket(len(prompt.tokens), self.config.generate.prompt_len)
        return prompt

    def answer(self, prompts: list[Example], mode: str, keys, sampling) -> list[list[Answer]]:
        """As many answers to each of at most `size` prompts as it has keys.

        Args:
          keys: typed keys [Q, R].
        """
        generation, count = self.config.generate, len(prompts)
        filled = [*range(count), *[0] * (self.size - count)]  # one shape, one compilation
        full, keys = [prompts[i] for i in filled], keys[np.array(filled)]
        forced = [dialogue.forced_ids(self.tokenizer, mode)] * keys.shape[1]
        forced = forced_array(forced, self.size)
        forced[count:] = self.ids.end  # those that only fill up end at once
        patches = self.config.model.vision.num_patches
        padded = pad_prompts(full, generation.prompt_len, self.ids.pad, patches)
        with sharding.for_rollouts(generation.tensor):
            out = generate(
                self.config.model,
                self.params,
                *sharding.place_rows((padded, forced, keys)),
                self.ids,
                max_new_tokens=generation.max_new_tokens,
                sampling=sampling,
                queries_at_once=generation.queries_at_once,
                rollouts_at_once=generation.rollouts_at_once,
            )
        out = processes.fetch(out)
        replies = zip(out.tokens[:count], out.lengths[:count])
        return [[self._taken(t[:n]) for t, n in zip(*of_query)] for of_query in replies]

    def _taken(self, tokens) -> Answer:
        reply = dialogue.split_reply(self.tokenizer, tokens)
        fault = CUT_OFF if reply.answer is None else ""
        return Answer(reply.answer, reply.thought, fault)


class Own:
    """The own model in one mode. How much it may write is `config.generate`'s business."""

    def __init__(self, model: OwnModel, mode: str, temperature: float, stream: str):
        self.model, self.mode = model, mode
        self.name = f"the own model, {mode}"
        self.counters = {"asked": 0, "failed": 0}
        limit = model.config.generate.max_direct_tokens or None
        self.sampling = Sampling.of(temperature, max_direct_tokens=limit)
        self.key = jax.random.key(stream_seed(model.config.seed, stream))

    def ask(self, asks: list[Ask], count: int = 1, first: int = 0) -> list[list[Answer]]:
        answers: list[list[Answer]] = [[] for _ in asks]
        prompts = {}
        for i, ask in enumerate(asks):
            try:
                prompts[i] = self.model.prompt(ask.sample)
            except ValueError as error:
                answers[i] = [Answer(None, fault=str(error))] * count
        places, size = list(prompts), self.model.size
        tries = np.arange(first, first + count, dtype=np.uint32)
        for some in (places[i : i + size] for i in range(0, len(places), size)):
            numbers = np.array([asks[i].number for i in some], np.uint32)
            keys = _fold_each(_fold_each(self.key, numbers), tries)
            taken = self.model.answer([prompts[i] for i in some], self.mode, keys, self.sampling)
            for i, of_query in zip(some, taken):
                answers[i] = of_query
        self.counters["asked"] += len(asks) * count
        self.counters["failed"] += sum(a.text is None for of_one in answers for a in of_one)
        return answers


def _fold_each(keys, numbers: np.ndarray):
    """Typed keys [...] -> [..., n], one for each number."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    for _ in keys.shape:
        fold = jax.vmap(fold, (0, None))
    return fold(keys, numbers)


class Outside:
    """A model behind an endpoint. It is told what form its answer is to have (prompts.FORMS), and
    sees no thoughts of earlier turns.

    Args:
      endpoint: of the first process; the others have None, and are told what it was answered.
    """

    def __init__(self, settings: EndpointConfig, endpoint: Endpoint | None):
        self.endpoint, self.name = endpoint, f"{settings.model} at {settings.url}"

    @property
    def counters(self) -> dict[str, int]:
        names = ("asked", "cached", "retried", "failed")
        return told({name: getattr(self.endpoint, name, 0) for name in names})

    def ask(self, asks: list[Ask], count: int = 1, first: int = 0) -> list[list[Answer]]:
        if self.endpoint is None:
            return [[Answer(*a) for a in of_one] for of_one in told(None)]
        requests, sent, answers = [], [], [[] for _ in asks]
        for i, ask in enumerate(asks):
            try:
                said = messages(ask)
            except ValueError as error:
                answers[i] = [Answer(None, fault=str(error))] * count
                continue
            requests += [Request(said, number) for number in range(first, first + count)]
            sent += [i] * count
        for i, answer in zip(sent, self.endpoint.ask(requests)):
            answers[i].append(answer)
        told([[dataclasses.astuple(a) for a in of_one] for of_one in answers])
        return answers


def messages(ask: Ask) -> list[dict]:
    """A question with its pictures and earlier turns, as in OpenAI's API.

    Raises:
      ValueError: a picture cannot be read or sent.
    """
    *said, _ = to_record(ask.sample)["messages"]
    if form := FORMS.get(ask.reward):
        said[-1]["content"].append({"type": "text", "text": form})
    out = []
    for message in said:
        content = message["content"]
        if message["role"] == "user":
            content = [part for part in content if part.get("text") != ""]
            if any(part["type"] == "image" for part in content):
                content = [_sent(part) if part["type"] == "image" else part for part in content]
            else:  # a server of a text model may take nothing but a string
                content = "\n".join(part["text"] for part in content)
        out.append({"role": message["role"], "content": content})
    return out


def _sent(part: dict) -> dict:
    """A picture as it is sent: as the file has it, if any server shows that upright."""
    data = part["image"]
    with PIL.Image.open(io.BytesIO(data)) as picture:
        common = picture.format in ("JPEG", "PNG", "WEBP")
        turned = picture.getexif().get(images.ORIENTATION, 1) != 1
    if turned or not common:
        out = io.BytesIO()
        images.read(data).save(out, "PNG")
        data = out.getvalue()
    return user_message("", [data])[0]["content"][0]


def told(value):
    """The first process's `value`, anything JSON can hold, on all."""
    if jax.process_count() == 1:
        return value
    data = json.dumps(value).encode()
    length = int(processes.agree(np.array(len(data))))
    mine = np.frombuffer(data.ljust(length)[:length], np.uint8)
    return json.loads(processes.agree(mine).tobytes())
