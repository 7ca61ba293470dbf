"""Questions to a model behind any OpenAI-compatible server: a teacher, a reasoner, a judge.

A long list is asked over hours, of a server that is at times overloaded, restarted or wrong. So
what may pass is asked again after ever longer waits, what cannot pass is told as the fault of its
one request, and what would fail every request (a wrong key, a server that is gone) stops the list
at once with a ConfigError. Good answers are kept on disk as they come, and only good ones: a second
run asks what is still missing, whether the first one was killed or met faults.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import email.utils
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence

import diskcache
import httpx
import PIL.Image
import tenacity

from r4b_jax.config import ConfigError, EndpointConfig

OPEN = 4  # requests begun, for each one under way: the others wait between their tries
LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
CONNECT_SECONDS = 10.0  # a server that is there takes a connection at once, however busy it is
MESSAGE_LEN = 300  # characters of a server's error message
WRONG_SETTINGS = (401, 403, 404, 405)  # the key, the url or the model: equal for every request
PASSING = (408, 409, 429)  # and 5xx
DOWN = (429, 502, 503)  # used up, or a gateway without a server: hardly one request's own fault

logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line for every request


@dataclasses.dataclass(frozen=True)
class Request:
    messages: list[dict]  # as in OpenAI's API; pictures are data URLs: see `user_message`
    number: int = 0  # which of several answers to the same messages; the server's `seed`


@dataclasses.dataclass(frozen=True)
class Answer:
    text: str | None  # None = no answer, and `fault` says why
    thought: str | None = None  # what the model wrote before it answered, where it tells
    fault: str = ""  # one line


class _Fault(Exception):
    """No answer. `again`: another try may bring one; `down`: it looks as if no request would be
    answered."""

    def __init__(self, message: str, again: bool = True, down: bool = False):
        super().__init__(message)
        self.again, self.down = again, down


def user_message(text: str, images: Sequence[bytes] = (), system: str = "") -> list[dict]:
    """The messages that ask `text` about `images`, files as they are on disk, in order.

    Raises:
      OSError: PIL does not know the type of an image.
    """
    content = [{"type": "image_url", "image_url": {"url": _data_url(x)}} for x in images]
    content.append({"type": "text", "text": text})
    messages = [{"role": "user", "content": content if images else text}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _data_url(image: bytes) -> str:
    with PIL.Image.open(io.BytesIO(image)) as opened:
        kind = opened.format.lower()
    kind = kind.replace("mpo", "jpeg")  # a phone's JPEG with a second one behind it
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _complete(coroutine):
    """Run it to its end; in a thread where the caller's has an event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


