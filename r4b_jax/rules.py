"""Settings that cannot work together, told before anything is computed."""

import difflib

from r4b_jax.config import (
    COMPONENTS,
    MOMENTS,
    REMATS,
    STAGES,
    BPOConfig,
    Config,
    ConfigError,
    GenerateConfig,
    MeshConfig,
    StageConfig,
    VisionConfig,
)

ROLES = ("teacher", "judge", "reasoner")  # of curation


def check(config: Config, *, has_data: bool = True):
    """Refuse settings that cannot work together, before anything is computed.

    Args:
      has_data: what trains must name its data; a plan needs none.
    Raises:
      ConfigError: the message names the settings and what to change.
    """
    language, vision = config.model.language, config.model.vision
    rules = [
        (
            language.num_heads % language.num_kv_heads == 0,
            f"model.language.num_heads ({language.num_heads}) must be a multiple of "
            f"num_kv_heads ({language.num_kv_heads})",
        ),
        (
            vision.width % vision.num_heads == 0,
            f"model.vision.width ({vision.width}) must be a multiple of num_heads "
            f"({vision.num_heads})",
        ),
        (
            vision.grid_is_whole_tiles,
            f"model.vision.grid_pinpoints are (height, width) in whole tiles of "
            f"{vision.image_size} pixels, not {vision.grid_pinpoints}",
        ),
        _at_least("model.vision.max_grid_tiles", vision.max_grid_tiles, 1),
        _one_of("model.remat", config.model.remat, REMATS),
        _at_least("model.loss_chunk", config.model.loss_chunk, 1),
        *_mesh_rules(config.mesh),
        (
            language.num_kv_heads % max(config.generate.tensor, 1) == 0,
            f"generate.tensor ({config.generate.tensor}) must divide "
            f"model.language.num_kv_heads ({language.num_kv_heads})",
        ),
        (
            config.world.vocab_size <= language.vocab_size,
            f"world.vocab_size ({config.world.vocab_size}) must not exceed "
            f"model.language.vocab_size ({language.vocab_size})",
        ),
        _at_least("workers", config.workers, 1),
        _at_least("eval_questions", config.eval_questions, 0),
        _at_least("bpo.eval_questions", config.bpo.eval_questions, 0),
        _at_least("log_every", config.log_every, 1),
        _at_least("checkpoint_every", config.checkpoint_every, 1),
    ]
    if config.bpo.num_steps or config.eval_questions or config.curation.in_run or not has_data:
        rules += _generate_rules(config.generate, vision)
    if config.bpo.num_steps or not has_data:
        rules += _bpo_rules(config.bpo, config.generate)
    if config.curation.in_run:
        rules += _curation_rules(config)
    for name in STAGES:
        stage = getattr(config, name)
        rules += _stage_rules(name, stage, vision)
        if stage.num_steps > 0 and has_data:
            rules += _data_rules(name, config, stage.sources)
            rules += _mixture_rules(name, config, stage)
    if config.bpo.num_steps > 0:
        rules += _data_rules("bpo", config, config.bpo.sources)
        rules.append(_world_questions("bpo.", config, config.bpo.eval_questions))
    rules.append(_world_questions("", config, config.eval_questions))
    _enforce(rules)


def check_curation(config: Config):
    """`check` for curation by itself: of the model and how it writes only where it has a part.

    Raises:
      ConfigError: the message names the settings and what to change.
    """
    _enforce(_curation_rules(config))
    roles = [getattr(config.curation, role) for role in ROLES]
    if not all(role.url for role in roles) and config.init_from:
        check(config)
        _enforce(_generate_rules(config.generate, config.model.vision))
    elif not any(role.url for role in roles):
        raise ConfigError(
            "config.curation has nobody to ask: no teacher.url, no judge.url, no config.init_from"
        )
    elif config.curation.rewards and not config.curation.teacher.url:
        raise ConfigError(
            "config.curation has rewards and no teacher: give it teacher.url, or config.init_from"
        )


def _enforce(rules: list[tuple[bool, str]]):
    for holds, message in rules:
        if not holds:
            raise ConfigError(f"config.{message}")


def _data_rules(name: str, config: Config, sources: tuple[str, ...]):
    """The rules of `check` for what a stage, BPO or curation reads."""
    known = tuple(config.sources)
    return [
        (bool(known), f"{name} has no data: give it config.sources (docs/data.md)"),
        *[_one_of(f"{name}.sources", source, known) for source in sources if known],
        *[
            (bool(source.path), f"sources.{source_name}.path is empty: name its files, or world")
            for source_name, source in config.sources.items()
        ],
    ]


