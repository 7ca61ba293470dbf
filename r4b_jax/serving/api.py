"""OpenAI's chat completions as this server takes them: a body, checked, becomes a request.

Whatever a stranger sends is either answered or refused with a sentence. What would change an answer
and is not to be had here (several choices, tools, penalties) is refused; other unknown fields are
ignored, as harnesses send many.
"""

import base64
import binascii
import dataclasses
import io
import json
import math
import secrets
import urllib.parse

import httpx
from PIL import Image

from r4b_jax.data.examples import Example, encode_prompt
from r4b_jax.data.samples import PLACE, RecordError, Sample, Turn
from r4b_jax.decoding.chat import MODE_NAMES, Model
from r4b_jax.serving.engine import Request

FORMATS = ("JPEG", "PNG", "WEBP")
LONGEST_TOKEN = 64  # characters; a text of more than this for every token is too long unread
REMOTE_SECONDS = 20.0
# Fields that would change the answer, with the values that change nothing.
REFUSED = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "logprobs": (False,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "response_format": ({"type": "text"},),
}
OURS = ("thinking_mode", "think_bias", "max_think_tokens")


class ApiError(Exception):
    """A refusal, in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param=None, **headers):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers

    @property
    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the server grants, and what holds where a request does not say."""

    name: str = "r4b"  # of the model, in requests
    mode: str = "auto"
    think_bias: float | None = None  # None = the checkpoint's own
    max_think_tokens: int | None = None
    temperature: float = 0.0
    inline_thoughts: bool = False  # the thought within the content, in <think> and </think>
    api_key: str = ""  # "" = none is asked for
    queue: int = 64  # requests that may wait beside those at work
    max_body: int = 64 * 2**20  # bytes
    max_images: int = 32
    max_image_bytes: int = 20 * 2**20
    max_image_pixels: int = 50_000_000
    image_hosts: tuple[str, ...] = ()  # remote pictures are fetched from these; "*" = from any


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request for the engine, and how its reply is wanted."""

    request: Request
    stream: bool
    include_usage: bool
    inline: bool
    stop: tuple[str, ...]


def read(raw: bytes, model: Model, options: Options, prompt_len: int, reply_len: int) -> Asked:
    """A body of /v1/chat/completions, as it came.

    Raises:
      ApiError: it is refused; the status is 4xx.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", "invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object", "invalid_json")
    name = _text(body, "model")
    if name != options.name:
        message = f"there is no model {name[:100]!r} here, but {options.name!r}"
        raise ApiError(404, message, "model_not_found", "model")
    for field, harmless in REFUSED.items():
        if body.get(field) is not None and body[field] not in harmless:
            raise ApiError(400, f"{field} is not supported", "unsupported_parameter", field)
    prompt = _prompt(_messages(body, options, prompt_len), model, prompt_len)
    room = min(reply_len, model.limit - len(prompt.tokens))
    if room < 1:
        raise _too_long(len(prompt.tokens), model.limit - 1)
    usage = body.get("stream_options") or {}
    return Asked(
        request=_request(body, model, options, prompt, room),
        stream=_flag(body, "stream", False),
        include_usage=isinstance(usage, dict) and usage.get("include_usage") is True,
        inline=not _flag(body, "separate_reasoning", not options.inline_thoughts),
        stop=_stop(body),
    )


