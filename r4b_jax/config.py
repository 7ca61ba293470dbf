"""Every setting of the project, as frozen dataclasses. Imports nothing heavy: a mistake is told at
once.

A config file (`configs/*.py`) builds a `Config`, and `to_config_dict` turns it into an
ml_collections ConfigDict, so that each field can be overridden on the command line.
`from_config_dict` is the way back: an unknown key or a wrong type raises ConfigError with the
nearest name. Defaults live here and nowhere else. `experiments/PAPER.md` maps the paper's figures
to these fields.
"""

import dataclasses
import difflib
import types
import typing

import ml_collections


class ConfigError(ValueError):
    """A setting that cannot be right; the message names it and the nearest valid name."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP2 tower. PAPER.md section 2: 27 layers, 1152 wide, 16 heads, MLP 4304, 384 px, patch
    14."""

    image_size: int = 384  # pixels a side of one tile
    patch_size: int = 14
    width: int = 1152
    num_layers: int = 27
    num_heads: int = 16
    mlp_dim: int = 4304
    norm_eps: float = 1e-6
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of red, green, blue, as shares of 255
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    # AnyRes: the (height, width) in pixels that a grid of tiles may have; () = one tile a picture,
    # with no newline after it.
    grid_pinpoints: tuple[tuple[int, ...], ...] = tuple(
        (384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)
    )
    # A grid of more feature rows than this many tiles have is scaled down ("anyres_max_9").
    max_grid_tiles: int = 9

    @property
    def num_patches(self) -> int:
        """Feature rows a tile gives: (image_size // patch_size) squared."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def grid_is_whole_tiles(self) -> bool:
        """Whether every pinpoint is a (height, width) of whole tiles."""
        return all(
            len(point) == 2 and min(point) > 0 and not any(n % self.image_size for n in point)
            for point in self.grid_pinpoints
        )


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Qwen3 decoder. PAPER.md section 2: Qwen3-4B."""

    vocab_size: int = 151936
    width: int = 2560
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    mlp_dim: int = 9728
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied_head: bool = True  # the head is the embedding table


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    projector_norm: bool = True  # R-4B's LayerNorm before the projector; LLaVA-OneVision has none
    projector_norm_eps: float = 1e-6
    compute_dtype: str = "bfloat16"  # of activations; parameters are always float32
    # What the backward pass computes again: "full" a layer from its input | "offload" the same, and
    # the inputs wait in host memory | "attention" all but the attention | "matmuls" only what lies
    # between matrix products
    remat: str = "full"
    loss_chunk: int = 1024  # tokens whose logits exist at once


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices share what (common/sharding.py). One size may be 0: what is left."""

    data: int = 1  # copies of the parameters
    fsdp: int = 0  # devices a copy is split over; rows are split over data x fsdp
    tensor: int = 1  # devices that share the heads and hidden units of the same rows


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """The small world of real images (data/worlds.py)."""

    pixel_noise: float = 6.0  # std of Gaussian noise on training pictures, in grey levels of 255
    vocab_size: int = 448  # of the tokenizer trained on the world's own text


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A dataset: docs/data.md has the formats."""

    # A file, or a pattern of files: .json .jsonl .parquet .tar .array_record .tsv; or "world", the
    # small world. {workdir} is the run's own folder.
    path: str = ""
    images: str = ""  # folder of the pictures that records name; "" = the file's own
    topic: str = ""  # of records that name none; "" = the source's name
    prompt: str = "Describe the picture."  # asks what records have that are picture and caption


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One supervised stage. A learning rate of 0 freezes that component (PAPER.md section 3)."""

    sources: tuple[str, ...] = ()  # names of config.sources; () = all of them
    # topic -> (weight of its direct samples, weight of those with a thought), as the paper's table
    # of the annealing mix; {} = every sample of the sources alike
    mixture: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    epochs: int = 0  # the data end after so many times all samples of the mixture; 0 = never
    mask_empty_block: bool = False  # the empty thought of direct samples carries no loss: stage 3
    length_power: float = 0.0  # an example's n loss tokens weigh n^-length_power each
    # "next_token" | "caption_words": a picture as a whole names its caption's words, one picture a
    # row (stands for the pretraining of the tower)
    objective: str = "next_token"
    num_steps: int = 0
    batch_rows: int = 1  # packed sequences a batch
    micro_rows: int = 0  # rows a device computes at once, its others after them; 0 = all its rows
    packed_len: int = 256  # tokens a packed sequence
    packed_tiles: int = 8  # image tiles a packed sequence
    lr_projector: float = 0.0
    lr_vision: float = 0.0
    lr_language: float = 0.0
    optimizer: str = "adamw"  # or "muon", which leaves tables, norms and biases to AdamW
    adam_lr_ratio: float = 1.0  # under muon: AdamW's rate, as a share of the component's rate
    schedule: str = "cosine"  # or "constant"
    final_lr_ratio: float = 0.1  # cosine ends at this share of the peak
    warmup_steps: int = 0
    weight_decay: float = 0.0
    b2: float = 0.95
    moment_dtype: str = "float32"  # of the first moment; "bfloat16" saves two bytes a parameter
    max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class BPOConfig:
    """Bi-mode Policy Optimization (PAPER.md section 5)."""

    # "bpo": g thinking and g direct rollouts | "grpo": 2g rollouts that choose their mode
    algorithm: str = "bpo"
    sources: tuple[str, ...] = ()  # names of config.sources; () = all of them
    mode_tokens: str = "policy"  # "mask" | "policy" | "behaviour": PAPER.md section 5
    mode_weight: float = (
        1.0  # weight of the mode token beside the mean over the reply's other tokens
    )
    topics: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # topic -> weight of its queries
    # topic -> its reward: "maths", "exact", "numeric", "choice", "anls" (rl/rewards.py), or a plain
    # function of yours as "package.module:function". A topic that is not here has none.
    rewards: dict[str, str] = dataclasses.field(default_factory=dict)
    reward_workers: int = 1  # processes; 0 = in the training process, with no deadline
    reward_deadline: float = 5.0  # seconds a reply; after that it has no reward
    num_steps: int = 0
    num_queries: int = 16  # queries a step
    g: int = 8  # rollouts a mode and query
    updates_per_rollout: int = 1
    packed_len: int = 512  # tokens a packed row of prompts and replies
    packed_tiles: int = 4
    micro_rows: int = 4  # rows a device computes the gradients of at once
    temperature: float = 1.0
    # The next step's rollouts are sampled while this step's rewards are computed: their policy is
    # one step old, and the ratio is taken to it.
    overlap_rewards: bool = False
    int8_rollouts: bool = False  # sample with the decoder's kernels in 8 bits ...
    max_importance: float = 2.0  # ... and weigh a token by policy / sampler, at most this much
    clip_eps: float = 0.2
    kl_beta: float = 0.01
    # Components that are not trained; policy and reference share them.
    frozen: tuple[str, ...] = ()
    learning_rate: float = 1e-4
    final_lr_ratio: float = 1.0  # cosine ends at this share of the peak; 1 = constant
    warmup_steps: int = 5
    weight_decay: float = 0.0
    b2: float = 0.95
    moment_dtype: str = "float32"  # of the first moment, as in a stage
    max_grad_norm: float = 1.0
    eval_every: int = 20  # steps between small evaluations in auto mode (figures 8 and 9)
    eval_questions: int = 100  # of a topic of the small world, in those; 0 = no evaluations


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Sizes of the one `generate`: fixed shapes, few compilations."""

    prompt_len: int = 64  # longest prompt, image tokens included
    max_new_tokens: int = 64  # after <think>, forced mode tokens included
    max_direct_tokens: int = 0  # the same for a reply without a thought; 0 = max_new_tokens
    batch_size: int = 200  # queries a call in evaluation
    # Of a call's queries so many are at work at once, and of each one's replies so many; when one
    # has ended the next enters. Memory and the time of a step grow with their product.
    queries_at_once: int = 16
    rollouts_at_once: int = 8
    # Devices that hold one copy of the parameters together while generating; queries are spread
    # over the copies.
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """A model behind an OpenAI-compatible server (common/endpoint.py)."""

    url: str = ""  # such as http://localhost:8000/v1; "" = the project's own model
    model: str = ""  # its name there
    key_variable: str = "OPENAI_API_KEY"  # the environment variable with the key, if it has one
    concurrency: int = 16  # requests under way at once
    requests_per_minute: int = 0  # at most so many; 0 = no limit
    timeout: float = 120.0  # seconds a request
    retries: int = 6  # of a request that failed, after ever longer waits
    max_tokens: int = 4096  # of a reply
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class CurationConfig:
    """Who thinks, decided without labels (PAPER.md section 4)."""

    in_run: bool = False  # before annealing, with the model of the stage before as teacher
    sources: tuple[str, ...] = ()  # names of config.sources; () = all of them
    topics: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # topic -> weight of its queries; {} = all as they come
    num_queries: int = 0  # how many are looked at; 0 = every sample once
    # topic -> what tells a right answer, as in bpo.rewards: these topics are objective, a query is
    # answered num_answers times and needs reasoning if all are wrong. The judge decides the others.
    rewards: dict[str, str] = dataclasses.field(default_factory=dict)
    right_from: float = 1.0  # a reward from which an answer counts as right
    num_answers: int = 8
    num_traces: int = 4  # tries at a thought that passes the filters
    teacher: EndpointConfig = EndpointConfig()
    judge: EndpointConfig = EndpointConfig(temperature=0.0, max_tokens=512)
    reasoner: EndpointConfig = EndpointConfig(max_tokens=16384)
    # A sample's own thought is tried first, and needs no reasoner.
    min_thought_words: int = 3
    max_thought_words: int = 8000
    # A thought with one of these is refused, whatever its case.
    banned: tuple[str, ...] = (
        "as an ai",
        "as a language model",
        "i cannot see the image",
        "i can't see the image",
        "the reference answer",
        "the provided answer",
    )
    duplicate_similarity: float = 0.9  # of two samples' words, over the same pictures; 1 = equal


