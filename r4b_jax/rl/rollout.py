"""Rollouts of both modes, and the packed rows BPO trains on.

A row is [prefix][branch 1][branch 2]...: the prompt stands once before the rollouts that share it;
a rollout sees the prompt and itself. A group that does not fit goes on in the next row behind a
copy of its prompt.

    tokens   <prompt> <think> | \\n 3+4=7 </think> \\n\\n 7 <end> | \\n\\n </think> \\n\\n 9 <end>
    branch   0        0       | 1  1 1 1 1 1        1    1 1     | 2    2        2    2 2
    weight   0        0       | m  w w w w w        w    w w     | m    0        w    w w

w = 1 / (number of such tokens in the rollout), m = the mode token's own weight. The mode token
and the `</think>` of a direct reply were forced, not sampled; vanilla GRPO forces nothing, so there
the mode token is a token like the others.
"""

import dataclasses

import jax
import numpy as np

from r4b_jax.common import processes, sharding
from r4b_jax.common.arrays import Array, Batch
from r4b_jax.config import BPOConfig, Config
from r4b_jax.data import dialogue
from r4b_jax.data.examples import Example, empty_batch, place
from r4b_jax.data.samples import Sample
from r4b_jax.data.tokenizer import Tokenizer
from r4b_jax.decoding.generate import Generation, Ids, for_generation, forced_array, generate
from r4b_jax.decoding.prompts import pad_prompts
from r4b_jax.decoding.sampling import Sampling
from r4b_jax.models.layers import in_int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Packed rollouts. `batch.loss_weights` holds w and m above."""

    batch: Batch
    rollout: Array  # int32[B, T], q * R + r: which of the step's rollouts a token belongs to
    sampler_logps: Array  # float32[B, T], as `generate` gave them
    is_mode: Array  # bool[B, T], the token after <think> where the mode was forced
    thinks: Array  # bool[B, T], of a rollout that thinks


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """R replies to each of Q questions."""

    questions: list[Sample]
    prompts: list[Example]
    modes: list[str]  # of the R columns, as forced
    generation: Generation  # numpy, once collected
    replies: list[list[dialogue.Reply]]  # [Q][R], once collected


def rollout_modes(bpo: BPOConfig) -> list[str]:
    """The modes of a query's rollouts: g thinking and g direct, or for GRPO 2g free ones."""
    if bpo.algorithm == "grpo":
        return ["auto"] * (2 * bpo.g)
    return ["thinking"] * bpo.g + ["non-thinking"] * bpo.g


def launch_rollouts(
    config: Config,
    params: dict,
    tokenizer: Tokenizer,
    queries: list[tuple[Sample, Example]],
    key: Array,
) -> Rollouts:
    """Begin to answer each question 2g times with `params`; returns while the device computes.

    Args:
      queries: each question with its prompt.
    The replies are not there yet: `collect_rollouts` waits for them.
    """
    modes, sizes = rollout_modes(config.bpo), config.generate
    questions, prompts = ([query[i] for query in queries] for i in range(2))
    patches = config.model.vision.num_patches
    work = (
        pad_prompts(prompts, sizes.prompt_len, tokenizer.pad_id, patches),
        forced_array([dialogue.forced_ids(tokenizer, m) for m in modes], len(questions)),
        jax.random.split(key, (len(questions), len(modes))),
    )
    with sharding.for_rollouts(sizes.tensor):
        params = for_generation(config.model, params)
        if config.bpo.int8_rollouts:
            params = in_int8(params)
        generation = generate(
            config.model,
            params,
            *sharding.place_rows(work),
            Ids.of(tokenizer),
            max_new_tokens=sizes.max_new_tokens,
            sampling=Sampling.of(
                config.bpo.temperature, max_direct_tokens=sizes.max_direct_tokens or None
            ),
            queries_at_once=sizes.queries_at_once,
            rollouts_at_once=sizes.rollouts_at_once,
        )
    return Rollouts(questions, prompts, modes, generation, [])


def collect_rollouts(tokenizer: Tokenizer, launched: Rollouts) -> Rollouts:
    """Wait for launched rollouts and take the replies apart."""
    generation = processes.fetch(launched.generation)
    replies = [
        [
            dialogue.split_reply(tokenizer, tokens[:length])
            for tokens, length in zip(*of_query, strict=True)
        ]
        for of_query in zip(generation.tokens, generation.lengths, strict=True)
    ]
    return dataclasses.replace(launched, generation=generation, replies=replies)


