"""BPO from its first query to its checkpoint: the only reinforcement `for step` loop.

One step: draw queries; answer each 2g times, g thinking and g direct, from one prefill; hand the
replies to the reward workers, and meanwhile pack them behind their prompts and run the reference;
advantages over the merged group; update on clipped ratios with a KL to the annealed model.
"""

import collections
import contextlib
import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from r4b_jax.common import processes, sharding
from r4b_jax.common.checkpoint import StageCheckpoints
from r4b_jax.common.metrics import MetricWriter, Progress, StepLog, Trace, warn
from r4b_jax.config import Config
from r4b_jax.data.examples import Example, encode_prompt
from r4b_jax.data.loader import MAX_SET_ASIDE
from r4b_jax.data.mixture import queries, stream_seed
from r4b_jax.data.samples import RecordError, Sample, SetAside
from r4b_jax.data.tokenizer import Tokenizer
from r4b_jax.decoding.generate import p_think
from r4b_jax.evaluation.evaluate import evaluate, summarize, test_questions
from r4b_jax.models.layers import cast_kernels
from r4b_jax.rl.objectives import group_advantages
from r4b_jax.rl.reward_pool import Fault, RewardPool, canary
from r4b_jax.rl.rewards import Answered
from r4b_jax.rl.rollout import (
    RolloutBatch,
    Rollouts,
    collect_rollouts,
    launch_rollouts,
    pack_rollouts,
)
from r4b_jax.rl.update import make_update, reference_pass, trained_names, update
from r4b_jax.training.optimizer import bpo_optimizer
from r4b_jax.training.step import TrainState, init_state

TRACED_FROM = 3  # steps after the first one: by then all is compiled


def run_bpo(
    config: Config, reference: dict, tokenizer: Tokenizer, workdir: str, trace_steps: int = 0
) -> dict:
    """Train by BPO from the annealed parameters `reference`, or from the newest checkpoint in
    `workdir`/bpo.

    Args:
      reference: given away: its memory is the state's, or free.
      trace_steps: steps whose profile is written to `workdir`/trace.
    Returns:
      the parameters after BPO.
    """
    checkpoints = StageCheckpoints(os.path.join(workdir, "bpo"))
    names = trained_names(config.bpo)
    state = init_state(reference, bpo_optimizer(config.bpo), names)
    data = {"position": 0, "set_aside": 0}
    if checkpoints.latest is not None:
        state, data = checkpoints.restore(state)
    if int(state.step) < config.bpo.num_steps:
        # Of the reference that is kept which is computed with, if anything is; what is frozen is
        # the policy's own. The update donates what is trained, so it must not be shared.
        own = jax.tree.map(jnp.asarray, {name: state.params[name] for name in names})
        kept = {name: reference[name] for name in names if config.bpo.kl_beta}
        cast = jax.tree.map(jnp.array, cast_kernels(kept, config.model.compute_dtype))
        frozen = {name: reference[name] for name in config.bpo.frozen}
        if checkpoints.latest is not None:
            sharding.release({name: reference[name] for name in names})
        state = TrainState(state.step, frozen | own, state.opt_state)
        trace = Trace(os.path.join(workdir, "trace"), int(state.step) + TRACED_FROM, trace_steps)
        state = _train(config, state, cast | frozen, tokenizer, checkpoints, workdir, trace, data)
    checkpoints.close()
    return state.params


