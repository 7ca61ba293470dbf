"""A model one can talk to: `load` it, then `chat` or `stream`, alone or over several turns."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator

import jax
import numpy as np

from r4b_jax.common import checkpoint
from r4b_jax.common.metrics import warn
from r4b_jax.config import Config, ModelConfig, from_config_dict
from r4b_jax.data import dialogue
from r4b_jax.data.examples import Example, encode_prompt
from r4b_jax.data.samples import PLACE, Sample, Turn
from r4b_jax.data.tokenizer import Tokenizer
from r4b_jax.decoding.generate import Ids, advance, forced_array, p_think, start
from r4b_jax.decoding.prompts import pad_prompts
from r4b_jax.decoding.sampling import Sampling
from r4b_jax.models import released
from r4b_jax.models.convert import CheckpointError

MODE_NAMES = {mode: mode for mode in dialogue.MODES} | {"long": "thinking", "short": "non-thinking"}
STEPS = 8  # tokens between two looks at what has come
GENERATION, BIAS = "generation_config.json", "think_bias"  # where a calibrated bias is kept


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer. `answer` is None if the reply was cut off before it; `thought` None = direct."""

    answer: str | None
    thought: str | None
    mode: str  # the mode it was answered in: "thinking" or "non-thinking"
    p_think: float  # P(thinking) against P(direct) after <think>, before any bias
    num_tokens: int  # after <think>, the end token included


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a reply as it comes; the last has the whole `reply` and no text."""

    text: str
    is_thought: bool
    reply: Reply | None = None


class Model:
    """Weights and tokenizer. Made by `load`."""

    def __init__(
        self,
        config: ModelConfig,
        params: dict,
        tokenizer: Tokenizer,
        limit: int,
        think_bias: float = 0.0,
    ):
        self.config, self.params, self.tokenizer, self.limit = config, params, tokenizer, limit
        self.think_bias = think_bias  # where none is asked for
        self.ids = Ids.of(tokenizer)

    def chat(self, question: str, images=(), mode: str = "auto", **settings) -> Reply:
        """One answer. `settings` and errors as of `stream`."""
        *_, last = self.stream(question, images, mode, **settings)
        return last.reply

    def stream(
        self,
        question: str,
        images=(),
        mode: str = "auto",
        *,
        history: list[tuple[str, list, str]] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 1024,
        max_think_tokens: int | None = None,
        think_bias: float | None = None,
        seed: int = 0,
    ) -> Iterator[Piece]:
        """An answer, piece by piece as it is made.

        Args:
          images: paths, bytes, arrays uint8[h, w, 3] or PIL images, in the order they are shown.
          mode: "auto", "thinking" or "long", "non-thinking" or "short".
          history: earlier turns, oldest first: (question, images, answer).
          temperature: 0 = greedy.
          max_think_tokens: a thought still open after so many tokens is closed, and answered.
          think_bias: added to the logit of thinking where the mode is decided; inf and -inf are the
            two forced modes; None = the one that the checkpoint was calibrated to, else 0.
          seed: of the samples, at a temperature above 0.
        Raises:
          ValueError: an unknown mode, a setting out of range, a prompt longer than the context.
          ImageError: a picture that cannot be read.
        """
        think_bias = self.think_bias if think_bias is None else think_bias
        forced = self._forced(mode, think_bias)
        bias = think_bias if math.isfinite(think_bias) else 0.0
        sampling = Sampling.of(temperature, top_p, top_k, bias, max_think_tokens)
        if max_new_tokens < 3:
            raise ValueError("max_new_tokens is at least 3: the direct mode itself takes two")
        prompt = self.prompt([*history, (question, list(images), None)])
        room = self.limit - len(prompt.tokens)
        if room < 3:
            raise ValueError(
                f"the prompt has {len(prompt.tokens)} tokens and the context {self.limit}: "
                "use fewer or smaller pictures, a shorter question, or a new conversation"
            )
        wanted = min(max_new_tokens, room)
        bucket = min(max_new_tokens, -(-wanted // 256) * 256)  # a shape that many prompts share
        return self._decode(prompt, forced, sampling, wanted, bucket, seed)

    def prompt(self, turns: list[tuple[str, list, str | None]]) -> Example:
        """(question, pictures, answer) turn by turn -> the prompt up to `<think>`."""
        made = tuple(
            Turn(question.replace(PLACE, ""), tuple(pictures), answer or "")
            for question, pictures, answer in turns
        )
        return encode_prompt(self.tokenizer, self.config.vision, Sample("chat", made))

    def _forced(self, mode: str, think_bias: float) -> list[int]:
        if mode not in MODE_NAMES:
            raise ValueError(f"mode is one of {', '.join(MODE_NAMES)}, not {mode!r}")
        mode = MODE_NAMES[mode]
        if mode == "auto" and math.isinf(think_bias):
            mode = "thinking" if think_bias > 0 else "non-thinking"
        return dialogue.forced_ids(self.tokenizer, mode)

    def _decode(self, prompt, forced, sampling, wanted, bucket, seed) -> Iterator[Piece]:
        work, state = start(
            self.config,
            self.params,
            self._padded(prompt),
            forced_array([forced], 1),
            jax.random.split(jax.random.key(seed), (1, 1)),
            self.ids,
            max_new_tokens=bucket,
        )
        thinking = float(p_think(np.asarray(state.mode_logps[0], np.float64)))
        shown = {True: "", False: ""}
        ids = np.zeros(0, np.int32)
        while True:
            steps = min(STEPS, wanted - len(ids))
            state, out = advance(self.config, self.params, self.ids, sampling, work, state, steps)
            ids = np.asarray(out.tokens[0, 0, : int(out.lengths[0, 0])])
            done = self.ids.end in ids or len(ids) == wanted
            for is_thought, text in self._parts(ids, done):
                new = text[len(shown[is_thought]) :]
                if new:
                    shown[is_thought] = text
                    yield Piece(new, is_thought)
            if done:
                reply = dialogue.split_reply(self.tokenizer, ids)
                mode = "thinking" if reply.thinks else "non-thinking"
                whole = Reply(reply.answer, reply.thought, mode, thinking, reply.num_tokens)
                yield Piece("", False, whole)
                return

    def _parts(self, ids: np.ndarray, done: bool) -> list[tuple[bool, str]]:
        """(is it the thought, text so far) of what can be shown of a reply."""
        ids, close = ids.tolist(), self.tokenizer.end_think_id
        cut = ids.index(close) if close in ids else len(ids)
        answer = [i for i in ids[cut + 1 :] if i != self.tokenizer.end_id]
        parts = []
        for is_thought, some, ended in ((True, ids[:cut], cut < len(ids)), (False, answer, done)):
            text = self.tokenizer.decode(some).lstrip()
            if not (ended or done):  # a character may still lack bytes, a last newline its reason
                text = text.rstrip("\ufffd").rstrip()
            parts.append((is_thought, text.rstrip() if ended else text))
        return parts

    def _padded(self, prompt: Example):
        """The prompt in a shape that many share, so that few are compiled."""
        length = len(prompt.tokens)
        step = max(64, 2 ** (length.bit_length() - 3))
        return pad_prompts(
            [prompt],
            -(-length // step) * step,
            self.ids.pad,
            self.config.vision.num_patches,
        )


def load(path: str | os.PathLike, dtype: str | None = None) -> Model:
    """A model from a Hugging Face folder, a converted checkpoint, or a stage of a run.

    Args:
      path: a folder with config.json and safetensors; one that `python -m r4b_jax.convert import`
        wrote; or a stage's folder of a work folder, such as runs/tiny-seed0/bpo.
      dtype: of the computation; by default that of the weights.
    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be used; the message says why.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        raise CheckpointError(f"there is no folder {path}")
    if os.path.exists(os.path.join(path, checkpoint.MODEL_FILE)):
        talks = talk(os.path.join(path, checkpoint.ORIGINALS))
        config, params = checkpoint.restore_model(path)
    elif is_stage(path):
        return _load_stage(path, dtype)
    else:
        folder = released.read_folder(path)
        config, parts = released.describe([folder])
        talks = talk(path)
        params, _ = released.load_params([folder], config, parts)
    return Model(_with_dtype(config, params, dtype), params, *talks, calibrated_bias(path))


