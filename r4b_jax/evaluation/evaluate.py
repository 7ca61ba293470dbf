"""Accuracy, think rate and tokens of each topic in each mode, from one prefill a question."""

import dataclasses
import json
import os

import jax
import numpy as np

from r4b_jax.common import processes, sharding
from r4b_jax.common.metrics import Progress
from r4b_jax.config import Config
from r4b_jax.data import dialogue
from r4b_jax.data.examples import encode_prompt
from r4b_jax.data.mixture import stream_seed
from r4b_jax.data.samples import Sample
from r4b_jax.data.tokenizer import Tokenizer
from r4b_jax.data.worlds import TOPICS, World
from r4b_jax.decoding.generate import Ids, for_generation, forced_array, generate, p_think
from r4b_jax.decoding.prompts import pad_prompts
from r4b_jax.decoding.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Record:
    """One question answered in one mode."""

    question: Sample
    mode: str
    reply: dialogue.Reply
    correct: bool
    p_think: float  # P(thinking token) against the direct token, after <think>
    mode_logps: tuple[float, float]  # log P of the thinking token, of the direct token
    close_logp: float | None  # log P(</think>) after a direct token that was forced
    think_bias: float


def test_questions(config: Config, count: int) -> list[Sample]:
    """`count` test questions of each topic, a function of the seed alone."""
    world, questions = World(config.world, "test"), []
    for topic in TOPICS:
        seed = stream_seed(config.seed, f"test/{topic}")
        questions += [world.question(topic, np.random.default_rng((seed, i))) for i in range(count)]
    return questions


def evaluate(
    config: Config,
    params: dict,
    tokenizer: Tokenizer,
    questions: list[Sample],
    modes=dialogue.MODES,
    title: str = "evaluate",
    think_bias: float = 0.0,
) -> list[Record]:
    """Answer every question in every mode, greedily; a reply that was cut off counts as wrong.

    Args:
      think_bias: of auto mode, finite. All others follow from one run: evaluation/knob.py.
    """
    with sharding.for_rollouts(config.generate.tensor):
        return _evaluate(config, params, tokenizer, questions, modes, title, think_bias)


def _evaluate(config, params, tokenizer, questions, modes, title, think_bias) -> list[Record]:
    """`evaluate`, on the mesh of generation."""
    generation, params = config.generate, for_generation(config.model, params)
    shards = sharding.row_shards(sharding.current())  # each answers the same number of questions
    size = -(-min(generation.batch_size, len(questions)) // shards) * shards
    ids, records = Ids.of(tokenizer), []
    forced = forced_array([dialogue.forced_ids(tokenizer, m) for m in modes], size)
    keys = jax.random.split(jax.random.key(0), (size, len(modes)))  # greedy: never read
    limit = generation.max_direct_tokens or None
    sampling = Sampling.of(think_bias=think_bias, max_direct_tokens=limit)
    with Progress(title, len(questions)) as progress:
        for start in range(0, len(questions), size):
            batch = questions[start : start + size]
            full = batch + [batch[-1]] * (size - len(batch))  # one shape, one compilation
            prompts = [encode_prompt(tokenizer, config.model.vision, q) for q in full]
            patches = config.model.vision.num_patches
            padded = pad_prompts(prompts, generation.prompt_len, tokenizer.pad_id, patches)
            out = generate(
                config.model,
                params,
                *sharding.place_rows((padded, forced, keys)),
                ids,
                max_new_tokens=generation.max_new_tokens,
                sampling=sampling,
                queries_at_once=generation.queries_at_once,
                rollouts_at_once=generation.rollouts_at_once,
            )
            out = processes.fetch(out)
            thinking = p_think(out.mode_logps)
            for i, question in enumerate(batch):
                for m, mode in enumerate(modes):
                    reply = dialogue.split_reply(tokenizer, out.tokens[i, m, : out.lengths[i, m]])
                    close = float(out.logps[i, m, 1]) if mode == "non-thinking" else None
                    records.append(
                        Record(
                            question,
                            mode,
                            reply,
                            correct=reply.answer == question.answer,
                            p_think=float(thinking[i]),
                            mode_logps=tuple(out.mode_logps[i].tolist()),
                            close_logp=close,
                            think_bias=think_bias,
                        )
                    )
            progress.advance(len(batch))
    return records


def summarize(records: list[Record]) -> dict:
    """{topic: {mode: {"accuracy", "think_rate", "tokens", "count", "p_think", "cut_off"}}}, as
    fractions."""
    table: dict = {}
    for record in records:
        row = table.setdefault(record.question.topic, {}).setdefault(record.mode, [])
        row.append(record)
    return {
        topic: {mode: _summary(rows) for mode, rows in modes.items()}
        for topic, modes in table.items()
    }


def _summary(rows: list[Record]) -> dict:
    return {
        "accuracy": float(np.mean([r.correct for r in rows])),
        "think_rate": float(np.mean([r.reply.thinks for r in rows])),
        "tokens": float(np.mean([r.reply.num_tokens for r in rows])),
        "count": len(rows),
        "p_think": float(np.mean([r.p_think for r in rows])),
        "cut_off": float(np.mean([r.reply.answer is None for r in rows])),
    }


def evaluate_once(config: Config, params: dict, tokenizer: Tokenizer, workdir: str, when: str):
    """The full evaluation, unless it is there already or `config.eval_questions` is 0:
    `workdir`/evaluation/<when>.json, and its records as <when>.jsonl."""
    folder = os.path.join(workdir, "evaluation")
    summary_path = os.path.join(folder, f"{when}.json")
    if os.path.exists(summary_path) or not config.eval_questions:
        return
    questions = test_questions(config, config.eval_questions)
    records = evaluate(config, params, tokenizer, questions, title=f"evaluate {when}")
    if not processes.is_first():
        return
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f"{when}.jsonl"), "w", encoding="utf-8") as f:
        f.writelines(json.dumps(_as_json(record)) + "\n" for record in records)
    with open(summary_path + ".part", "w", encoding="utf-8") as f:
        json.dump(summarize(records), f, indent=1)
    os.replace(summary_path + ".part", summary_path)  # there only when whole


def read_records(workdir: str, when: str) -> list[dict]:
    """The records `evaluate_once` wrote, or none."""
    path = os.path.join(workdir, "evaluation", f"{when}.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def _as_json(record: Record) -> dict:
    return {
        "topic": record.question.topic,
        "mode": record.mode,
        "question": record.question.question,
        "reference": record.question.answer,
        "thought": record.reply.thought,
        "answer": record.reply.answer,
        "correct": record.correct,
        "tokens": record.reply.num_tokens,
        "p_think": record.p_think,
        "thinks": record.reply.thinks,
        "mode_logps": record.mode_logps,
        "close_logp": record.close_logp,
        "think_bias": record.think_bias,
    }
