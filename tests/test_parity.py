"""The same numbers as transformers (5.23.0, torch 2.13.0) on checkpoints made from its own classes.

float32 on both sides; differences are relative to the norm of transformers' values.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from reference import CASES, torch_inputs

from r4b_jax.config import ModelConfig
from r4b_jax.data import images
from r4b_jax.data.examples import Example
from r4b_jax.decoding.chat import load
from r4b_jax.decoding.generate import forced_array, generate
from r4b_jax.decoding.parity import logits
from r4b_jax.decoding.prompts import pad_prompts
from r4b_jax.decoding.sampling import Sampling
from r4b_jax.models import r4b
from r4b_jax.models.attention import attend, rope_tables

TOLERANCE = 1e-4
KINDS = {
    "R-4B": dict(),
    "R-4B, second last layer": dict(layer=-2),
    "LLaVA-OneVision, untied head": dict(pre_norm=False, tied=False),
}
NEW = 64


@dataclasses.dataclass
class Pair:
    """One model on both sides."""

    ours: object
    theirs: torch.nn.Module

    def prompt(self, case) -> Example:
        return self.ours.prompt([(case.text, case.pictures, None)])


@pytest.fixture(scope="module", params=KINDS, ids=str)
def pair(request, tokenizer, tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = reference.whole(tokenizer, **KINDS[request.param])
    reference.save(theirs, tokenizer, folder, released=request.param.startswith("R-4B"), shards=2)
    return Pair(load(folder), theirs)


def apart(ours, theirs) -> float:
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_those_of_transformers(pair, case):
    """Text, 1, 4 and more than 9 tiles of odd proportions, two pictures: every token's logits."""
    prompt = pair.prompt(case)
    with torch.no_grad():
        theirs = pair.theirs(**torch_inputs(prompt.tokens, case.pictures)).logits[0]
    assert apart(logits(pair.ours, prompt), theirs) < TOLERANCE


def answers(pair: Pair, prompts: list[Example], length: int) -> np.ndarray:
    """64 greedy tokens of each prompt from one batch, nothing banned: int32[Q, 64]."""
    ids = dataclasses.replace(pair.ours.ids, never=(), end=-1)
    padded = pad_prompts(prompts, length, ids.pad, pair.ours.config.vision.num_patches)
    keys = jax.random.split(jax.random.key(0), (len(prompts), 1))
    forced = forced_array([[]], len(prompts))
    out = generate(
        pair.ours.config,
        pair.ours.params,
        padded,
        forced,
        keys,
        ids,
        max_new_tokens=NEW,
        sampling=Sampling.of(),
    )
    return np.asarray(out.tokens[:, 0])


def test_64_greedy_tokens_are_those_of_transformers_one_by_one_and_in_a_padded_batch(pair):
    """transformers alone and without padding; here all in one batch, padded. Cached on both sides,
    and ours without a cache: the argmax of the plain forward at each place."""
    cases = [case for case in CASES if len(case.sizes) < 2]
    prompts = [pair.prompt(case) for case in cases]
    ours = answers(pair, prompts, 96)
    for case, prompt, tokens in zip(cases, prompts, ours):
        settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        with torch.no_grad():
            theirs = pair.theirs.generate(**torch_inputs(prompt.tokens, case.pictures), **settings)
        np.testing.assert_array_equal(tokens, theirs[0, len(prompt.tokens) :].numpy(), case.name)
        plain = with_tokens(prompt, tokens)
        place = len(prompt.tokens) - 1
        uncached = logits(pair.ours, plain)[place:-1].argmax(-1)
        np.testing.assert_array_equal(uncached, tokens)