def token_weights(bpo: BPOConfig, mode: str, length: int, num_forced: int) -> np.ndarray:
    """The loss weights float32[length] of one rollout's tokens, w and m of the drawing above."""
    weights = np.zeros(length, np.float32)
    if mode == "auto":
        weights[:] = 1 / length
        return weights
    weights[num_forced:] = 1 / max(length - num_forced, 1)
    weights[0] = 0.0 if bpo.mode_tokens == "mask" else bpo.mode_weight
    return weights


def pack_rollouts(config: Config, tokenizer: Tokenizer, rollouts: Rollouts) -> list[RolloutBatch]:
    """Micro-batches, of `bpo.micro_rows` rows for each device, that hold every rollout once.

    Raises:
      ValueError: a prompt with one rollout does not fit a row of `bpo.packed_len`.
    """
    packer = _RolloutPacker(config, tokenizer.pad_id)
    for q, prompt in enumerate(rollouts.prompts):
        packer.open_segment(prompt, rollouts.generation.lengths[q, 0])
        for r, mode in enumerate(rollouts.modes):
            length = int(rollouts.generation.lengths[q, r])
            num_forced = len(dialogue.forced_ids(tokenizer, mode))
            packer.add_branch(
                prompt,
                rollouts.generation.tokens[q, r, :length],
                rollouts.generation.logps[q, r, :length],
                token_weights(config.bpo, mode, length, num_forced),
                number=q * len(rollouts.modes) + r,
                forced=num_forced > 0,
                thinks=rollouts.replies[q][r].thinks,
            )
    return packer.batches


class _RolloutPacker:
    """Fills rows from left to right, the prompt before each row's first branch of a query."""

    def __init__(self, config: Config, pad_id: int):
        self.config, self.pad_id = config, pad_id
        self.batches: list[RolloutBatch] = []
        self.rows = config.bpo.micro_rows * sharding.row_shards(sharding.current())
        self.row = self.rows  # none open yet

    def open_segment(self, prompt: Example, first_len: int):
        """Start a query: its prompt, where a branch of `first_len` tokens still has room."""
        need, bpo = len(prompt.tokens) + first_len, self.config.bpo
        if need > bpo.packed_len:
            raise ValueError(f"a prompt and a reply of {need} tokens exceed bpo.packed_len")
        full = self.row < self.rows and (
            self.used + need > bpo.packed_len or self.tiles + len(prompt.tiles) > bpo.packed_tiles
        )
        if full:
            self.row += 1
        if full or self.row == self.rows:
            self._open_row()
        out, patches = self.batches[-1].batch, self.config.model.vision.num_patches
        self.segment, self.branch, self.prefix_end = (
            self.segment + 1,
            0,
            self.used + len(prompt.tokens) - 1,
        )
        place(out, self.row, self.used, self.tiles, self.segment, prompt, patches)
        self.used += len(prompt.tokens)
        self.tiles += len(prompt.tiles)

    def add_branch(
        self, prompt: Example, tokens, logps, weights, *, number: int, forced: bool, thinks: bool
    ):
        """One rollout behind the open prompt; if there is no room, behind a copy in a new row."""
        if self.used + len(tokens) > self.config.bpo.packed_len:
            self.used = self.config.bpo.packed_len
            self.open_segment(prompt, len(tokens))
        self.branch += 1
        out, row = self.batches[-1], self.row
        span = slice(self.used, self.used + len(tokens))
        prompt_len = len(prompt.tokens)
        out.batch.tokens[row, span] = tokens
        out.batch.positions[row, span] = prompt_len + np.arange(len(tokens))
        out.batch.segment_ids[row, span] = self.segment
        out.batch.branch_ids[row, span] = self.branch
        out.batch.predecessors[row, span] = np.arange(self.used - 1, span.stop - 1)
        out.batch.predecessors[row, self.used] = self.prefix_end
        out.batch.loss_weights[row, span] = weights
        out.rollout[row, span] = number
        out.sampler_logps[row, span] = logps
        out.is_mode[row, self.used] = forced
        out.thinks[row, span] = thinks
        self.used = span.stop

    def _open_row(self):
        self.used, self.tiles, self.segment = 0, 0, 0
        bpo = self.config.bpo
        if self.row == self.rows:
            self.row, shape = 0, (self.rows, bpo.packed_len)
            batch = empty_batch(*shape, bpo.packed_tiles, self.config.model.vision, self.pad_id)
            self.batches.append(
                RolloutBatch(
                    batch,
                    rollout=np.zeros(shape, np.int32),
                    sampler_logps=np.zeros(shape, np.float32),
                    is_mode=np.zeros(shape, bool),
                    thinks=np.zeros(shape, bool),
                )
            )