def _train(config, state, reference, tokenizer, checkpoints, workdir, trace, data) -> TrainState:
    """The loop itself, from state.step to bpo.num_steps."""
    bpo, first = config.bpo, int(state.step)
    writer, faults = MetricWriter(workdir, "bpo", first), FaultLog(workdir, first)
    drawn = Queries(config, tokenizer, workdir, first, **data)
    parts = make_update(config, tuple(tokenizer.never_sampled))
    questions = test_questions(config, bpo.eval_questions)
    key = jax.random.key(stream_seed(config.seed, "bpo/rollouts"))

    def launch(step: int) -> Rollouts:
        step_key = jax.random.fold_in(key, step)
        return launch_rollouts(config, state.params, tokenizer, drawn.draw(step), step_key)

    progress = Progress("bpo", bpo.num_steps, first)
    graded = bpo.rewards if processes.is_first() else {}  # the others are told
    pool = RewardPool(graded, bpo.reward_workers, bpo.reward_deadline)
    with pool, progress, contextlib.closing(writer), contextlib.closing(trace):
        canary(pool)
        if first == 0:
            _small_evaluation(config, state.params, tokenizer, questions, writer, 0)
        launched = None
        for step in range(first + 1, bpo.num_steps + 1):
            last = step == bpo.num_steps
            saves = step % config.checkpoint_every == 0 or last
            trace.step(step, state)
            clock = Clock()
            rollouts = collect_rollouts(tokenizer, launched or launch(step))
            clock.lap("rollout")
            pending = pool.submit(answered(rollouts))
            # What follows a checkpoint is not sampled ahead: a resumed run could not repeat it.
            launched = launch(step + 1) if bpo.overlap_rewards and not saves else None
            batches = [sharding.place_rows(b) for b in pack_rollouts(config, tokenizer, rollouts)]
            reference_logps = reference_pass(config, parts, reference, batches)
            rewards = processes.agree(faults.write(step, rollouts, *pending.result()))
            advantages = group_advantages(rewards)
            clock.lap("reward")
            metrics = {"skipped": float(not advantages.any())}
            if advantages.any():
                state, values = update(config, parts, state, batches, advantages, reference_logps)
                metrics |= values
            else:  # every group is degenerate: nothing to learn from
                state = dataclasses.replace(state, step=state.step + 1)
            clock.lap("update")
            metrics |= rollout_metrics(rollouts, rewards, advantages)
            metrics |= clock.metrics(rollouts, batches) | {"reward_faults": faults.count}
            metrics["set_aside"] = drawn.set_aside
            writer.write(step, metrics)
            progress.advance(reward=metrics["reward/mean"], p_think=metrics["p_think"])
            if step % bpo.eval_every == 0 or last:
                _small_evaluation(config, state.params, tokenizer, questions, writer, step)
            if saves:
                counters = {"position": drawn.position, "set_aside": drawn.set_aside}
                checkpoints.save(state, counters)
    return state


class Clock:
    """Seconds of a step's phases, and what they come to."""

    def __init__(self):
        self.last, self.seconds = time.monotonic(), {}

    def lap(self, name: str):
        """The phase `name` ends now."""
        now = time.monotonic()
        self.seconds[name], self.last = now - self.last, now

    def metrics(self, rollouts: Rollouts, batches: list[RolloutBatch]) -> dict:
        """Seconds of each phase; tokens a second, sampled and trained on (prompts included, once
        where they are shared). If the next rollouts are sampled ahead, "rollout" is what was left
        to wait for, and "update" includes them."""
        sampled = int(rollouts.generation.lengths.sum())
        trained = sum(int((b.batch.segment_ids > 0).sum()) for b in batches)
        return {f"seconds/{name}": value for name, value in self.seconds.items()} | {
            "tokens_per_second/rollout": sampled / self.seconds["rollout"],
            "tokens_per_second/update": trained / self.seconds["update"],
        }


class FaultLog:
    """Every reply that got no reward though its topic has one: `workdir`/reward_faults.jsonl."""

    def __init__(self, workdir: str, resume_step: int):
        self.log, self.count = StepLog(workdir, "reward_faults.jsonl", "bpo", resume_step), 0

    def write(
        self, step: int, rollouts: Rollouts, rewards: np.ndarray, faults: list[Fault]
    ) -> np.ndarray:
        """Write down a step's faults, and give its rewards the shape [Q, R]."""
        self.count = len(faults)
        if faults:
            warn(f"bpo, step {step}: {len(faults)} replies without reward, see {self.log.path}")
        records = []
        for fault in faults:
            query, number = divmod(fault.index, len(rollouts.modes))
            question = rollouts.questions[query]
            record = {"query": query, "rollout": number, "kind": fault.kind, "id": question.id}
            record |= {"message": fault.message, "topic": question.topic}
            record |= {"question": question.question[:2000]}
            record |= {"answer": rollouts.replies[query][number].answer[:2000]}
            records.append(record)
        self.log.write(step, records)
        return rewards.reshape(len(rollouts.questions), len(rollouts.modes))