def _request(body: dict, model: Model, options: Options, prompt: Example, room: int) -> Request:
    own = body.get("chat_template_kwargs") or {}
    if not isinstance(own, dict):
        raise _wrong("chat_template_kwargs", "an object")
    own = {name: own[name] for name in OURS if own.get(name) is not None}
    own |= {name: body[name] for name in OURS if body.get(name) is not None}
    mode = own.get("thinking_mode", options.mode)
    if not isinstance(mode, str) or mode not in MODE_NAMES:
        raise _wrong("thinking_mode", f"one of {', '.join(MODE_NAMES)}")
    bias = own.get("think_bias", options.think_bias)
    if isinstance(bias, str) and bias in ("inf", "+inf", "-inf"):  # strict JSON has no infinity
        bias = float(bias)
    bias = _number({"think_bias": bias}, "think_bias", model.think_bias, -math.inf, math.inf)
    wanted = _whole(body, "max_completion_tokens", _whole(body, "max_tokens", room, 1), 1)
    return Request(
        prompt=prompt,
        forced=model._forced(mode, bias),
        max_new_tokens=min(wanted, room),
        temperature=_number(body, "temperature", options.temperature, 0, 100),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1),
        top_k=max(0, min(_whole(body, "top_k", 0, -1), 2**30)),  # vLLM's -1 = all
        think_bias=bias if math.isfinite(bias) else 0.0,
        max_think_tokens=_whole(own, "max_think_tokens", options.max_think_tokens, 1, 2**30),
        seed=_whole(body, "seed", secrets.randbits(31), -(2**63), 2**64) % 2**31,
    )


def _prompt(sample: Sample, model: Model, prompt_len: int) -> Example:
    try:
        prompt = encode_prompt(model.tokenizer, model.config.vision, sample)
    except RecordError:  # its message names objects of ours
        message = "a picture is damaged and cannot be read"
        raise ApiError(400, message, "invalid_image", "messages") from None
    except ValueError as error:
        raise ApiError(400, f"{error}", "invalid_messages", "messages") from None
    if len(prompt.tokens) > prompt_len:
        raise _too_long(len(prompt.tokens), prompt_len)
    return prompt


def _too_long(length, most: int) -> ApiError:
    message = f"the prompt has {length} tokens, pictures included, and at most {most} fit"
    return ApiError(400, message, "context_length_exceeded", "messages")


# Messages


