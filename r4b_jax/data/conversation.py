"""A conversation as token ids: by the checkpoint's own chat template where there is one, else by
the template of data/dialogue.py.

What a person typed can never become a control token: a template is rendered with marks in the
person's place, the control tokens are taken from what the template itself wrote, and everything
between two of them is encoded as plain text.
"""

import dataclasses
import datetime

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from r4b_jax.data.tokenizer import Tokenizer

# data/dialogue.py's template, of several turns; also for those who serve what was trained here.
OWN_TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content is string %}
        {{- '\\n' + message.content }}
    {%- else %}
        {%- for part in message.content if part.type == 'image' %}
            {{- (' ' if loop.first else '\\n') + '<image>' }}
        {%- endfor %}
        {%- for part in message.content if part.type == 'text' %}
            {{- '\\n' + part.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
MARK = "\ue000{}\ue001"  # of the private use area: no text has them, or they are taken out of it


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question with its pictures and, unless it is the last, the answer it was given."""

    question: str
    image_tokens: tuple[int, ...] = ()  # how many image tokens each of its pictures takes
    answer: str | None = None  # without the thought, as Qwen3's template leaves it out


def prompt_ids(tokenizer: Tokenizer, turns: list[Turn], template: str | None) -> list[int]:
    """The conversation up to and including the `<think>` of the reply to come.

    Raises:
      ValueError: the template cannot be rendered, or does not show every picture once.
    """
    counts = [count for turn in turns for count in turn.image_tokens]
    texts = [text for turn in turns for text in (turn.question, turn.answer) if text is not None]
    picture = tokenizer.image_name + "\n"
    own = OWN_TEMPLATE.replace("<image>", tokenizer.image_name)
    rendered = _render(own if template is None else template, turns, picture)
    parts = tokenizer.split_control(rendered)
    last_mark = max(i for i, part in enumerate(parts) if MARK[0] in str(part))
    ids: list[int] = []
    plain = ""
    for i, part in enumerate(parts):
        if isinstance(part, str):
            plain += part
            continue
        ids += tokenizer.encode(_filled(plain, texts)) if plain else []
        plain = ""
        if part == tokenizer.think_id and i > last_mark:  # the template chose a mode: our business
            break
        if part != tokenizer.image_id:
            ids.append(part)
            continue
        if not counts:
            raise ValueError("the chat template shows more pictures than there are")
        ids += [part] * counts.pop(0)
    if counts:
        raise ValueError(f"the chat template leaves out {len(counts)} pictures")
    ids += tokenizer.encode(_filled(plain, texts)) if plain else []
    return ids + [tokenizer.think_id]


def _filled(text: str, texts: list[str]) -> str:
    """The marks of a plain run replaced by what people wrote."""
    for i, written in enumerate(texts):
        text = text.replace(MARK.format(i), written.replace("\ue000", "").replace("\ue001", ""))
    return text


def _render(template: str, turns: list[Turn], picture: str) -> str:
    """The checkpoint's template with marks for what people wrote."""
    typed = "'image'" in template or '"image"' in template  # it takes lists of typed parts
    messages, number = [], 0
    for turn in turns:
        text = MARK.format(number)
        number += 1
        if typed:
            content = [{"type": "image"} for _ in turn.image_tokens]
            content.append({"type": "text", "text": text})
        else:
            content = picture * len(turn.image_tokens) + text
        messages.append({"role": "user", "content": content})
        if turn.answer is not None:
            text = MARK.format(number)
            content = [{"type": "text", "text": text}] if typed else text
            messages.append({"role": "assistant", "content": content})
            number += 1
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _today}
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, tools=None, bos_token="", eos_token=""
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template cannot be rendered: {error}") from None


class _Generation(Extension):
    """The tag {% generation %}, which marks what an assistant wrote: its body as it is."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _today(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _refuse(message: str):
    raise jinja2.TemplateError(message)