def is_stage(path: str) -> bool:
    """Whether a folder is that of a stage: no model of its own, and a run's tokenizer above it."""
    own = os.path.exists(os.path.join(path, "config.json"))
    return not own and os.path.exists(os.path.join(path, "..", "tokenizer.json"))


def bias_file(path: str) -> str:
    """Where `python -m r4b_jax.calibrate` keeps a checkpoint's bias: in its generation config; for
    a stage, in a file beside its folder."""
    if os.path.exists(os.path.join(path, checkpoint.MODEL_FILE)):
        return os.path.join(path, checkpoint.ORIGINALS, GENERATION)
    if is_stage(path):
        return f"{os.path.normpath(path)}.{GENERATION}"
    return os.path.join(path, GENERATION)


def calibrated_bias(path: str, step: int | None = None) -> float:
    """The bias of a checkpoint; 0 if it was not calibrated, or (of a stage) at another step."""
    file = bias_file(path)
    settings = released.read_json(*os.path.split(file)) or {}
    bias = settings.get(BIAS, 0.0)
    if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not math.isfinite(bias):
        raise CheckpointError(f"{file}: {BIAS} is a finite number, not {bias!r}")
    if step is not None and BIAS in settings and settings.get("step") != step:
        warn(f"{file} is of step {settings.get('step')} and not of {step}: not used")
        return 0.0
    return float(bias)


