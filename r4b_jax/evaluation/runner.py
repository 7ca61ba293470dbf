"""The benchmarks' run: every query in every mode from one prefill, greedily; scores; the report.

    evaluate(model, tables, settings, out, ...)     tables: {name of a benchmark: its Table}

A benchmark's queries are sorted by the shape of their prompts, longest first, and cut into batches
of one size: few programs are compiled, and what does not fit into memory fails at once. A batch is
a function of the table and of `generate.batch_size` alone, so a run that was killed does its
unfinished batches again and writes what is missing: no gap, no repeat, the same file.

One rule for replies that were cut off: without an end token there is no answer. The prediction is
"" then, which is scored as VLMEvalKit scores an empty one, and counted as truncated; neither a
thought nor half an answer is ever scored.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from r4b_jax.common import sharding
from r4b_jax.common.arrays import Array
from r4b_jax.common.metrics import Progress
from r4b_jax.config import ConfigError, GenerateConfig
from r4b_jax.data import dialogue, images
from r4b_jax.data.conversation import prompt_ids
from r4b_jax.data.examples import Example, encode_prompt
from r4b_jax.data.samples import PLACE, Sample, Turn
from r4b_jax.decoding.chat import Model
from r4b_jax.decoding.generate import Ids, for_generation, forced_array, generate, p_think
from r4b_jax.decoding.prompts import TILE_BUCKETS, pad_prompts
from r4b_jax.decoding.sampling import Sampling
from r4b_jax.evaluation import benchmark_report as report
from r4b_jax.evaluation import judge as judging
from r4b_jax.evaluation import scores, tables
from r4b_jax.evaluation.benchmarks import BENCHMARKS, Benchmark
from r4b_jax.evaluation.prompts import Prompt
from r4b_jax.evaluation.records import Folder
from r4b_jax.evaluation.scores import Job

SHORTEST = 64  # tokens a prompt is padded to at the least
REPORT_SECONDS = 60  # between two reports of one run
MEMORY_SHARE = 0.6  # of what the parameters leave, for keys and values


@dataclasses.dataclass(frozen=True)
class Settings:
    """How queries are answered."""

    modes: tuple[str, ...] = dialogue.MODES
    think_bias: float = 0.0  # of auto mode, finite
    limit: int = 0  # queries of each benchmark, its first; 0 = all
    # `batch_size` queries are given to the devices at once; of them so many are at work as fit,
    # at most `queries_at_once`.
    generate: GenerateConfig = GenerateConfig(
        prompt_len=16384, max_new_tokens=8192, batch_size=64, queries_at_once=64
    )


def evaluate(
    model: Model,
    loaded: dict[str, tables.Table],
    settings: Settings,
    out: str,
    *,
    profile: str = "aug2025",
    judge: judging.Judge | None = None,
    name: str = "r4b",
    any_file: bool = False,
) -> dict:
    """Answer what is not answered yet, score, and write the report, also between benchmarks: a run
    that was killed leaves one of those before. Returns the content of report.json.

    Args:
      loaded: the table of each benchmark, in the order of the run.
      judge: None = rules alone.
      name: of the model, in the report and in prediction files.
      any_file: whether tables may be of any md5: the report says so.
    Raises:
      ConfigError: another process writes to `out`, it holds records of other settings, or a table
        cannot be asked.
    """
    tables.prediction_path(out, name, "", "")  # a name that is none is told before the hours
    asker = Asker(model, settings)
    with Folder(out, asker.identity()) as folder:
        about = report.about(name, profile, dataclasses.asdict(settings), any_file, folder.started)
        content, counts, written = {"about": about, "benchmarks": {}}, {}, 0.0
        for key, table in loaded.items():
            counts[key] = min(len(table.rows), settings.limit or len(table.rows))
        with Progress("evaluate", sum(counts.values())) as progress:
            for number, (key, table) in enumerate(loaded.items(), 1):
                job = Job(BENCHMARKS[key], table, counts[key], folder.records(key, table.md5))
                answer_all(asker, job, progress, number)
                content["benchmarks"][key] = scores.write(job, settings.modes, about, judge, out)
                content["judge"] = report.judge(judge)
                if number == len(loaded) or time.monotonic() > written + REPORT_SECONDS:
                    report.write(content, out)
                    written = time.monotonic()
    return content


# Asking


class Asker:
    """A model that answers batches of prompts in all modes, on the mesh if there is one."""

    def __init__(self, model: Model, settings: Settings):
        generation = settings.generate
        self.longest = min(generation.prompt_len, model.limit - generation.max_new_tokens)
        if self.longest < SHORTEST // 2:
            raise ConfigError(
                f"{generation.max_new_tokens} new tokens leave no room for a prompt in the model's "
                f"context of {model.limit}: lower --max-new-tokens"
            )
        if not settings.modes or set(settings.modes) - set(dialogue.MODES):
            raise ConfigError(f"modes are some of {', '.join(dialogue.MODES)}")
        self.model, self.settings, self.ids = model, settings, Ids.of(model.tokenizer)
        with sharding.for_rollouts(generation.tensor):
            shards = sharding.row_shards(sharding.current())
            self.params = jax.device_put(for_generation(model.config, model.params))
        # Each copy of the parameters answers the same number of queries.
        self.size = -(-generation.batch_size // shards) * shards
        forced = [dialogue.forced_ids(model.tokenizer, mode) for mode in settings.modes]
        self.forced = forced_array(forced, self.size)
        self.keys = jax.random.split(jax.random.key(0), (self.size, len(forced)))  # never read

    def identity(self) -> dict:
        """What records depend on, for the folder that holds them."""
        generation, tokenizer = self.settings.generate, self.model.tokenizer
        talks = f"{tokenizer.json}\n{tokenizer.image_id}\n{tokenizer.template}"
        return {
            "weights": fingerprint(self.model.params),
            "tokenizer": hashlib.sha256(talks.encode()).hexdigest(),
            "compute_dtype": self.model.config.compute_dtype,
            "modes": self.settings.modes,
            "think_bias": self.settings.think_bias,
            "limit": self.settings.limit,
            "max_prompt_tokens": self.longest,
            "max_new_tokens": generation.max_new_tokens,
            "max_direct_tokens": generation.max_direct_tokens,
        }

    def shape(self, sample: Sample) -> tuple[int, int]:
        """(tokens, tiles) that a prompt is padded to, from the headers of its pictures.

        Raises:
          ValueError: a picture cannot be read, or the prompt is too long.
        """
        tokenizer, vision = self.model.tokenizer, self.model.config.vision
        pictures = images.prepare(sample.images, vision)
        counts = [len(picture.index) for picture in pictures]
        length = len(prompt_ids(tokenizer, sample.turns, counts, sample.system))
        if length > self.longest:
            raise ValueError(f"the prompt has {length} tokens, more than {self.longest}")
        tiles = sum(picture.num_tiles for picture in pictures)
        padded = min(_padded(length), self.longest)
        return padded, next((n for n in TILE_BUCKETS if n >= tiles), tiles)

    def prompt(self, sample: Sample) -> Example:
        """Raises ValueError: a picture cannot be read."""
        return encode_prompt(self.model.tokenizer, self.model.config.vision, sample)

    def answer(self, prompts: Sequence[Example | None], shape: tuple[int, int]):
        """What at most `size` prompts are answered, None = one that is set aside: a Generation
        whose arrays may still be computed."""
        generation, config = self.settings.generate, self.model.config
        whole = next(prompt for prompt in prompts if prompt is not None)
        full = [prompt or whole for prompt in prompts] + [whole] * (self.size - len(prompts))
        forced = self.forced.copy()
        idle = [i for i in range(self.size) if i >= len(prompts) or prompts[i] is None]
        forced[idle] = self.ids.end  # those that only fill up end at once
        sampling = Sampling.of(
            think_bias=self.settings.think_bias,
            max_direct_tokens=generation.max_direct_tokens or None,
        )
        patches = config.vision.num_patches
        padded = pad_prompts(full, shape[0], self.ids.pad, patches, shape[1])
        with sharding.for_rollouts(generation.tensor):
            return generate(
                config,
                self.params,
                *sharding.place_rows((padded, forced, self.keys)),
                self.ids,
                max_new_tokens=generation.max_new_tokens,
                sampling=sampling,
                queries_at_once=self._fitting(shape[0]),
                rollouts_at_once=generation.rollouts_at_once,
            )

    def _fitting(self, prompt_len: int) -> int:
        """Queries at work at once, as far as the device tells its memory."""
        generation, language = self.settings.generate, self.model.config.language
        stats = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            return generation.queries_at_once
        tensor = generation.tensor
        held = sum(x.nbytes for x in jax.tree.leaves(self.params)) / tensor
        rows = min(generation.rollouts_at_once, len(self.settings.modes))
        width = language.num_layers * 2 * language.num_kv_heads * language.head_dim / tensor
        width *= jnp.dtype(self.model.config.compute_dtype).itemsize
        query = width * (prompt_len + rows * generation.max_new_tokens)
        fitting = int(MEMORY_SHARE * (stats["bytes_limit"] - held) / query)
        return max(1, min(generation.queries_at_once, fitting))


def _padded(length: int) -> int:
    """The least of 64, 96, 128, 192, 256, ... that is not below `length`."""
    power = max(SHORTEST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if SHORTEST < power and length <= power * 3 // 4 else power


def fingerprint(params: dict) -> str:
    """A hash of parameters that is the same on every device, dtype and mesh kept: checkpoints have
    no name that stays theirs."""
    sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(_bits, tree))(params))
    found = jax.tree_util.tree_leaves_with_path(sums)
    told = [(jax.tree_util.keystr(path), value.tolist()) for path, value in found]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _bits(x: Array) -> Array:
    """The bits of each element times an odd number of its place, added up modulo 2^32."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32).reshape(-1)
    places = jnp.arange(bits.size, dtype=jnp.uint32) * 2 + 1
    sums = jnp.sum(bits * places, dtype=jnp.uint32)
    return jnp.append(jnp.array([*x.shape, x.dtype.itemsize], jnp.uint32), sums)


