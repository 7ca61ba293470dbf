"""Checkpoints made with transformers' own classes, small and awkward, for the parity tests."""

import dataclasses
import json
import os
import pathlib

import numpy as np
import torch
from helpers import picture
from safetensors.numpy import load_file, save_file
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from r4b_jax.data.tokenizer import Tokenizer
from r4b_jax.models import convert

SIDE = 14
GRID = [[SIDE * i, SIDE * j] for i in range(1, 5) for j in range(1, 5)]
TEXT = dict(
    hidden_size=20,
    intermediate_size=26,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=320,
    rope_parameters={"rope_type": "default", "rope_theta": 700.0},
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
)
VISION = dict(
    hidden_size=18,
    intermediate_size=22,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=SIDE,
    patch_size=4,
    layer_norm_eps=1e-5,
)
MEAN, STD = [0.5, 0.4, 0.5], [0.5, 0.5, 0.3]


class RProjector(torch.nn.Module):
    """R-4B's projector as its model card and vLLM's `rvl` have it: LayerNorm first."""

    def __init__(self, config):
        super().__init__()
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        self.pre_norm = torch.nn.LayerNorm(width, eps=1e-6)
        self.linear_1, self.linear_2 = torch.nn.Linear(width, out), torch.nn.Linear(out, out)
        self.act = torch.nn.GELU()

    def forward(self, x):
        return self.linear_2(self.act(self.linear_1(self.pre_norm(x))))


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """No zero bias, no unit scale, weights large enough that every part shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
            if "embed" in name:
                scale = 0.4
            p.copy_(noise * scale + (p.ndim == 1 and "norm" in name and "bias" not in name))
    return model.eval()


def whole(
    tokenizer: Tokenizer, *, pre_norm=True, tied=True, layer=-1, dtype=torch.float32, **changes
):
    """R-4B (or, without `pre_norm`, LLaVA-OneVision with a Qwen3 text model), random weights."""
    config = LlavaOnevisionConfig(
        text_config=dict(model_type="qwen3", tie_word_embeddings=tied, **TEXT),
        vision_config=dict(model_type="siglip_vision_model", vision_use_head=False, **VISION),
        image_token_index=tokenizer.image_id,
        video_token_index=319,
        vision_feature_layer=layer,
        image_grid_pinpoints=GRID,
        vision_aspect_ratio="anyres_max_4",
        tie_word_embeddings=tied,
        **changes,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    if pre_norm:
        model.model.multi_modal_projector = RProjector(config)
    model = randomise(model)
    model.tie_weights()
    return model.to(dtype)


def respell(name: str) -> str:
    """A tensor's name in the layout of files saved by transformers 4.52 and later."""
    return convert.released_name(convert.canonical(name))


def save(model, tokenizer: Tokenizer, folder: pathlib.Path, *, released: bool, shards: int = 1):
    """A Hugging Face folder: weights, config, preprocessor, tokenizer, template.

    Args:
      released: R-4B's own spelling of names and model type; else transformers' of today.
      shards: number of files.
    """
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if released:
        tensors = {respell(name): value for name, value in tensors.items()}
        config |= {"model_type": "R", "architectures": ["RForConditionalGeneration"]}
        (folder / "config.json").write_text(json.dumps(config))
    if shards > 1:
        os.remove(folder / "model.safetensors")
        names, weight_map = sorted(tensors), {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[i::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    image_processor().save_pretrained(folder)
    tokenizer.save(str(folder))
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    return folder


def save_parts(tokenizer: Tokenizer, folder: pathlib.Path):
    """Qwen3 alone and SigLIP alone; returns (text folder, tower folder, text model, tower)."""
    text = randomise(Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, **TEXT)), 1)
    tower = randomise(SiglipVisionModel(SiglipVisionConfig(**VISION)), 2)
    text.save_pretrained(folder / "text")
    tower.save_pretrained(folder / "tower")
    spec = json.loads(tokenizer.json)
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "<image>"]
    (folder / "text" / "tokenizer.json").write_text(json.dumps(spec))
    return folder / "text", folder / "tower", text, tower


def image_processor() -> LlavaOnevisionImageProcessorPil:
    return LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=GRID,
        image_mean=MEAN,
        image_std=STD,
    )


def torch_inputs(tokens, pictures) -> dict:
    """What transformers' model takes for one prompt."""
    inputs = {"input_ids": torch.tensor(np.asarray(tokens)[None])}
    if pictures:
        batch = image_processor()([pictures], return_tensors="pt")
        inputs |= {k: batch[k] for k in ("pixel_values", "image_sizes", "batch_num_images")}
    return inputs


@dataclasses.dataclass
class Case:
    """One prompt of the parity tests."""

    name: str
    sizes: tuple[tuple[int, int], ...]  # (height, width) of its pictures
    text: str

    @property
    def pictures(self) -> list:
        from PIL import Image

        made = [Image.fromarray(picture(7 + i, 9)) for i in range(len(self.sizes))]
        return [p.resize((w, h), Image.Resampling.BICUBIC) for p, (h, w) in zip(made, self.sizes)]


CASES = [
    Case("text", (), "123456789\nRead the top row."),
    Case("one tile", ((SIDE, SIDE),), "What is shown?"),
    Case("four tiles", ((25, 27),), "Is there a red shape?"),
    Case("nine tiles and more", ((56, 50),), "Sum?"),
    Case("tall", ((70, 13),), "Read the middle row."),
    Case("wide", ((11, 90),), "Read the bottom row."),
    Case("two pictures", ((30, 20), (17, 40)), "Which is larger?"),
]
