"""Hugging Face's config.json to ModelConfig and back: every key is used, harmless, or refused by
name."""

from r4b_jax.config import LanguageConfig, ModelConfig, VisionConfig
from r4b_jax.models.convert import CheckpointError

# What transformers takes for a key that a config leaves out (Qwen3Config, SiglipVisionConfig,
# LlavaOnevisionConfig; transformers 4.57 and 5.23).
TEXT_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "intermediate_size": 22016,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
VISION_DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-6,
}
# Values the model computes with as they are; any other is refused.
FIXED = {
    "text_config": {
        "model_type": ("qwen3",),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "rope_scaling": (None,),
        "sliding_window": (None,),  # unless use_sliding_window is false
        "use_sliding_window": (False,),
    },
    "vision_config": {
        "model_type": ("siglip_vision_model", "siglip2_vision_model"),
        "hidden_act": ("gelu_pytorch_tanh",),
        "num_channels": (3,),
    },
    "config": {
        "vision_feature_select_strategy": ("full",),
        "projector_hidden_act": ("gelu",),
        "multimodal_projector_bias": (True,),
        "use_image_newline_parameter": (True,),
    },
    "preprocessor_config": {
        "resample": (3,),  # bicubic
        "rescale_factor": (1 / 255, 0.00392156862745098),
        **{
            f"do_{name}": (True, None) for name in ("resize", "rescale", "normalize", "convert_rgb")
        },
        "do_pad": (True, None),
    },
}
# Keys that change nothing in inference: training, caching, bookkeeping, and tokens, which are the
# tokenizer's business.
HARMLESS = set(
    """architectures attention_dropout auto_map bos_token_id dtype eos_token_id
    chunk_size_feed_forward ignore_index image_seq_length image_token_index image_token_id
    initializer_range initializer_factor is_encoder_decoder layer_types max_position_embeddings
    max_window_layers model_type num_additional_image_tokens output_attentions
    output_hidden_states pad_token_id projection_dim return_dict tokenizer_class torch_dtype
    transformers_version use_cache vision_use_head video_token_id video_token_index _name_or_path
    _attn_implementation_autoset vocab_size num_image_tokens text_config vision_config
    tie_word_embeddings""".split()
)


def model_config(config: dict, preprocessor: dict | None, has_norm: bool = True) -> ModelConfig:
    """The model a Hugging Face folder describes.

    Args:
      config: config.json of R-4B or LLaVA-OneVision with Qwen3; or {"text_config": ...,
        "vision_config": ...} put together from its parts.
      preprocessor: preprocessor_config.json, or None: SigLIP's pixels, mean and std 1/2.
      has_norm: whether the projector's `pre_norm` is among the tensors.
    Raises:
      CheckpointError: a key or a value that this model has no part for, by name.
    """
    text, vision = config["text_config"], config["vision_config"]
    _refuse(text, "text_config", {*TEXT_DEFAULTS, "rope_theta", "rope_parameters"})
    _refuse(vision, "vision_config", set(VISION_DEFAULTS))
    ours = {"vision_feature_layer", "vision_aspect_ratio", "image_grid_pinpoints"}
    _refuse(config, "config", ours)
    language = _language(text, config.get("tie_word_embeddings"))
    tower = _tower(vision, config, preprocessor)
    return ModelConfig(vision=tower, language=language, projector_norm=has_norm)


def _refuse(values: dict, where: str, used: set[str]):
    """Raise for what is neither used, nor fixed and as it must be, nor harmless."""
    fixed = FIXED[where]
    for key, value in values.items():
        if key in fixed and value not in fixed[key]:
            if key == "sliding_window" and not values.get("use_sliding_window", False):
                continue
            raise CheckpointError(
                f"{where}.{key} = {value!r} is not supported, only {fixed[key][0]!r}"
            )
        if key not in fixed and key not in used and key not in HARMLESS:
            raise CheckpointError(
                f"{where}.{key} = {value!r} is not known, so it cannot be honoured"
            )


def _language(text: dict, tied) -> LanguageConfig:
    rope = text.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"text_config.rope_parameters = {rope!r} is not supported")
    values = TEXT_DEFAULTS | text
    return LanguageConfig(
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"] or values["num_attention_heads"],
        head_dim=values["head_dim"] or values["hidden_size"] // values["num_attention_heads"],
        mlp_dim=values["intermediate_size"],
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 10000.0))),
        norm_eps=float(values["rms_norm_eps"]),
        tied_head=bool(values["tie_word_embeddings"] if tied is None else tied),
    )