# A benchmark's queries


@dataclasses.dataclass(frozen=True)
class Query:
    row: int  # its place in the table
    sample: Sample
    sha256: str  # of texts and pictures, in order


def query_of(benchmark: Benchmark, table: tables.Table, row: int) -> Query:
    """Raises ValueError: an image is missing; KeyError: the table lacks a column."""
    pictures = table.images(row)
    pieces = benchmark.prompt(table.rows[row], len(pictures))
    index = str(table.rows[row]["index"])
    turn = Turn(_text(pieces), tuple(pictures[piece] for piece in pieces if isinstance(piece, int)))
    hashed = [
        hashlib.sha256(pictures[piece]).hexdigest() if isinstance(piece, int) else piece
        for piece in pieces
    ]
    digest = hashlib.sha256(json.dumps(hashed).encode()).hexdigest()
    return Query(row, Sample(benchmark.name, (turn,), f"{benchmark.name}/{index}"), digest)


def _text(pieces: Prompt) -> str:
    """The text of a prompt, with marks where pictures are shown unless all come first."""
    said = [PLACE if isinstance(piece, int) else piece.replace(PLACE, "") for piece in pieces]
    count = said.count(PLACE)
    return "".join(said[count:] if said[:count] == [PLACE] * count else said)


def answer_all(asker: Asker, job: Job, progress: Progress, number: int = 1):
    """Answer every query of a benchmark that has no record. While the devices answer a batch, the
    next one is read."""
    modes, records = asker.settings.modes, job.records
    left = [row for row in range(job.count) if records.missing(row, modes)]
    progress.advance(job.count - len(left), benchmark=number)
    if not left:
        return
    batches, aside = _batches(asker, job)
    records.append(_aside(job, row, reason) for row, reason in aside.items())
    progress.advance(sum(row in aside for row in left))
    under_way = None
    for rows, shape in batches:
        if not any(records.missing(row, modes) for row in rows):
            continue
        asked = [_asked(asker, job, row) for row in rows]
        if under_way:
            _finish(asker, job, progress, *under_way)
        prompts = [x if isinstance(x, Example) else None for _, x in asked]
        out = asker.answer(prompts, shape) if any(prompts) else None
        sizes = [x if isinstance(x, str) else len(x.tokens) for _, x in asked]
        under_way = [query for query, _ in asked], sizes, out
    if under_way:
        _finish(asker, job, progress, *under_way)