class Queries:
    """The queries of the steps, one after another.

    Attributes:
      position: how many samples of the stream were looked at.
      set_aside: how many of them could not be asked; they stand in `workdir`/set_aside.jsonl.
    """

    def __init__(self, config: Config, tokenizer, workdir, resume_step, position, set_aside):
        self.config, self.tokenizer = config, tokenizer
        bpo = config.bpo
        args = (bpo.sources, bpo.topics, "bpo", workdir)
        self.stream, bad = queries(config, *args, endless=True)
        self.log = StepLog(workdir, "set_aside.jsonl", "bpo", resume_step)
        self.position, self.set_aside = position, set_aside
        if resume_step == 0:
            self._tell(0, bad)

    def draw(self, step: int) -> list[tuple[Sample, Example]]:
        """The queries of a step with their prompts; those set aside are replaced by the next.

        Raises:
          RecordError: hardly any sample can be asked.
        """
        found, aside = [], []
        while len(found) < self.config.bpo.num_queries:
            sample = self.stream[self.position]
            self.position += 1
            query = self._encoded(sample)
            if not isinstance(query, SetAside):
                found.append(query)
                continue
            aside.append(query)
            if len(aside) == MAX_SET_ASIDE:
                raise RecordError(
                    f"bpo, step {step}: {len(aside)} samples in a row cannot be asked, the last "
                    f"one because: {query.id}: {query.reason}"
                )
        self._tell(step, aside)
        return found

    def _tell(self, step: int, aside: list[SetAside]):
        self.set_aside += len(aside)
        if processes.is_first():  # all processes draw the same
            self.log.write(step, [dataclasses.asdict(one) for one in aside])

    def _encoded(self, sample: Sample | SetAside) -> tuple[Sample, Example] | SetAside:
        if isinstance(sample, SetAside):
            return sample
        bpo, longest = self.config.bpo, self.config.generate.prompt_len
        try:
            prompt = encode_prompt(self.tokenizer, self.config.model.vision, sample)
        except ValueError as error:  # a RecordError, or what the chat template refuses
            return SetAside(sample.id, str(error))
        if len(prompt.tokens) <= longest and prompt.num_tiles <= bpo.packed_tiles:
            return sample, prompt
        return SetAside(
            sample.id,
            f"the prompt takes {len(prompt.tokens)} tokens and {prompt.num_tiles} tiles, beyond "
            f"generate.prompt_len = {longest} or bpo.packed_tiles = {bpo.packed_tiles}",
        )


def answered(rollouts: Rollouts) -> list[Answered]:
    """Every reply as its reward sees it, query by query."""
    return [
        Answered(question.topic, question.question, question.answer, reply.answer, reply.thought)
        for question, replies in zip(rollouts.questions, rollouts.replies, strict=True)
        for reply in replies
    ]


def rollout_metrics(rollouts: Rollouts, rewards: np.ndarray, advantages: np.ndarray) -> dict:
    """Reward and length by mode, think rate, degenerate and unrewarded groups, and how full the
    decoder's slots were."""
    by_mode = collections.defaultdict(list)
    for q, replies in enumerate(rollouts.replies):
        for r, reply in enumerate(replies):
            by_mode["thinking" if reply.thinks else "non-thinking"].append(
                (rewards[q, r], reply.num_tokens, reply.answer is None)
            )
    known = ~np.isnan(rewards)
    metrics = {
        "reward/mean": float(rewards[known].mean()) if known.any() else 0.0,
        "p_think": float(np.mean(p_think(rollouts.generation.mode_logps))),
        "think_rate": len(by_mode["thinking"]) / rewards.size,
        "degenerate_groups": float(np.mean(~np.any(advantages != 0, 1))),
        "unrewarded": float(np.mean(~known)),
        "occupancy": float(rollouts.generation.occupancy),
        "decode_steps": float(rollouts.generation.steps),
    }
    for mode, rows in by_mode.items():
        if rows:
            values, lengths, cut_off = np.array(rows, np.float64).T
            if not np.isnan(values).all():
                metrics[f"reward/{mode}"] = float(np.nanmean(values))
            metrics[f"length/{mode}"] = float(lengths.mean())
            metrics[f"cut_off/{mode}"] = float(cut_off.mean())
    return metrics


def _small_evaluation(config, params, tokenizer, questions, writer, step):
    """Think rate and accuracy of each topic in auto mode, for figures 8 and 9; none without
    questions."""
    if not questions:
        return
    records = evaluate(config, params, tokenizer, questions, ("auto",), title="bpo evaluation")
    values = {}
    for topic, modes in summarize(records).items():
        for name in ("accuracy", "think_rate", "p_think", "tokens"):
            values[f"eval/{topic}/{name}"] = modes["auto"][name]
    writer.write(step, values)
