"""Text to ids and back, with control tokens kept apart from text.

`Tokenizer` wraps a `tokenizers` tokenizer (Qwen3's own file, or the small one trained here). Text
a person wrote goes through a copy that knows no control tokens, so `<think>` in a question is text
and can never become the control token (FAULTS: bad records). Control tokens are reached by name
only.
"""

import json
import os
import re

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

IMAGE, PAD = "<image>", "<|endoftext|>"
CONTROL = (PAD, "<|im_start|>", "<|im_end|>", "<think>", "</think>", IMAGE)
NEEDED = CONTROL[:-1]  # of any tokenizer; the picture's token may have another name

# Qwen3's own split: digits one by one, newline runs on their own, words with their leading space.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Encodes text without control tokens; gives the ids of control tokens by name.

    Args:
      text: the JSON of a `tokenizers` tokenizer (the content of tokenizer.json).
      image_id: the id that stands for a picture's features; None = that of `<image>`.
      template: the checkpoint's chat template; None = data/conversation.py's own.
    Raises:
      ValueError: a control token is missing, or a newline pair is not a single token (the mode is
        decided by one token, PAPER.md section 1).
    """

    def __init__(self, text: str, image_id: int | None = None, template: str | None = None):
        spec = json.loads(text)
        self._added = {t["content"]: t["id"] for t in spec["added_tokens"]}
        missing = [name for name in NEEDED if name not in self._added]
        if image_id is None:
            image_id = self._added.get(IMAGE)
        if image_id not in self._added.values():
            missing.append(IMAGE)
        if missing:
            raise ValueError(f"the tokenizer lacks the control tokens {missing}")
        self._full = tokenizers.Tokenizer.from_str(text)
        self._text = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
        self.json, self.template = text, template
        self.pad_id, self.image_id = self.control(PAD), image_id
        self.image_name = next(n for n, i in self._added.items() if i == image_id)
        self.end_id = self.control("<|im_end|>")
        self.think_id, self.end_think_id = self.control("<think>"), self.control("</think>")
        self.thinking_id, self.direct_id = self._single("\n"), self._single("\n\n")

    @property
    def vocab_size(self) -> int:
        return self._full.get_vocab_size(with_added_tokens=True)

    @property
    def never_sampled(self) -> list[int]:
        """Ids a model may not produce: control tokens but the end of a thought and of a turn."""
        return [i for name, i in self._added.items() if name not in ("</think>", "<|im_end|>")]

    def control(self, name: str) -> int:
        """The id of a control token."""
        return self._added[name]

    def split_control(self, text: str) -> list[str | int]:
        """Text of a template -> runs of plain text, and the ids of control tokens between them."""
        names = sorted(self._added, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        return [self._added.get(part, part) for part in parts if part]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing in it becomes a control token."""
        return self._text.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        """Text of ids, control tokens spelled out."""
        return self._full.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: str):
        with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as f:
            f.write(self.json)

    def _single(self, text: str) -> int:
        ids = self.encode(text)
        if len(ids) != 1:
            raise ValueError(f"{text!r} must be one token of the tokenizer, it is {len(ids)}")
        return ids[0]


def train_tokenizer(texts, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with Qwen3's split and control tokens, trained on `texts`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n\n"] * 1000 + list(texts), trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in CONTROL])
    return Tokenizer(tokenizer.to_str())
