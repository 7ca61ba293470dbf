"""What several test files share: the smallest awkward sizes, and sequences one to a row."""

import jax
import numpy as np

from r4b_jax import config as c
from r4b_jax.data import images
from r4b_jax.data.examples import Example, empty_batch, encode, encode_prompt, place
from r4b_jax.data.samples import Sample

# Every class of settings.
CLASSES = (
    c.VisionConfig,
    c.LanguageConfig,
    c.ModelConfig,
    c.MeshConfig,
    c.WorldConfig,
    c.SourceConfig,
    c.StageConfig,
    c.BPOConfig,
    c.GenerateConfig,
    c.EndpointConfig,
    c.CurationConfig,
    c.Config,
)
# No two sizes alike, heads that are no power of two, a theta that is not the default.
MODEL = c.ModelConfig(
    vision=c.VisionConfig(
        image_size=8,
        patch_size=4,
        width=18,
        num_layers=2,
        num_heads=3,
        mlp_dim=22,
        norm_eps=1e-5,
        grid_pinpoints=(),
    ),
    language=c.LanguageConfig(
        vocab_size=300,
        width=20,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=26,
        rope_theta=700.0,
        norm_eps=1e-5,
    ),
    projector_norm_eps=1e-5,
    compute_dtype="float32",
    remat="matmuls",
    loss_chunk=64,
)
CONFIG = c.Config(
    name="test",
    model=MODEL,
    world=c.WorldConfig(vocab_size=300),
    sources={"world": c.SourceConfig(path="world")},
    generate=c.GenerateConfig(prompt_len=60, max_new_tokens=10, batch_size=4),
    bpo=c.BPOConfig(topics={"arithmetic": 1.0}, packed_len=96, packed_tiles=2, micro_rows=2, g=2),
)


def picture(seed: int, size: int = 8) -> np.ndarray:
    """A picture of noise, uint8[size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def questions() -> list[Sample]:
    """Three questions whose prompts differ in length: with a picture, without, with a picture."""
    return [
        Sample.ask("maths", picture(1), "Sum?", "7", "3+4=7"),
        Sample.ask("arithmetic", None, "123\nWhat is the sum of the top row?", "6", "1+2=3+3=6"),
        Sample.ask("ocr", picture(2), "Read the top row.", "12", "top 12"),
    ]


def with_reply(tokenizer, question: Sample, reply, weights=None) -> Example:
    """A question's prompt and the given ids after `<think>`, as one plain sequence."""
    prompt = encode_prompt(tokenizer, MODEL.vision, question)
    tokens = np.concatenate([prompt.tokens, np.asarray(reply, np.int32)])
    loss = np.zeros(len(tokens), np.float32)
    loss[len(prompt.tokens) :] = 1 if weights is None else weights
    pictures = images.prepare(question.images, MODEL.vision)
    return encode(tokenizer, MODEL.vision, tokens, loss, pictures)


def one_a_row(examples: list[Example], length: int, pad_id: int):
    """A Batch with example i alone in row i."""
    tiles = max(len(e.tiles) for e in examples)
    batch = empty_batch(len(examples), length, tiles, MODEL.vision, pad_id)
    for row, example in enumerate(examples):
        place(batch, row, 0, 0, 1, example, MODEL.vision.num_patches)
    return batch


def assert_trees_close(a, b, tolerance: float):
    """Equal leaf by leaf, up to a share of the leaf's largest number (of 0.1 at the least)."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        limit = tolerance * max(float(np.abs(x).max()), 0.1)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=limit, err_msg=name)