def _tower(vision: dict, config: dict, preprocessor: dict | None) -> VisionConfig:
    values = VISION_DEFAULTS | vision
    layer, depth = config.get("vision_feature_layer", -1), values["num_hidden_layers"]
    if not isinstance(layer, int):
        raise CheckpointError(f"vision_feature_layer = {layer!r} is not supported, only one layer")
    layers = layer if layer >= 0 else depth + 1 + layer  # 0 would be the embeddings
    if not 0 < layers <= depth:
        raise CheckpointError(f"vision_feature_layer = {layer} is none of {depth} layers")
    aspect = config.get("vision_aspect_ratio", "anyres_max_9")
    if not aspect.startswith("anyres_max_") or not aspect[11:].isdigit():
        raise CheckpointError(f"vision_aspect_ratio = {aspect!r} is not supported: anyres_max_N")
    pixels = _pixels(preprocessor or {}, values["image_size"])
    pinpoints = config.get("image_grid_pinpoints")
    if pinpoints is None:
        pinpoints = VisionConfig().grid_pinpoints
    ours = (preprocessor or {}).get("image_grid_pinpoints", pinpoints)
    if [list(p) for p in ours] != [list(p) for p in pinpoints]:
        raise CheckpointError(
            "image_grid_pinpoints of config.json and preprocessor_config.json are different"
        )
    tower = VisionConfig(
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        width=values["hidden_size"],
        num_layers=layers,
        num_heads=values["num_attention_heads"],
        mlp_dim=values["intermediate_size"],
        norm_eps=float(values["layer_norm_eps"]),
        grid_pinpoints=tuple(tuple(point) for point in pinpoints),
        max_grid_tiles=int(aspect[11:]),
        **pixels,
    )
    if not tower.grid_is_whole_tiles:
        raise CheckpointError(
            f"image_grid_pinpoints are no whole tiles of {tower.image_size} pixels: {pinpoints}"
        )
    return tower


def _pixels(preprocessor: dict, image_size: int) -> dict:
    """image_mean and image_std; the rest of the preprocessor must be what data/images.py does."""
    for key, allowed in FIXED["preprocessor_config"].items():
        value = preprocessor.get(key, allowed[0])
        if value not in allowed:
            raise CheckpointError(
                f"preprocessor_config.{key} = {value!r} is not supported, only {allowed[0]!r}"
            )
    crops = "crop_size" if preprocessor.get("do_center_crop") else "size"
    for name in {"size", crops}:  # a crop to the tile's own size takes nothing away
        size = preprocessor.get(name, {"height": image_size, "width": image_size})
        if set(size.values()) != {image_size}:
            raise CheckpointError(
                f"preprocessor_config.{name} = {size!r}, and the tower takes {image_size} pixels"
            )
    return {
        name: tuple(float(x) for x in preprocessor.get(name, (0.5, 0.5, 0.5)))
        for name in ("image_mean", "image_std")
    }


def released_config(config: ModelConfig, image_token: int) -> dict:
    """config.json of a model that did not come from Hugging Face: R-4B's, or LLaVA-OneVision's
    where the projector has no LayerNorm.

    Raises:
      CheckpointError: the model has what such a config cannot say.
    """
    if config.projector_norm and config.projector_norm_eps != 1e-6:
        raise CheckpointError(
            f"projector_norm_eps = {config.projector_norm_eps} cannot be exported: R-4B's is 1e-6"
        )
    vision, language = config.vision, config.language
    name, architecture = "R", "RForConditionalGeneration"
    if not config.projector_norm:
        name, architecture = "llava_onevision", "LlavaOnevisionForConditionalGeneration"
    return {
        "architectures": [architecture],
        "model_type": name,
        "image_token_index": image_token,
        "image_grid_pinpoints": [list(point) for point in vision.grid_pinpoints],
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": language.tied_head,
        "vision_aspect_ratio": f"anyres_max_{vision.max_grid_tiles}",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {
            "model_type": "qwen3",
            "attention_bias": False,
            "hidden_act": "silu",
            "vocab_size": language.vocab_size,
            "hidden_size": language.width,
            "num_hidden_layers": language.num_layers,
            "num_attention_heads": language.num_heads,
            "num_key_value_heads": language.num_kv_heads,
            "head_dim": language.head_dim,
            "intermediate_size": language.mlp_dim,
            "rope_theta": language.rope_theta,
            "rms_norm_eps": language.norm_eps,
            "tie_word_embeddings": language.tied_head,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.mlp_dim,
            "layer_norm_eps": vision.norm_eps,
            "vision_use_head": False,
        },
    }
