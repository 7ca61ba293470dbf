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
        _at_least("log_every", config.log_every, 1),
        _at_least("checkpoint_every", config.checkpoint_every, 1),
        *_generate_rules(config.generate, vision),
        *_bpo_rules(config.bpo, config.generate),
    ]
    for name in STAGES:
        rules += _stage_rules(name, getattr(config, name), vision, has_data)
    for holds, message in rules:
        if not holds:
            raise ConfigError(f"config.{message}")


def _stage_rules(name: str, stage: StageConfig, vision: VisionConfig, has_data: bool):
    """The rules of `check` for a supervised stage."""
    runs = stage.num_steps > 0
    rate = stage.lr_projector + stage.lr_vision + stage.lr_language
    return [
        _one_of(f"{name}.schedule", stage.schedule, ("cosine", "constant")),
        _one_of(f"{name}.optimizer", stage.optimizer, ("adamw", "muon")),
        _one_of(f"{name}.format", stage.format, ("bimode", "direct", "thinking")),
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
        (
            not (runs and has_data) or bool(stage.topics),
            f"{name} has no data: give it topics",
        ),
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
