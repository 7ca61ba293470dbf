"""A conversation as the ids of a prompt: by the checkpoint's own chat template where there is one,
else by the one of R-4B's model card.

What a person typed can never become a control token: a template is rendered with marks in the
person's place, the control tokens are taken from what the template itself wrote, and everything
between two of them is encoded as plain text.
"""

import datetime
import functools
import re
from collections.abc import Sequence

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from r4b_jax.data.samples import PLACE, Turn
from r4b_jax.data.tokenizer import IMAGE, Tokenizer

# The model card's prompt, of several turns; also for those who serve what was trained here.
OWN_TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content is string %}
        {{- '\\n' + message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- (' ' if loop.first else '\\n') + '<image>' }}
            {%- else %}
                {{- '\\n' + part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
MARK = "\ue000{}\ue001"  # of the private use area: no text has them, or they are taken out of it
_MARKS = re.compile(MARK.format(r"(\d+)"))


def prompt_ids(
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    image_tokens: Sequence[int],
    system: str = "",
    known: dict[str, list[int]] | None = None,
) -> list[int]:
    """The conversation up to and including the `<think>` of the reply to come.

    Args:
      turns: of the last one neither answer nor thought is read; of the others no thought, as
        Qwen3's template leaves them out.
      image_tokens: how many tokens each picture takes, in the order the turns show them.
      known: ids of texts, for prompts of which one begins as the other; it is added to.
    Raises:
      ValueError: the template cannot be rendered, or does not show every picture once.
    """
    counts, known = list(image_tokens), {} if known is None else known

    def encoded(plain: str) -> list[int]:
        text = _filled(plain, texts)
        if text not in known:
            known[text] = tokenizer.encode(text)
        return known[text]

    template = tokenizer.template
    if template is None:
        template = OWN_TEMPLATE.replace(IMAGE, tokenizer.image_name)
    rendered, texts = _render(template, turns, system, tokenizer.image_name + "\n")
    parts = tokenizer.split_control(rendered)
    last_mark = max((i for i, part in enumerate(parts) if MARK[0] in str(part)), default=-1)
    ids: list[int] = []
    plain = ""
    for i, part in enumerate(parts):
        if isinstance(part, str):
            plain += part
            continue
        ids += encoded(plain) if plain else []
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
    ids += encoded(plain) if plain else []
    return ids + [tokenizer.think_id]


def _filled(text: str, texts: list[str]) -> str:
    """The marks of a plain run replaced by what people wrote."""
    return _MARKS.sub(lambda mark: texts[int(mark[1])], text)


def _render(template: str, turns: Sequence[Turn], system: str, picture: str):
    """(The template with marks for what people wrote, what they wrote)."""
    typed = "'image'" in template or '"image"' in template  # it takes lists of typed parts
    texts: list[str] = []

    def content(text: str, num_images: int = 0):
        parts = _parts(text, num_images)
        for part in parts:
            if part["type"] == "text":
                texts.append(part["text"].replace(MARK[0], "").replace(MARK[-1], ""))
                part["text"] = MARK.format(len(texts) - 1)
        if typed:
            return parts
        plain = ""
        for part in parts:
            between = "\n" if plain and part["type"] == "image" and plain[-1] != "\n" else ""
            plain += between + part.get("text", picture)
        return plain

    messages = [{"role": "system", "content": content(system)}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": content(turn.question, len(turn.images))})
        messages.append({"role": "assistant", "content": content(turn.answer.strip())})
    try:
        rendered = _compiled(template).render(
            messages=messages[:-1],
            add_generation_prompt=True,
            tools=None,
            bos_token="",
            eos_token="",
        )
    except Exception as error:  # what a template does to a message may raise anything
        raise ValueError(f"the chat template cannot be rendered: {error}") from None
    return rendered, texts


def _parts(text: str, num_images: int) -> list[dict]:
    """A question as typed parts: texts, and pictures where it shows them.

    Raises:
      ValueError: it shows another number of pictures than it has.
    """
    pieces = text.split(PLACE)
    if len(pieces) == 1:  # the pictures come first
        return [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    if len(pieces) - 1 != num_images:
        raise ValueError(f"a question shows {len(pieces) - 1} pictures and has {num_images}")
    parts: list[dict] = []
    for i, piece in enumerate(pieces):
        parts += [{"type": "image"}] if i else []
        # A template puts a line break between parts itself.
        piece = piece.removeprefix("\n") if i else piece
        piece = piece if i == len(pieces) - 1 else piece.removesuffix("\n")
        parts += [{"type": "text", "text": piece}] if piece.strip() else []
    return parts


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _today}
    return environment.from_string(template)


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
