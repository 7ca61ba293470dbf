"""The work that is timed, in this project's terms: the models and sizes of `peers/sizes.py`.

W1: 8 prompts of 600 tokens, 16 replies of 128 tokens to each. W2: one update on those sequences.
W3: one supervised step on 8 rows of 1,024 tokens. M1 sees: 592 of a prompt's tokens, or of a row's,
are a picture's (9 tiles and newlines). M2 is its decoder alone.
"""

import dataclasses
import functools
import types

import jax
import measure
import numpy as np
import sizes

from r4b_jax import config as c
from r4b_jax.data import images
from r4b_jax.data.dialogue import Reply
from r4b_jax.data.examples import Example, Packer, encode
from r4b_jax.data.samples import Sample
from r4b_jax.decoding.generate import Generation, Ids, forced_array, generate
from r4b_jax.decoding.prompts import pad_prompts
from r4b_jax.decoding.sampling import Sampling
from r4b_jax.models import r4b
from r4b_jax.rl.rollout import Rollouts, pack_rollouts
from r4b_jax.rl.update import make_update, reference_pass, update
from r4b_jax.training.optimizer import bpo_optimizer, stage_optimizer, trainable
from r4b_jax.training.step import init_state, make_train_step

THINKING, DIRECT, END_THINK = 1, 2, 3  # of no use here: replies begin freely
TOKENIZER = types.SimpleNamespace(
    pad_id=sizes.PAD,
    image_id=sizes.IMAGE_TOKEN,
    thinking_id=THINKING,
    direct_id=DIRECT,
    end_think_id=END_THINK,
)


