"""The three modes, what carries loss, and how a reply is taken apart (PAPER.md section 1).

    <|im_start|>user <image>...<image>\\nQUESTION<|im_end|><|im_start|>assistant\\n<think>   the
    prompt (data/conversation.py)
        auto:         nothing more; the model's next token decides
        thinking:     \\n            then the model writes TRACE\\n</think>\\n\\nANSWER<|im_end|>
        non-thinking: \\n\\n</think>  then the model writes \\n\\nANSWER<|im_end|>

This file alone knows the strings of the modes. `\\n` and `\\n\\n` are one token each, so the mode
is one token.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from r4b_jax.data.conversation import prompt_ids
from r4b_jax.data.samples import Sample
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


class Rendered(NamedTuple):
    """A training sequence of n tokens. Each turn's reply but the last is a branch of its own."""

    tokens: np.ndarray  # int32[n]
    positions: np.ndarray  # int32[n]
    branch_ids: np.ndarray  # int32[n], 0 = what all later turns see
    predecessors: np.ndarray  # int32[n], place of the token that predicts this one
    loss: np.ndarray  # float32[n], 1 where predicting the token carries loss


def render(
    tokenizer: Tokenizer, sample: Sample, image_tokens: Sequence[int], *, mask_empty_block: bool
) -> Rendered:
    """A conversation as it is trained on: every reply after what it will be asked after.

    A later turn sees an earlier answer as the template shows it, without thought or empty block;
    so the reply that is learned, which has them, is a branch that nothing later sees:

        user 1 <think> reply 1 | answer 1 user 2 <think> reply 2 | answer 2 user 3 <think> reply 3
        0 0  0 1       1 1       0      0 0    0 2       2 2       0      0 0    0 0       0 0

    Prompts and earlier answers carry no loss, replies do; but with `mask_empty_block` (stage 3:
    the language model's own reasoning must survive) not the `\\n\\n</think>` of a direct one. In
    annealing it must carry loss, or the model never learns to choose.

    Args:
      image_tokens: how many tokens each picture takes.
    Raises:
      ValueError: the template shows a turn differently once others follow it.
    """
    turns, shown = sample.turns, np.cumsum([0, *(len(turn.images) for turn in sample.turns)])
    known: dict[str, list[int]] = {}
    prompts = [
        prompt_ids(tokenizer, turns[: k + 1], image_tokens[: shown[k + 1]], sample.system, known)
        for k in range(len(turns))
    ]
    whole, done = prompts[-1], 0
    pieces = []  # (ids, first position, branch, first predecessor, loss)
    last = 0  # place of the last token that all see
    for k, (turn, prompt) in enumerate(zip(turns, prompts)):
        if prompt[:-1] != whole[: len(prompt) - 1]:
            raise ValueError("the chat template shows a turn differently once others follow it")
        final = k == len(turns) - 1
        ids = whole[done:] if final else whole[done : len(prompt) - 1]
        pieces.append((ids, done, 0, last, np.zeros(len(ids))))
        last = sum(len(piece[0]) for piece in pieces) - 1
        done += len(ids)
        reply = reply_ids(tokenizer, turn.answer, turn.thought)
        loss = np.ones(len(reply))
        if turn.thought is None and mask_empty_block:
            loss[:2] = 0
        if not final:
            reply, loss = [tokenizer.think_id, *reply], np.append(0, loss)
        pieces.append((reply, done, 0 if final else k + 1, last, loss))
    return _joined(pieces)


def _joined(pieces) -> Rendered:
    """Pieces one after another, each with its first token's position and predecessor."""
    starts = np.cumsum([0, *(len(ids) for ids, *_ in pieces)])
    columns = []
    for start, (ids, position, branch, before, loss) in zip(starts, pieces):
        count = np.arange(len(ids))
        predecessors = start + count - 1
        predecessors[:1] = before
        columns.append((ids, position + count, np.full(len(ids), branch), predecessors, loss))
    return Rendered(
        *(np.concatenate(column).astype(np.int32) for column in list(zip(*columns))[:-1]),
        np.concatenate([column[-1] for column in columns]).astype(np.float32),
    )


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