def with_tokens(prompt: Example, tokens: np.ndarray) -> Example:
    def longer(x):
        return np.concatenate([x, np.zeros((len(tokens), *x.shape[1:]), x.dtype)])

    count = np.arange(len(prompt.tokens) + len(tokens), dtype=np.int32)
    return dataclasses.replace(
        prompt,
        tokens=np.concatenate([prompt.tokens, tokens]),
        positions=count,
        branch_ids=np.zeros_like(count),
        predecessors=np.maximum(count - 1, 0),
        loss_weights=longer(prompt.loss_weights),
        plan_index=longer(prompt.plan_index),
        plan_weight=longer(prompt.plan_weight),
    )


def test_a_left_padded_batch_of_transformers_gives_the_same_tokens(pair):
    """They pad on the left with a mask, we on the right: neither padding may be seen."""
    cases = [case for case in CASES if len(case.sizes) == 1][:3]
    prompts = [pair.prompt(case) for case in cases]
    length, pad = max(len(p.tokens) for p in prompts), pair.ours.ids.pad
    ids = np.full((len(prompts), length), pad)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt.tokens) :] = prompt.tokens
        mask[row, length - len(prompt.tokens) :] = 1
    pixels = reference.image_processor()([case.pictures for case in cases], return_tensors="pt")
    names = ("pixel_values", "image_sizes", "batch_num_images")
    with torch.no_grad():
        theirs = pair.theirs.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            **{name: pixels[name] for name in names},
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
        )[:, length:]
    np.testing.assert_array_equal(answers(pair, prompts, length + 5), theirs.numpy())


# Module by module


def test_the_tower_and_the_projector(pair):
    """Features of every patch, before and after the projector."""
    tiles = np.random.default_rng(0).integers(0, 256, (2, 14, 14, 3), np.uint8)
    vision = pair.ours.config.vision
    pixels = (tiles / 255 - np.array(vision.image_mean)) / np.array(vision.image_std)
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
    model = r4b.bind(pair.ours.config, pair.ours.params)
    theirs = pair.theirs.model
    with torch.no_grad():
        states = theirs.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = states[pair.theirs.config.vision_feature_layer]
        assert apart(jax.jit(model.vision_tower)(tiles), features) < 1e-5
        projected = theirs.multi_modal_projector(features)
        assert apart(jax.jit(model.projector)(jnp.asarray(features.numpy())), projected) < 1e-5


def test_attention_and_mlp_of_every_layer(pair):
    """A layer at a time, so that a failure above says where."""
    config: ModelConfig = pair.ours.config
    x = np.random.default_rng(1).standard_normal((1, 9, config.language.width), np.float32)
    causal = np.tril(np.ones((1, 9, 9), bool))
    positions = np.arange(9)[None]
    rope = rope_tables(jnp.asarray(positions), config.language.head_dim, config.language.rope_theta)
    text = pair.theirs.model.language_model
    model = r4b.bind(config, pair.ours.params)

    def run(layer, x):
        attention, _ = layer.self_attn(x, rope, lambda q, k, v: (attend(q, k, v, causal), None))
        return x, (attention, layer.mlp(x))

    _, (attention, mlp) = jax.jit(lambda x: model.language_model.layers(x, run))(x)
    mask = torch.where(torch.tensor(causal)[None], 0.0, -1e9)
    with torch.no_grad():
        tensor = torch.tensor(x)
        tables = text.rotary_emb(tensor, torch.tensor(positions))
        for i, layer in enumerate(text.layers):
            theirs, _ = layer.self_attn(tensor, position_embeddings=tables, attention_mask=mask)
            assert apart(attention[i], theirs) < 1e-5
            assert apart(mlp[i], layer.mlp(tensor)) < 1e-5


def test_pixels_of_a_whole_prompt(pair):
    """What the cases above stand on: tiles equal the processor's, padding tiles left out."""
    for case in CASES[1:]:
        prepared = images.prepare(case.pictures, pair.ours.config.vision)
        theirs = torch_inputs([0], case.pictures)["pixel_values"]
        assert [len(p.tiles) for p in prepared] == [len(x) for x in theirs]