def model_config() -> c.ModelConfig:
    """M1; without pictures in the prompts, M2."""
    text, seen = sizes.TEXT, sizes.VISION
    side, grids = seen["image_size"], range(1, 5)
    vision = c.VisionConfig(
        image_size=side,
        patch_size=seen["patch_size"],
        width=seen["hidden_size"],
        num_layers=seen["num_hidden_layers"],
        num_heads=seen["num_attention_heads"],
        mlp_dim=seen["intermediate_size"],
        grid_pinpoints=tuple(
            (side * h, side * w) for h in grids for w in grids if h * w <= sizes.MAX_TILES
        ),
    )
    language = c.LanguageConfig(
        vocab_size=text["vocab_size"],
        width=text["hidden_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        mlp_dim=text["intermediate_size"],
        rope_theta=sizes.ROPE_THETA,
        norm_eps=sizes.NORM_EPS,
    )
    return c.ModelConfig(
        vision, language, projector_norm=False, compute_dtype="float32", remat="matmuls"
    )


def setup(args) -> c.Config:
    """The settings of a benchmark's arguments."""
    row = args.prompt_length + args.new_tokens * (args.samples if args.shared_prefix else 1)
    return c.Config(
        model=model_config(),
        generate=c.GenerateConfig(prompt_len=args.prompt_length, max_new_tokens=args.new_tokens),
        bpo=c.BPOConfig(
            algorithm="grpo",  # replies begin freely
            topics={"any": 1.0},
            num_queries=args.prompts,
            g=args.samples // 2,
            packed_len=row,
            packed_tiles=sizes.IMAGE_TILES if args.model == "m1" else 0,
            micro_rows=1 if args.shared_prefix else 4,
            kl_beta=0.0,
            clip_eps=sizes.CLIP_RATIO,
            max_grad_norm=sizes.CLIP_NORM,
            learning_rate=sizes.LEARNING_RATE,
            warmup_steps=0,
        ),
    )


def prompts(config: c.Config, *, sees: bool) -> list[Example]:
    """Random prompts, with a picture in each for M1."""
    rng, vision, length = np.random.default_rng(0), config.model.vision, config.generate.prompt_len
    return [
        example(rng, vision, length, sees=sees, learns=False) for _ in range(config.bpo.num_queries)
    ]


def example(rng, vision: c.VisionConfig, length: int, *, sees: bool, learns: bool) -> Example:
    """A random sequence, with a picture near its start if it `sees`; if it `learns`, with loss on
    all its text but the first token, which nothing predicts."""
    tokens, pictures = rng.integers(*sizes.WORDS, length), []
    if sees:
        shape = (sizes.IMAGE_HEIGHT, sizes.IMAGE_WIDTH, 3)
        pictures = images.prepare([rng.integers(0, 256, shape, np.uint8)], vision)
        first = sizes.IMAGE_AT
        tokens[first : first + len(pictures[0].index)] = sizes.IMAGE_TOKEN
    loss = (tokens != sizes.IMAGE_TOKEN) & (np.arange(length) > 0) & learns
    return encode(TOKENIZER, vision, tokens, loss, pictures)


def rollout(args):
    """W1: a function of the repeat's number that does it once and returns the Generation."""
    config = setup(args)
    params = r4b.init(config.model, jax.random.key(0))
    queries = prompts(config, sees=args.model == "m1")
    patches = config.model.vision.num_patches
    padded = pad_prompts(
        queries, args.prompt_length, sizes.PAD, patches, tiles=len(queries[0].tiles)
    )
    never_ends = Ids(-1, sizes.PAD, THINKING, DIRECT, END_THINK, never=())

    def run(repeat: int) -> Generation:
        keys = jax.random.split(jax.random.key(repeat), (args.prompts, args.samples))
        out = generate(
            config.model,
            params,
            padded,
            forced_array([[]] * args.samples, args.prompts),
            keys,
            never_ends,
            max_new_tokens=args.new_tokens,
            sampling=Sampling.of(1.0),
        )
        return jax.block_until_ready(out)

    return run


def random_rollouts(config: c.Config, *, sees: bool) -> Rollouts:
    """Random replies, all of full length."""
    rng, bpo, new = np.random.default_rng(1), config.bpo, config.generate.max_new_tokens
    shape = (bpo.num_queries, 2 * bpo.g, new)
    generation = Generation(
        tokens=rng.integers(*sizes.WORDS, shape).astype(np.int32),
        logps=np.full(shape, -np.log(config.model.language.vocab_size), np.float32),
        lengths=np.full(shape[:2], new, np.int32),
        mode_logps=np.zeros((bpo.num_queries, 2), np.float32),
        steps=new,
        occupancy=1.0,
    )
    questions = [Sample.ask("any", None, "", "")] * bpo.num_queries
    replies = [[Reply(None, "", False, new)] * shape[1]] * bpo.num_queries
    return Rollouts(questions, prompts(config, sees=sees), ["auto"] * shape[1], generation, replies)


def bpo_step(args):
    """W2: a function of the repeat's number that does it once and returns the metrics: packing,
    gradients of all micro-batches, and the optimiser."""
    config = setup(args)
    params = r4b.init(config.model, jax.random.key(0))
    rollouts = random_rollouts(config, sees=args.model == "m1")
    shape = (args.prompts, args.samples)
    advantages = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    parts = make_update(config, never=())
    state = init_state(params, bpo_optimizer(config.bpo), tuple(params))

    def run(_: int) -> dict:
        nonlocal state
        batches = pack_rollouts(config, TOKENIZER, rollouts)
        reference = reference_pass(config, parts, params, batches)
        state, metrics = update(config, parts, state, batches, advantages, reference)
        jax.block_until_ready(state.params)
        return metrics

    return run


def train_step(args):
    """W3: a function of the repeat's number that does it once and returns the metrics."""
    sees, length = args.model == "m1", measure.document_length(args)
    model = dataclasses.replace(model_config(), remat=args.remat)
    rate = sizes.LEARNING_RATE
    stage = c.StageConfig(
        optimizer="adamw",
        schedule="constant",
        lr_language=rate,
        lr_vision=rate if sees else 0.0,
        lr_projector=rate if sees else 0.0,
        weight_decay=0.01,
        max_grad_norm=sizes.CLIP_NORM,
    )
    tiles, rng = sizes.IMAGE_TILES if sees else 0, np.random.default_rng(0)
    packer = Packer(args.rows, args.row_length, tiles, model.vision, sizes.PAD)
    for _ in range(args.rows * args.documents):
        assert packer.add(example(rng, model.vision, length, sees=sees, learns=True))
    assert (packer.used == args.row_length).all()
    state = init_state(r4b.init(model, jax.random.key(0)), stage_optimizer(stage), trainable(stage))
    step = make_train_step(model, stage)

    def run(_: int) -> dict:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, packer.batch))
        return metrics

    return run


def plain(args, work: str):
    """The same work by `plain.py`: M2 alone."""
    import plain

    params, rng = plain.init(jax.random.key(0)), np.random.default_rng(0)
    queries = rng.integers(*sizes.WORDS, (args.prompts, args.prompt_length)).astype(np.int32)
    replies = (args.prompts, args.samples, args.new_tokens)
    replies = rng.integers(*sizes.WORDS, replies).astype(np.int32)
    if work == "W1":
        sample = functools.partial(plain.rollout, samples=args.samples, new_tokens=args.new_tokens)
        return lambda i: jax.block_until_ready(sample(params, queries, jax.random.key(i)))
    state = params, plain.optimizer().init(params)
    advantages = rng.standard_normal(replies.shape[:2]).astype(np.float32)

    def run(_: int):
        nonlocal state
        state = jax.block_until_ready(plain.update(*state, queries, replies, advantages))

    return run