def _world_questions(prefix: str, config: Config, count: int) -> tuple[bool, str]:
    """A rule of `check`: who has data of their own asks no questions about the small world."""
    return (
        count == 0 or not config.sources or _reads_world(config, ()),
        f"{prefix}eval_questions asks about the small world, which is none of your sources: "
        f"{prefix}eval_questions = 0",
    )


def _reads_world(config: Config, sources: tuple[str, ...]) -> bool:
    """Whether the small world is among these sources, () = all."""
    names = sources or tuple(config.sources)
    return any(config.sources[n].path == "world" for n in names if n in config.sources)


def _mixture_rules(name: str, config: Config, stage: StageConfig):
    """The rules of `check` for a stage's mixture."""
    weights = stage.mixture.items()
    world = _reads_world(config, stage.sources)
    return [
        *[
            (
                len(pair) == 2 and min(pair) >= 0,
                f"{name}.mixture.{topic} is (weight of direct samples, weight of thinking ones), "
                f"not {pair}",
            )
            for topic, pair in weights
        ],
        (
            not weights or any(sum(pair) > 0 for _, pair in weights),
            f"{name}.mixture weighs nothing above 0",
        ),
        (
            bool(weights) or not world,
            f"{name} has no mixture: the small world has topics without end, name those you want",
        ),
        (
            stage.epochs == 0 or not world,
            f"{name}.epochs: the small world has no end, so no epochs either",
        ),
    ]


def _curation_rules(config: Config):
    """The rules of `check` for curation."""
    curation = config.curation
    world = _reads_world(config, curation.sources)
    return _data_rules("curation", config, curation.sources) + [
        (
            not world or bool(curation.topics and curation.num_queries),
            "curation.topics and curation.num_queries: the small world has no end",
        ),
        _at_least("curation.num_queries", curation.num_queries, 0),
        _at_least("generate.batch_size", config.generate.batch_size, 1),
        _at_least("workers", config.workers, 1),
        *[
            _at_least(f"curation.{role}.concurrency", getattr(curation, role).concurrency, 1)
            for role in ROLES
        ],
        (
            curation.min_thought_words <= curation.max_thought_words,
            "curation.min_thought_words is more than max_thought_words",
        ),
        *[
            (weight > 0, f"curation.topics.{topic} weighs {weight}: leave it out")
            for topic, weight in curation.topics.items()
        ],
        _at_least("curation.num_answers", curation.num_answers, 1),
        _at_least("curation.num_traces", curation.num_traces, 0),
        (
            0 < curation.duplicate_similarity <= 1,
            f"curation.duplicate_similarity is above 0 and at most 1, not "
            f"{curation.duplicate_similarity}",
        ),
        *[
            (
                not getattr(curation, name).url or bool(getattr(curation, name).model),
                f"curation.{name}.model is empty: which model of {getattr(curation, name).url}?",
            )
            for name in ROLES
        ],
    ]


def _stage_rules(name: str, stage: StageConfig, vision: VisionConfig):
    """The rules of `check` for a supervised stage."""
    runs = stage.num_steps > 0
    rate = stage.lr_projector + stage.lr_vision + stage.lr_language
    return [
        _one_of(f"{name}.schedule", stage.schedule, ("cosine", "constant")),
        _one_of(f"{name}.optimizer", stage.optimizer, ("adamw", "muon")),
        _at_least(f"{name}.epochs", stage.epochs, 0),
        _one_of(f"{name}.objective", stage.objective, ("next_token", "caption_words")),
        _one_of(f"{name}.moment_dtype", stage.moment_dtype, MOMENTS),
        _at_least(f"{name}.micro_rows", stage.micro_rows, 0),
        _at_least(f"{name}.batch_rows", stage.batch_rows, 1),
        (
            stage.micro_rows == 0 or stage.batch_rows % stage.micro_rows == 0,
            f"{name}.micro_rows ({stage.micro_rows}) must divide {name}.batch_rows "
            f"({stage.batch_rows})",
        ),
        (
            stage.micro_rows == 0 or stage.objective == "next_token",
            f"{name}.objective caption_words weighs words over the whole batch: "
            f"{name}.micro_rows = 0",
        ),
        (
            not runs
            or stage.objective == "next_token"
            or (stage.packed_tiles == 1 and not vision.grid_pinpoints),
            f"{name}.objective caption_words takes one tile a row: {name}.packed_tiles = 1 and "
            "model.vision.grid_pinpoints = ()",
        ),
        (not runs or rate > 0, f"{name} trains nothing: give it a learning rate"),
    ]