# The parts of the model: the names at the top of its parameters.
COMPONENTS = ("vision_tower", "projector", "image_newline", "language_model")
REMATS = ("full", "offload", "attention", "matmuls")
MOMENTS = ("float32", "bfloat16")
STAGES = ("language", "vision", "warmup", "alignment", "joint", "annealing")  # in order; then BPO


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "run"  # names the default work folder and the report
    seed: int = 0
    init_from: str = ""  # folder of a converted checkpoint to start from; "" = random weights
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    world: WorldConfig = WorldConfig()
    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    language: StageConfig = (
        StageConfig()
    )  # text only; where no pretrained language model is at hand
    vision: StageConfig = StageConfig()  # the tower alone; where no pretrained tower is at hand
    warmup: StageConfig = StageConfig()  # the paper's stage 1, and so on
    alignment: StageConfig = StageConfig()
    joint: StageConfig = StageConfig()
    curation: CurationConfig = CurationConfig()
    annealing: StageConfig = StageConfig()
    bpo: BPOConfig = BPOConfig()
    generate: GenerateConfig = GenerateConfig()
    eval_questions: int = 400  # of a topic of the small world, in the report; 0 = none
    workers: int = 4  # threads that read records and decode pictures
    log_every: int = 10
    checkpoint_every: int = 200