def _batches(asker: Asker, job: Job):
    """(rows of each batch with its shape, {row: why it is set aside})."""
    shapes, aside = {}, {}
    for row in range(job.count):
        try:
            shapes[row] = asker.shape(query_of(job.benchmark, job.table, row).sample)
        except KeyError as error:
            raise ConfigError(f"{job.table.path} has no column {error}") from None
        except ValueError as error:
            aside[row] = str(error)
    if aside and not shapes:
        first = aside[min(aside)]
        raise ConfigError(f"{job.table.path}: no query can be asked; of the first: {first}")
    order = sorted(shapes, key=lambda row: (*shapes[row], -row), reverse=True)
    batches = [order[i : i + asker.size] for i in range(0, len(order), asker.size)]
    return [(rows, _largest(shapes[row] for row in rows)) for rows in batches], aside


def _largest(shapes) -> tuple[int, int]:
    lengths, tiles = zip(*shapes)
    return max(lengths), max(tiles)


def _asked(asker: Asker, job: Job, row: int) -> tuple[Query, Example | str]:
    """A query and its prompt, or why its pictures cannot be decoded."""
    query = query_of(job.benchmark, job.table, row)
    slim = dataclasses.replace(query, sample=None)
    try:
        return slim, asker.prompt(query.sample)
    except ValueError as error:
        return slim, str(error)