class Endpoint(contextlib.AbstractContextManager):
    """Asks the model that `config` names.

        with Endpoint(config.curation.teacher, f"{folder}/answers") as teacher:
            answers = teacher.ask([Request(user_message("How many?", [png]), n) for n in range(8)])

    Args:
      cache: a folder, which several endpoints and processes may share; on a disk of this machine,
        as SQLite's locks do not hold on network disks.
      first_wait: seconds before the second try; each later wait is twice as long.
    Attributes:
      asked, failed: requests that were sent, and those of them that have no answer.
      cached: requests whose answer was kept, or came with an equal one's.
      retried: tries beyond the first of a request.
    Raises:
      ConfigError: the url, the model or the key cannot be used.
    """

    def __init__(self, config: EndpointConfig, cache: str, first_wait: float = 1.0):
        self.config = config
        self.asked = self.cached = self.retried = self.failed = 0
        if not config.url.startswith(("http://", "https://")) or not config.model:
            raise ConfigError(f"no endpoint: url {config.url!r}, model {config.model!r}")
        if config.concurrency < 1:
            raise ConfigError(f"an endpoint's concurrency is 1 or more, not {config.concurrency}")
        self._url = config.url.rstrip("/") + "/chat/completions"
        self._key = os.environ.get(config.key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"${config.key_variable} has characters that no key can have")
        back_off = tenacity.wait_exponential(multiplier=first_wait, max=LONGEST_WAIT)
        self._back_off = back_off + tenacity.wait_random(0, first_wait)
        self._gap = 60 / config.requests_per_minute if config.requests_per_minute else 0.0
        self._next = 0.0  # time.monotonic() from which a request may be sent
        self._unreached = 0  # requests in a row that found the server down
        self._cache = diskcache.Cache(cache, eviction_policy="none")  # else 1 GB

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._cache.close()

    def ask(self, requests: Sequence[Request], progress=None) -> list[Answer]:
        """Answers in the order of `requests`, from the cache where it has them; blocks.

        Equal requests are sent once: a sampled answer would else differ between this run and one
        that finds the cache filled. Not for several threads.

        Args:
          progress: told by `advance(number)` as answers come, such as metrics.Progress.
        Raises:
          ConfigError: the server refuses the key, the model or the url; or it was down for
            2 * concurrency requests in a row, through all their tries.
        """
        keys = [self._cache_key(request) for request in requests]
        kept = {key: self._cache.get(key, retry=True) for key in dict.fromkeys(keys)}
        found = {key: text and Answer(*json.loads(text)) for key, text in kept.items()}
        missing = {key: x for key, x in zip(keys, requests) if found[key] is None}
        self.cached += len(keys) - len(missing)
        advance = (lambda _: None) if progress is None else progress.advance
        advance(len(keys) - len(missing))
        if missing:
            try:
                _complete(self._ask_all(missing, found, advance))
            except ExceptionGroup as group:  # one is enough to tell: mostly all are the same
                raise group.exceptions[0] from None
        return [found[key] for key in keys]

    def _cache_key(self, request: Request) -> str:
        """Of all that the answer depends on: the body has it, but for the server."""
        return hashlib.sha256(f"{self._url}\n".encode() + self._body(request)).hexdigest()

    def _body(self, request: Request) -> bytes:
        """What is sent; ASCII, so that no broken character of a data set can stop it."""
        config = self.config
        body = {"model": config.model, "messages": request.messages, "seed": request.number}
        body |= {"temperature": config.temperature, "max_tokens": config.max_tokens}
        return json.dumps(body, sort_keys=True).encode()

    async def _ask_all(self, missing: dict[str, Request], found: dict, advance: Callable):
        self._slots = asyncio.Semaphore(self.config.concurrency)
        self._turn = asyncio.Lock()
        jobs = iter(missing.items())  # all workers take from it
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        headers["Content-Type"] = "application/json"
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)  # `_try` times the whole
        limits = httpx.Limits(max_connections=None)  # the slots bound it, 100 is httpx's own
        client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        async with client, asyncio.TaskGroup() as group:
            for _ in range(min(len(missing), OPEN * self.config.concurrency)):
                group.create_task(self._work(client, jobs, found, advance))

    async def _work(self, client, jobs: Iterator, found: dict, advance: Callable):
        for key, request in jobs:
            self.asked += 1
            found[key] = answer = await self._answer(client, self._body(request))
            if answer.text is None:
                self.failed += 1
            else:
                self._cache.set(key, json.dumps([answer.text, answer.thought]), retry=True)
            advance(1)

    async def _answer(self, client: httpx.AsyncClient, body: bytes) -> Answer:
        """As many tries as are allowed. The waits between them hold no slot."""
        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: getattr(error, "again", False)),
            stop=tenacity.stop_after_attempt(self.config.retries + 1),
            wait=self._back_off,
            reraise=True,
        )
        down = False
        try:
            answer = await tries(self._try, client, body)
        except _Fault as fault:
            number, down = tries.statistics["attempt_number"], fault.down
            after = f" after {number} tries" if number > 1 else ""
            answer = Answer(None, fault=f"{fault}{after}")
        self.retried += tries.statistics["attempt_number"] - 1
        self._unreached = self._unreached + 1 if down else 0
        if self._unreached >= 2 * self.config.concurrency:
            raise ConfigError(
                f"{self._url} did not serve {self._unreached} requests in a row, the last with: "
                f"{answer.fault}. The answers that came are kept: run again when it is up"
            )
        return answer

    async def _try(self, client: httpx.AsyncClient, body: bytes) -> Answer:
        async with self._slots:
            await self._pace()
            try:
                async with asyncio.timeout(self.config.timeout):
                    response = await client.post(self._url, content=body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                raise _Fault(self._line(f"no connection ({error!r})"), down=True) from None
            except TimeoutError:
                raise _Fault(f"time-out ({self.config.timeout:g} s)") from None
            except httpx.RequestError as error:
                raise _Fault(self._line(f"the connection broke ({error!r})")) from None
        self._check(response)
        return self._read(response)

    async def _pace(self):
        """Wait for this request's turn: requests leave one by one, at even distances."""
        async with self._turn:
            while (wait := self._next - time.monotonic()) > 0:  # a reply may have put it off
                await asyncio.sleep(wait)
            self._next = time.monotonic() + self._gap

    def _check(self, response: httpx.Response):
        """Raise what the status says."""
        status = response.status_code
        if response.is_success:
            return
        told = self._line(f"HTTP {status}: {_server_message(response.text)}")
        if status in WRONG_SETTINGS or response.is_redirect:
            raise ConfigError(
                f"{self._url} answers {told}. Check `url`, `model` ({self.config.model}) and the "
                f"key in ${self.config.key_variable}, which is {'' if self._key else 'not '}set"
            )
        # A limit is one for all: requests that have not left yet would only use up their tries.
        resume = time.monotonic() + _retry_after(response.headers.get("Retry-After", ""))
        self._next = max(self._next, resume)
        raise _Fault(told, again=status in PASSING or status >= 500, down=status in DOWN)

    def _read(self, response: httpx.Response) -> Answer:
        try:
            choice = response.json()["choices"][0]
            message, end = choice["message"], choice.get("finish_reason")
            text = message.get("content") or ""
            thought = message.get("reasoning_content") or message.get("reasoning")
            thought, text = (thought, text) if thought else _split(text)
            # Half a surrogate pair, legal in JSON, could be written to no file.
            thought, text = (x.strip().encode(errors="replace").decode() for x in (thought, text))
        except (ValueError, RecursionError):
            raise _Fault("the reply is no JSON") from None
        except (KeyError, IndexError, TypeError, AttributeError):
            told = self._line(_server_message(response.text))
            raise _Fault(f"the reply has no text in its choices: {told}") from None
        if end in ("length", "content_filter", "abort", "error"):  # a part of an answer is none
            raise _Fault(f"cut off ({end})", again=end in ("abort", "error"))
        if not text:
            raise _Fault("the reply is empty")
        return Answer(text, thought or None)

    def _line(self, text: str) -> str:
        """One line of a message without the key, should a server repeat it."""
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:MESSAGE_LEN]


def _server_message(text: str) -> str:
    """What the server says: `{"error": {"message": ...}}` and what else is in use."""
    with contextlib.suppress(ValueError, RecursionError):
        told = json.loads(text)
        for name in ("error", "message", "detail"):
            told = told.get(name, told) if isinstance(told, dict) else told
        text = told if isinstance(told, str) else text
    return text


def _retry_after(value: str) -> float:
    """Seconds; the header has a number of them or a date."""
    seconds = 0.0
    with contextlib.suppress(ValueError, OverflowError):  # or neither
        date = email.utils.parsedate_tz(value)
        seconds = email.utils.mktime_tz(date) - time.time() if date else float(value or 0)
    return max(0.0, min(seconds, LONGEST_WAIT))


def _split(content: str) -> tuple[str, str]:
    """(thought, answer). Where a server does not take them apart, the thought stands first, and
    its `<think>` is missing if the model's template ends in it."""
    before, end, after = content.strip().partition("</think>")
    if before.startswith("<think>"):
        return before.removeprefix("<think>"), after  # never closed: no answer
    if end and "<think>" not in before:  # else an answer that writes about the tags
        return before, after
    return "", content