def to_config_dict(config) -> ml_collections.ConfigDict:
    """Dataclass -> ConfigDict with every field."""
    out = ml_collections.ConfigDict()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif isinstance(value, dict):
            group = {
                k: to_config_dict(v) if dataclasses.is_dataclass(v) else v for k, v in value.items()
            }
            value = ml_collections.ConfigDict(group)
        out[field.name] = value
    return out


def from_config_dict(cls, values, path: str = "config"):
    """ConfigDict (or dict) -> dataclass `cls`, every key and type checked.

    Raises:
      ConfigError: a key that `cls` lacks, or a value of another type than the field's.
    """
    _expect_group(values, path)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in dict(values).items():
        if key not in fields:
            raise _unknown(cls, key, path)
        kwargs[key] = _convert(hints[key], value, f"{path}.{key}")
    return cls(**kwargs)


def _expect_group(value, path: str):
    if not isinstance(value, (dict, ml_collections.ConfigDict)):
        raise ConfigError(f"{path} takes a group of settings, not {value!r}")


def check_overrides(argv: list[str]):
    """Check `--config.a.b=value` arguments before ml_collections sees them: its errors do not
    suggest.

    Raises:
      ConfigError: no such setting, or a value that is not of its type.
    """
    for name, has_value, text in (arg.lstrip("-").partition("=") for arg in argv):
        keys = name.split(".")
        if keys[0] != "config" or len(keys) == 1:
            continue
        kind = Config
        for depth, key in enumerate(keys[1:], 1):
            if getattr(kind, "__origin__", None) is dict:  # of topics or sources: any name
                kind = kind.__args__[1]
                continue
            if not dataclasses.is_dataclass(kind):
                break
            hints = typing.get_type_hints(kind)
            if key not in hints:
                raise _unknown(kind, key, ".".join(keys[:depth]))
            kind = hints[key]
        if dataclasses.is_dataclass(kind):
            raise ConfigError(f"{name} is a group: {', '.join(typing.get_type_hints(kind))}")
        if kind in (int, float) and has_value:
            try:
                kind(text)
            except ValueError:
                raise ConfigError(f"{name} takes {kind.__name__}, not {text!r}") from None


def _unknown(cls, key: str, path: str) -> ConfigError:
    """The error for a setting that `cls` does not have, with the nearest one it has."""
    names = [field.name for field in dataclasses.fields(cls)]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.4) or names
    return ConfigError(f"{path}.{key} is not a setting; did you mean {path}.{near[0]}?")


def _convert(kind, value, path: str):
    """`value` as the field type `kind`, or ConfigError."""
    if dataclasses.is_dataclass(kind):
        return from_config_dict(kind, value, path)
    if isinstance(kind, types.GenericAlias) and kind.__origin__ is dict:
        _expect_group(value, path)
        return {k: _convert(kind.__args__[1], v, f"{path}.{k}") for k, v in dict(value).items()}
    if isinstance(kind, types.GenericAlias) and kind.__origin__ is tuple:
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"{path} takes a tuple, not {value!r}")
        return tuple(_convert(kind.__args__[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{path} takes {kind.__name__}, not {type(value).__name__} {value!r}")
    return value