def _finish(asker: Asker, job: Job, progress: Progress, queries, sizes, out):
    """Wait for a batch, and write its records.

    Args:
      sizes: tokens of each query's prompt, or why it is set aside.
    """
    modes, out = asker.settings.modes, jax.device_get(out)
    new = sum(job.records.missing(query.row, modes) for query in queries)
    asked = [isinstance(size, int) for size in sizes]

    def found() -> Iterator[dict]:
        for i, (query, size) in enumerate(zip(queries, sizes)):
            if not asked[i]:
                yield _aside(job, query.row, size)
                continue
            for m in range(len(modes)):
                yield record_of(asker, job, query, size, out, i, m)

    job.records.append(found())
    tokens = out.lengths[: len(asked)][asked].mean() if any(asked) else 0
    progress.advance(new, tokens=float(tokens))


def record_of(asker: Asker, job: Job, query: Query, prompt_tokens: int, out, i: int, m: int):
    """The record of what the i-th query of a batch was answered in the m-th mode."""
    tokenizer, mode = asker.model.tokenizer, asker.settings.modes[m]
    ids = out.tokens[i, m, : out.lengths[i, m]].tolist()
    reply = dialogue.split_reply(tokenizer, ids)
    chosen = "thinking" if reply.thinks else "non-thinking"
    if not reply.thinks and ids[0] != tokenizer.direct_id:
        chosen = "neither"  # auto mode began with another token
    record = _identity(job, query.row) | {
        "prompt": query.sha256,
        "prompt_tokens": prompt_tokens,
        "mode": mode,
        "chosen": chosen,
        "thinks": reply.thinks,
        "p_think": float(p_think(out.mode_logps[i].astype(np.float64))),
        "mode_logps": out.mode_logps[i].tolist(),
        "think_bias": asker.settings.think_bias,
        "thought": reply.thought,
        "answer": reply.answer,
        "tokens": reply.num_tokens,
        "finish": "end" if tokenizer.end_id in ids else "length",
    }
    if mode == "non-thinking":
        record["close_logp"] = float(out.logps[i, m, 1])
    if reply.answer is None:  # what there is of one, for people; it is not scored
        closed = tokenizer.end_think_id in ids
        rest = ids[ids.index(tokenizer.end_think_id) + 1 :] if closed else []
        record["cut_off"] = tokenizer.decode(rest).strip()
    return record


def _aside(job: Job, row: int, reason: str) -> dict:
    return _identity(job, row) | {"set_aside": reason}


def _identity(job: Job, row: int) -> dict:
    return {"benchmark": job.benchmark.name, "id": job.table.rows[row]["index"], "row": row}