def _with_dtype(config: ModelConfig, params: dict, dtype: str | None) -> ModelConfig:
    own = str(jax.tree.leaves(params)[0].dtype)
    return dataclasses.replace(config, compute_dtype=dtype or own, remat="matmuls")


def run_of(stage: str) -> Config:
    """The settings of the run that a stage's folder belongs to."""
    with open(os.path.join(stage, "..", "config.json"), encoding="utf-8") as f:
        return from_config_dict(Config, json.load(f))


def _load_stage(path: str, dtype: str | None) -> Model:
    """From the newest checkpoint of a stage; settings and tokenizer lie in the work folder."""
    work, config = os.path.join(path, ".."), run_of(path)
    if config.init_from:
        tokenizer, limit = talk(os.path.join(config.init_from, checkpoint.ORIGINALS))
    else:
        tokenizer = Tokenizer(released.read_text(work, "tokenizer.json"))
        limit = config.generate.prompt_len + config.generate.max_new_tokens
    stage = checkpoint.StageCheckpoints(path)
    if stage.latest is None:
        raise CheckpointError(f"{path} holds no checkpoint")
    model = dataclasses.replace(config.model, compute_dtype=dtype or config.model.compute_dtype)
    bias = calibrated_bias(path, stage.latest)
    return Model(model, jax.device_put(stage.restore_params()), tokenizer, limit, bias)


def talk(folder: str) -> tuple[Tokenizer, int]:
    """Tokenizer with the chat template, and context length, of a Hugging Face folder."""
    config = released.read_json(folder, "config.json")
    text = released.read_text(folder, "tokenizer.json")
    if text is None:
        raise CheckpointError(f"{folder} has no tokenizer.json")
    image_id = config.get("image_token_index", config.get("image_token_id"))
    try:
        tokenizer = Tokenizer(text, image_id, released.template_of(folder))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    limit = config.get("text_config", {}).get("max_position_embeddings", 32768)
    return tokenizer, limit