def _messages(body: dict, options: Options, prompt_len: int) -> Sample:
    """The conversation: questions with PLACE where a picture is shown, and earlier answers."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a list of messages that is not empty")
    system, turns, num_chars = "", [], 0
    asked: list[tuple[str, list[bytes]]] = []  # the user's since the last answer
    pictures_left = options.max_images
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise _wrong(f"messages[{i}].role", "system, user or assistant")
        text, pictures = _content(message.get("content"), i, options, pictures_left)
        pictures_left -= len(pictures)
        num_chars += len(text)
        if num_chars > LONGEST_TOKEN * prompt_len:
            raise _too_long(f"more than {prompt_len}", prompt_len)
        if role == "user":
            asked.append((text, pictures))
        elif pictures:
            raise ApiError(400, f"messages[{i}]: only a user shows pictures", param="messages")
        elif role == "assistant" and asked:
            turns.append(_turn(asked, text.rpartition("</think>")[2]))
            asked = []
        elif role != "assistant" and not turns and not asked:
            system = f"{system}\n{text}" if system else text
        else:
            raise ApiError(400, f"messages[{i}]: a {role} message cannot stand here", param=role)
    if not asked:
        raise ApiError(400, "the last message must be the user's", None, "messages")
    return Sample("chat", (*turns, _turn(asked, "")), system=system)


def _turn(asked: list[tuple[str, list[bytes]]], answer: str) -> Turn:
    question = "\n".join(text for text, _ in asked)
    pictures = tuple(picture for _, pictures in asked for picture in pictures)
    before, _, after = question.rpartition(PLACE)
    if not before.replace(PLACE, "").strip():  # all pictures come first: so were they trained
        question = after
    return Turn(question, pictures, answer)


def _content(content, i: int, options: Options, pictures_left: int) -> tuple[str, list[bytes]]:
    """The text of a message, PLACE where it shows a picture, and its pictures."""
    if content is None or isinstance(content, str):
        return (content or "").replace(PLACE, ""), []
    if not isinstance(content, list):
        raise _wrong(f"messages[{i}].content", "a string or a list of parts")
    texts, pictures = [], []
    for j, part in enumerate(content):
        where = f"messages[{i}].content[{j}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"].replace(PLACE, ""))
        elif kind == "image_url":
            if len(pictures) == pictures_left:
                message = f"there are more than {options.max_images} pictures"
                raise ApiError(400, message, "too_many_images", "messages")
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            pictures.append(_picture(url, where, options))
            texts.append(PLACE)
        else:
            raise _wrong(where, "a text or an image_url")
    text = "\n".join(texts)
    return text.replace(PLACE + "\n", PLACE).replace("\n" + PLACE, PLACE), pictures


def _picture(url, where: str, options: Options) -> bytes:
    """The bytes of a picture whose header is as it should be."""
    if not isinstance(url, str):
        raise _wrong(f"{where}.image_url.url", "a string")
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "data":
        data = _from_data_url(rest, where, options)
    elif scheme.lower() in ("http", "https"):
        data = _fetched(url, where, options)
    else:
        message = f"{where}: a picture is a data URL: data:image/png;base64,..."
        raise ApiError(400, message, "invalid_image_url", where)
    if len(data) > options.max_image_bytes:
        message = f"{where}: a picture has at most {options.max_image_bytes} bytes"
        raise ApiError(413, message, "image_too_large", where)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
    except Image.DecompressionBombError:
        width = height = math.inf
    except Exception:  # Pillow's readers raise all kinds
        message = f"{where}: not a picture in {', '.join(FORMATS)}"
        raise ApiError(400, message, "invalid_image", where) from None
    if width * height > options.max_image_pixels:
        message = f"{where}: a picture has at most {options.max_image_pixels} pixels"
        raise ApiError(413, message, "image_too_large", where)
    return data


def _from_data_url(rest: str, where: str, options: Options) -> bytes:
    head, comma, payload = rest.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        message = f"{where}: a data URL is data:image/png;base64,..."
        raise ApiError(400, message, "invalid_image_url", where)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{where}: wrong base64", "invalid_base64", where) from None


def _fetched(url: str, where: str, options: Options) -> bytes:
    try:
        host = urllib.parse.urlsplit(url).hostname or ""
    except ValueError:
        host = ""
    if host not in options.image_hosts and "*" not in options.image_hosts:
        message = f"{where}: pictures of other servers are refused here; send a data URL"
        raise ApiError(400, message, "remote_image_refused", where)
    data = b""
    try:  # no redirects: they would lead to hosts that are not allowed
        with httpx.stream("GET", url, timeout=REMOTE_SECONDS) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > options.max_image_bytes:
                    break
    except (httpx.HTTPError, httpx.InvalidURL):
        message = f"{where}: the picture could not be fetched"
        raise ApiError(400, message, "image_not_fetched", where) from None
    return data


# Fields


def _wrong(field: str, expected: str) -> ApiError:
    return ApiError(400, f"{field} must be {expected}", "invalid_value", field)


def _text(body: dict, field: str) -> str:
    if not isinstance(body.get(field), str):
        raise _wrong(field, "a string")
    return body[field]


def _flag(body: dict, field: str, default: bool) -> bool:
    value = body.get(field)
    if value is not None and not isinstance(value, bool):
        raise _wrong(field, "true or false")
    return default if value is None else value


def _number(body: dict, field: str, default, low, high):
    """A number of low to high; null and nothing are the default."""
    value = body.get(field)
    if value is None:
        return default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN is in no range
        raise _wrong(field, f"a number from {low:g} to {high:g}")
    return float(value) if abs(value) < 2**63 else math.copysign(math.inf, value)


def _whole(body: dict, field: str, default, low: int, high: float = math.inf):
    value = body.get(field)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(field, f"a whole number, at least {low}")
    return value


def _stop(body: dict) -> tuple[str, ...]:
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    fine = isinstance(stop, list) and all(isinstance(s, str) and 0 < len(s) <= 256 for s in stop)
    if not fine or len(stop) > 16:
        raise _wrong("stop", "a string or up to 16 of them")
    return tuple(stop)