def _generate_rules(generate: GenerateConfig, vision: VisionConfig) -> list[tuple[bool, str]]:
    """The rules of `check` for decoding."""
    longest = generate.max_new_tokens
    return [
        _at_least("generate.max_new_tokens", longest, 3),  # the direct mode forces two
        (
            generate.max_direct_tokens in (0, *range(3, longest + 1)),
            f"generate.max_direct_tokens ({generate.max_direct_tokens}) is 0 or from 3 to "
            f"generate.max_new_tokens ({longest})",
        ),
        _at_least("generate.tensor", generate.tensor, 1),
        _at_least("generate.queries_at_once", generate.queries_at_once, 1),
        _at_least("generate.rollouts_at_once", generate.rollouts_at_once, 1),
        (
            vision.num_patches < generate.prompt_len,
            f"generate.prompt_len ({generate.prompt_len}) must hold a picture's "
            f"{vision.num_patches} tokens and the question",
        ),
    ]


def _bpo_rules(bpo: BPOConfig, generate: GenerateConfig) -> list[tuple[bool, str]]:
    """The rules of `check` for BPO."""
    prompt_len, new_len = generate.prompt_len, generate.max_new_tokens
    return [
        _one_of("bpo.algorithm", bpo.algorithm, ("bpo", "grpo")),
        _one_of("bpo.mode_tokens", bpo.mode_tokens, ("mask", "policy", "behaviour")),
        _one_of("bpo.moment_dtype", bpo.moment_dtype, MOMENTS),
        _at_least("bpo.g", bpo.g, 1),
        _at_least("bpo.micro_rows", bpo.micro_rows, 1),
        _at_least("bpo.updates_per_rollout", bpo.updates_per_rollout, 1),
        _at_least("bpo.eval_every", bpo.eval_every, 1),
        (bpo.num_steps == 0 or bool(bpo.topics), "bpo has no data: give it topics"),
        *[
            (weight > 0, f"bpo.topics.{topic} weighs {weight}: leave it out")
            for topic, weight in bpo.topics.items()
        ],
        (
            bpo.num_steps == 0 or bool(set(bpo.rewards) & set(bpo.topics)),
            f"bpo learns nothing: bpo.rewards names {', '.join(bpo.rewards) or 'no topic'}, "
            f"bpo.topics {', '.join(bpo.topics)}",
        ),
        _at_least("bpo.reward_workers", bpo.reward_workers, 0),
        (bpo.reward_deadline > 0, f"bpo.reward_deadline is above 0, not {bpo.reward_deadline}"),
        (bpo.max_importance >= 1, f"bpo.max_importance is at least 1, not {bpo.max_importance}"),
        *[_one_of("bpo.frozen", name, COMPONENTS) for name in bpo.frozen],
        (set(bpo.frozen) < set(COMPONENTS), "bpo trains nothing: bpo.frozen names every component"),
        (
            bpo.temperature == 1 or not (bpo.overlap_rewards or bpo.int8_rollouts),
            "bpo.overlap_rewards and bpo.int8_rollouts compare the policy with its sampler: that "
            f"needs bpo.temperature = 1, not {bpo.temperature}",
        ),
        (
            not (bpo.overlap_rewards and bpo.int8_rollouts),
            "bpo.overlap_rewards and bpo.int8_rollouts both leave the policy in ways of their own: "
            "choose one",
        ),
        (
            bpo.temperature > 0,
            f"bpo.temperature must be above 0, not {bpo.temperature}: greedy rollouts explore "
            "nothing",
        ),
        (
            prompt_len + new_len <= bpo.packed_len,
            f"bpo.packed_len ({bpo.packed_len}) must hold generate.prompt_len ({prompt_len}) + "
            f"generate.max_new_tokens ({new_len})",
        ),
    ]


def _mesh_rules(mesh: MeshConfig) -> list[tuple[bool, str]]:
    """The rules of `check` for the mesh."""
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    return [
        (min(sizes) >= 0, f"mesh sizes are at least 0, not {sizes}"),
        (sizes.count(0) <= 1, f"only one mesh size may be 0, what is left; not {sizes}"),
    ]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> tuple[bool, str]:
    """A rule of `check`: a named choice."""
    near = difflib.get_close_matches(value, allowed, n=1, cutoff=0.0)[0]
    message = f"{name} is one of {', '.join(allowed)}, not {value!r}; did you mean {near}?"
    return value in allowed, message


def _at_least(name: str, value: int, least: int) -> tuple[bool, str]:
    """A rule of `check`: a lower bound."""
    return value >= least, f"{name} must be at least {least}, not {value}"
