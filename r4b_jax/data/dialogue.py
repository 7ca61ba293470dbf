"""The template, the three modes, what carries loss, and how a reply is taken apart (PAPER.md
section 1).

    <|im_start|>user <image>...<image>\\nQUESTION<|im_end|><|im_start|>assistant\\n<think>   the
    prompt
        auto:         nothing more; the model's next token decides
        thinking:     \\n            then the model writes TRACE\\n</think>\\n\\nANSWER<|im_end|>
        non-thinking: \\n\\n</think>  then the model writes \\n\\nANSWER<|im_end|>

This file alone knows these strings. `\\n` and `\\n\\n` are one token each, so the mode is one
token.
"""

import dataclasses

import numpy as np

from r4b_jax.data.tokenizer import Tokenizer

MODES = ("auto", "thinking", "non-thinking")


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply taken apart. `answer` is None if it was cut off: no end token, or a thought never
    closed."""

    thought: str | None
    answer: str | None
    thinks: bool
    num_tokens: int


def prompt_ids(tokenizer: Tokenizer, question: str, image_tokens: list[int]) -> list[int]:
    """The prompt up to and including `<think>`, the same for all three modes.

    Args:
      image_tokens: how many image tokens each picture takes; [] = no picture.
    """
    ids = [tokenizer.control("<|im_start|>")]
    before = "user "
    for count in image_tokens:
        ids += tokenizer.encode(before) + [tokenizer.image_id] * count
        before = "\n"
    ids += tokenizer.encode(("" if image_tokens else "user") + f"\n{question}")
    ids += [tokenizer.end_id, tokenizer.control("<|im_start|>")]
    return ids + tokenizer.encode("assistant\n") + [tokenizer.think_id]


def forced_ids(tokenizer: Tokenizer, mode: str) -> list[int]:
    """What the reply is made to begin with, after `<think>`."""
    return {
        "auto": [],
        "thinking": [tokenizer.thinking_id],
        "non-thinking": [tokenizer.direct_id, tokenizer.end_think_id],
    }[mode]


def reply_ids(tokenizer: Tokenizer, answer: str, thought: str | None) -> list[int]:
    """What follows `<think>`, to the end of the turn; `thought` None = the direct format."""
    if thought is None:
        ids = forced_ids(tokenizer, "non-thinking")
    else:
        ids = tokenizer.encode("\n" + thought.strip() + "\n") + [tokenizer.end_think_id]
    return ids + tokenizer.encode("\n\n" + answer.strip()) + [tokenizer.end_id]


def render(tokenizer, question, image_tokens, answer, thought, *, mask_empty_block: bool):
    """A training sequence: ids, and 1 where the prediction of an id carries loss.

    The prompt carries none. With `mask_empty_block` (stage 3: the language model's own reasoning
    must survive) neither does the `\\n\\n</think>` of a direct reply; in annealing it must, or the
    model never learns to choose.

    Returns:
      (ids list[int], loss float32[len(ids)]).
    """
    prompt = prompt_ids(tokenizer, question, image_tokens)
    reply = reply_ids(tokenizer, answer, thought)
    loss = np.ones(len(prompt) + len(reply), np.float32)
    loss[: len(prompt)] = 0
    if thought is None and mask_empty_block:
        loss[len(prompt) : len(prompt) + 2] = 0
    return prompt + reply, loss


def split_reply(tokenizer: Tokenizer, ids) -> Reply:
    """Take the ids after `<think>` apart; ids after the end token are ignored."""
    ids = [int(i) for i in ids]
    thinks = bool(ids) and ids[0] == tokenizer.thinking_id
    ended = tokenizer.end_id in ids
    if ended:
        ids = ids[: ids.index(tokenizer.end_id) + 1]
    closed = tokenizer.end_think_id in ids
    close = ids.index(tokenizer.end_think_id) if closed else len(ids)
    thought = tokenizer.decode(ids[:close]).strip()
    if not ended or not closed:
        return Reply(thought if thinks else None, None, thinks, len(ids))
    return Reply(thought or None, tokenizer.decode(ids[close + 1 : -1]).strip(), thinks, len(ids))
