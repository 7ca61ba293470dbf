"""Logits of a Hugging Face folder here and in transformers. Needs torch and transformers, which the
rest of the package does not."""

import dataclasses
import os

import jax
import numpy as np

from r4b_jax.data.examples import Example, empty_batch, place
from r4b_jax.decoding.chat import Model, load
from r4b_jax.models import convert, r4b, released


def compare(path: str, image: str, question: str) -> float:
    """|ours - theirs| / |theirs| over all logits of a prompt with one picture, float32 on both
    sides; pixels by each side's own processing."""
    import torch
    from transformers.image_utils import load_image
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    model = load(path, "float32")
    prompt = model.prompt([(question, [image], None)])
    ours = logits(model, prompt)
    processor = LlavaOnevisionImageProcessorPil.from_pretrained(path)
    pixels = processor([load_image(image)], return_tensors="pt")
    reference = torch_model(released.read_folder(path))
    with torch.no_grad():
        theirs = reference(
            input_ids=torch.tensor(prompt.tokens[None].astype(np.int64)),
            pixel_values=pixels["pixel_values"],
            image_sizes=pixels["image_sizes"],
        ).logits[0]
    theirs = theirs.float().numpy()
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def logits(model: Model, prompt: Example) -> np.ndarray:
    """float32[T, V] after every token of a prompt."""
    vision = model.config.vision
    batch = empty_batch(1, len(prompt.tokens), len(prompt.tiles), vision, model.ids.pad)
    place(batch, 0, 0, 0, 1, prompt, vision.num_patches)
    config = dataclasses.replace(model.config, compute_dtype="float32")

    @jax.jit
    def run(params, batch):
        bound = r4b.bind(config, params)
        return bound.language_model.logits(bound.hidden(batch))

    return np.asarray(run(model.params, batch)[0])


def torch_model(folder: released.Folder):
    """transformers' LLaVA-OneVision with Qwen3, float32, from a folder in any spelling; with R-4B's
    LayerNorm before the projector where the folder has one."""
    import torch
    from safetensors import safe_open
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = {
        k: v for k, v in folder.config.items() if k not in ("model_type", "auto_map", "dtype")
    }
    config = LlavaOnevisionConfig(**config)
    model = LlavaOnevisionForConditionalGeneration(config)
    if "projector.pre_norm.weight" in folder.tensors:
        projector = model.model.multi_modal_projector
        norm = torch.nn.LayerNorm(config.vision_config.hidden_size, eps=1e-6)
        projector.linear_1 = torch.nn.Sequential(norm, projector.linear_1)
    state = {}
    for name in model.state_dict():
        wanted = convert.canonical(name)
        wanted = wanted.replace("projector.linear_1.0.", "projector.pre_norm.")
        wanted = wanted.replace("projector.linear_1.1.", "projector.linear_1.")
        if wanted not in folder.tensors and wanted == "language_model.lm_head.weight":
            wanted = "language_model.embed_tokens.weight"
        if wanted not in folder.tensors:
            continue  # the tower's last norm and head, where the folder leaves them out
        tensor = folder.tensors[wanted]
        with safe_open(os.path.join(folder.path, tensor.file), "pt") as shard:
            state[name] = shard.get_tensor(tensor.name).float()
    model.load_state_dict(state, strict=False)
    return model.float().eval()
