"""Hugging Face checkpoints in and out: bit for bit, or refused by name."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import reference
import torch
from safetensors.numpy import load_file, save_file

from r4b_jax import config as c
from r4b_jax import convert as front
from r4b_jax import main
from r4b_jax.common.checkpoint import restore_model
from r4b_jax.decoding.chat import load
from r4b_jax.models import convert, released
from r4b_jax.models.convert import CheckpointError


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """R-4B in three shards, its own spelling, with a tower longer than what is read of it."""
    model = reference.whole(tokenizer, layer=-2)
    return reference.save(model, tokenizer, tmp_path_factory.mktemp("hf"), released=True, shards=3)


def command(*args):
    """`python -m r4b_jax.convert ...` in this process."""
    args = front.parser().parse_args([str(arg) for arg in args])
    args.run(args)


def same_files(a, b):
    names = sorted(os.listdir(a))
    assert sorted(os.listdir(b)) == names
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("kind", ["R-4B", "LLaVA-OneVision", "bfloat16", "float16"])
def test_import_then_export_is_bitwise_the_original(kind, tokenizer, tmp_path):
    """Files, names, shards, dtypes, and what stands beside the weights: someone will diff them."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind, torch.float32)
    whole = dict(pre_norm=False, tied=False) if kind == "LLaVA-OneVision" else dict(layer=-2)
    model = reference.whole(tokenizer, dtype=dtype, **whole)
    shards = 1 if kind == "float16" else 3
    released_spelling = kind != "LLaVA-OneVision"
    (source := tmp_path / "hf").mkdir()
    reference.save(model, tokenizer, source, released=released_spelling, shards=shards)
    command("import", source, tmp_path / "checkpoint")
    command("export", tmp_path / "checkpoint", tmp_path / "back")
    same_files(source, tmp_path / "back")
    _, params = restore_model(tmp_path / "checkpoint")
    expected = "bfloat16" if kind == "bfloat16" else "float32"
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {expected}


def test_both_spellings_of_the_released_checkpoint_are_the_same_model(tokenizer, tmp_path):
    """Files from before and after transformers 4.52."""
    model = reference.whole(tokenizer)
    params = []
    for spelling in (True, False):
        (source := tmp_path / str(spelling)).mkdir()
        reference.save(model, tokenizer, source, released=spelling)
        params.append(load(source).params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *params)))


def test_a_tied_heads_copy_is_checked_and_comes_back(folder, tmp_path):
    """Files may hold the head although it is the table; another head would be another model."""
    source = shutil.copytree(folder, tmp_path / "hf")
    shard = sorted(source.glob("*.safetensors"))[0]
    index = json.loads((source / released.INDEX).read_text())
    file = index["weight_map"]["model.language_model.embed_tokens.weight"]
    table = load_file(source / file)["model.language_model.embed_tokens.weight"]
    for change, fits in ((0, True), (1, False)):
        tensors = load_file(folder / shard.name) | {"lm_head.weight": table + change}
        save_file(tensors, shard, metadata={"format": "pt"})
        index["weight_map"]["lm_head.weight"] = shard.name
        (source / released.INDEX).write_text(json.dumps(index))
        if fits:
            command("import", source, tmp_path / "checkpoint")
            command("export", tmp_path / "checkpoint", tmp_path / "back")
            same_files(source, tmp_path / "back")
        else:
            with pytest.raises(CheckpointError, match="lm_head"):
                command("import", source, tmp_path / "other")


def test_parts_make_a_model_with_a_random_projector(tokenizer, tmp_path):
    """Where stage 1 starts: Qwen3 and SigLIP as they are, the projector random, an image token."""
    text, tower, theirs, vision = reference.save_parts(tokenizer, tmp_path)
    command("import", text, tower, tmp_path / "checkpoint")
    command("export", tmp_path / "checkpoint", tmp_path / "whole")
    model = load(tmp_path / "checkpoint")
    ids = np.array([[20, 30, 40, 50]])
    from r4b_jax.data.examples import encode
    from r4b_jax.decoding.parity import logits

    prompt = encode(model.tokenizer, model.config.vision, ids[0], np.zeros(4), [])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits[0].numpy()
    np.testing.assert_allclose(logits(model, prompt), expected, atol=1e-4)
    bound = model.params["vision_tower"]["position_embedding"]
    np.testing.assert_array_equal(bound, vision.embeddings.position_embedding.weight.detach())
    assert model.tokenizer.image_id == tokenizer.image_id  # the next free id, as it happens
    again = load(tmp_path / "whole").params
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, model.params, again)))
    assert np.ptp(model.params["projector"]["linear_1"]["kernel"]) > 0
    with pytest.raises(CheckpointError, match="one Qwen3 and one SigLIP"):
        command("import", text, tmp_path / "half")


def test_the_towers_own_processor_gives_mean_and_std_alone(tokenizer, tmp_path):
    """SigLIP2's resizes bilinearly to a square; what R-4B does with pictures is AnyRes."""
    text, tower, _, _ = reference.save_parts(tokenizer, tmp_path)
    own = {"resample": 2, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.5, 0.5], "size": {}}
    (tower / "preprocessor_config.json").write_text(json.dumps(own))
    (tower / "special_tokens_map.json").write_text("{}")
    command("import", text, tower, tmp_path / "checkpoint")
    model = load(tmp_path / "checkpoint")
    assert model.config.vision.image_mean == (0.4, 0.5, 0.6)
    beside = os.listdir(tmp_path / "checkpoint" / "hugging_face")
    assert "chat_template.jinja" in beside and "special_tokens_map.json" not in beside


def test_the_image_processor_may_lie_in_the_processors_file(folder, tmp_path):
    """Where transformers 5 puts it; unread, every pixel would be off by the mean."""
    source = shutil.copytree(folder, tmp_path / "hf")
    preprocessor = json.loads((source / "preprocessor_config.json").read_text())
    os.remove(source / "preprocessor_config.json")
    (source / "processor_config.json").write_text(json.dumps({"image_processor": preprocessor}))
    model, _ = released.describe([released.read_folder(str(source))])
    assert list(model.vision.image_mean) == reference.MEAN


def tampered(folder, target, how):
    """A copy of the folder with one thing wrong."""
    shutil.copytree(folder, target)
    shard = sorted(target.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    index = json.loads((target / released.INDEX).read_text())
    name = next(n for n in tensors if n.endswith("q_proj.weight") and "language" in n)
    if how == "missing key":
        del tensors[name], index["weight_map"][name]
    elif how == "promised key":
        del tensors[name]
    elif how == "extra key":
        name = "model.language_model.layers.0.self_attn.q_proj.bias"
        tensors[name] = np.zeros(3, np.float32)
        index["weight_map"][name] = shard.name
    elif how == "unknown key":
        name = "audio_tower.weight"
        tensors[name] = np.zeros(3, np.float32)
    elif how == "wrong shape":
        tensors[name] = tensors[name][:-1].copy()
    elif how == "wrong dtype":
        tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, shard, metadata={"format": "pt"})
    (target / released.INDEX).write_text(json.dumps(index))
    if how == "missing shard":
        os.remove(shard)
        name = shard.name
    elif how == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-5])
        name = shard.name
    return name


@pytest.mark.parametrize(
    "how",
    [
        "missing key",
        "promised key",
        "extra key",
        "unknown key",
        "wrong shape",
        "wrong dtype",
        "missing shard",
        "truncated shard",
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_before_memory_is_taken(
    how, folder, tmp_path, monkeypatch
):
    """Twenty minutes into a load is too late to hear of the last shard."""
    name = tampered(folder, tmp_path / "hf", how)
    monkeypatch.setattr(convert.Filler, "put", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        command("import", tmp_path / "hf", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


CHANGES = {
    "text_config.model_type": "qwen2",
    "text_config.hidden_act": "gelu",
    "text_config.attention_bias": True,
    "text_config.rope_scaling": {"type": "yarn"},
    "text_config.use_sliding_window": True,
    "text_config.new_trick": 3,
    "vision_config.hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": [-1, -2],
    "vision_aspect_ratio": "square",
    "projector_hidden_act": "relu",
    "multimodal_projector_bias": False,
    "spatial_merge_size": 2,
    "model_type": "llava",
}


@pytest.mark.parametrize("key", CHANGES)
def test_what_the_config_says_is_honoured_or_refused_by_name(key, folder, tmp_path):
    """A key silently ignored is a model silently wrong."""
    shutil.copytree(folder, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    group, _, name = key.rpartition(".")
    (config[group] if group else config)[name] = CHANGES[key]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=name if name != "model_type" else str(CHANGES[key])):
        command("import", tmp_path / "hf", tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "change",
    [
        {"resample": 2},
        {"do_rescale": False},
        {"size": {"height": 20, "width": 20}},
        {"crop_size": {"height": 9, "width": 9}, "do_center_crop": True},
    ],
)
def test_a_preprocessor_of_another_kind_is_refused(change, folder, tmp_path):
    """Its pixels would not be ours."""
    shutil.copytree(folder, tmp_path / "hf")
    path = tmp_path / "hf" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=next(iter(change))):
        released.describe([released.read_folder(str(tmp_path / "hf"))])


def test_what_the_config_says_reaches_the_model(folder):
    """Rope theta, eps, tied head, pinpoints, budget, feature layer, mean, std: none is assumed."""
    model, _ = released.describe([released.read_folder(str(folder))])
    language, vision = model.language, model.vision
    assert (language.rope_theta, language.norm_eps, language.tied_head) == (700.0, 1e-5, True)
    assert (vision.num_layers, vision.norm_eps, vision.max_grid_tiles) == (2, 1e-5, 4)
    assert [list(p) for p in vision.grid_pinpoints] == reference.GRID
    assert (list(vision.image_mean), list(vision.image_std)) == (reference.MEAN, reference.STD)
    assert model.projector_norm


def test_the_full_model_has_the_released_checkpoints_keys_shapes_and_size(tiny):
    """No weights needed: R-4B's own names, as its published config makes transformers name them."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    from r4b_jax.models.hf_config import model_config, released_config

    full = c.ModelConfig()
    published = released_config(full, image_token=151655)
    assert model_config(published, None) == full
    with torch.device("meta"):
        theirs = LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(**{k: v for k, v in published.items() if k != "model_type"})
        )
        theirs.model.multi_modal_projector = reference.RProjector(theirs.config)
    expected = {reference.respell(n): tuple(p.shape) for n, p in theirs.state_dict().items()}
    expected = {n: s for n, s in expected.items() if "post_layernorm" not in n}
    assert expected.pop("lm_head.weight") == (151936, 2560)  # tied
    ours = {convert.released_name(n): shape for n, (_, shape) in convert.slots(full).items()}
    assert ours == expected
    total = sum(int(np.prod(shape)) for shape in ours.values())
    assert total == sum(x.size for x in jax.tree.leaves(convert.abstract(full)))
    tower = 27 * (4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152)
    tower += 588 * 1152 + 1152 + 729 * 1152
    projector = 2 * 1152 + 1152 * 2560 + 2560 + 2560 * 2560 + 2560
    assert total == 4_022_468_096 + tower + projector + 2560


def test_large_models_are_exported_in_shards(tokenizer, tmp_path):
    """From a model with no layout of its own: names as released, no shard above the limit."""
    text, tower, _, _ = reference.save_parts(tokenizer, tmp_path)
    command("import", text, tower, tmp_path / "checkpoint")
    config, params = restore_model(tmp_path / "checkpoint")
    side = tmp_path / "checkpoint" / "hugging_face"
    released.write_folder(params, config, str(side), str(tmp_path / "out"), max_shard_bytes=40_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and max(s.stat().st_size for s in shards) < 60_000
    again = load(tmp_path / "out").params
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, again)))


def test_bfloat16_tensors_are_read_and_written_without_a_detour(tmp_path):
    """numpy has no bfloat16 of its own; a detour through float16 would lose range."""
    values = np.array([[3e38, -1e-38, 1.0]], ml_dtypes.bfloat16)
    save_file({"model.image_newline": values[0]}, tmp_path / "x.safetensors")
    (tensor,) = released._headers(str(tmp_path), "x.safetensors")
    assert (tensor.dtype, tensor.shape) == ("BF16", (3,))
    np.testing.assert_array_equal(
        load_file(tmp_path / "x.safetensors")["model.image_newline"], values[0]
    )


def test_training_goes_on_from_a_converted_checkpoint(folder, tiny, tmp_path):
    """People hold the weights and want to train on: frozen parts stay the same, the rest moves."""
    command("import", folder, tmp_path / "checkpoint")
    sizes, imported = restore_model(tmp_path / "checkpoint")
    smoke = c.from_config_dict(c.Config, tiny("smoke"))
    idle = {name: dataclasses.replace(getattr(smoke, name), num_steps=0) for name in c.STAGES}
    idle["warmup"] = dataclasses.replace(smoke.warmup, num_steps=2, packed_tiles=20, packed_len=300)
    config = dataclasses.replace(
        smoke,
        **idle,
        init_from=str(tmp_path / "checkpoint"),
        model=dataclasses.replace(sizes, compute_dtype="float32", remat="matmuls", loss_chunk=64),
        world=dataclasses.replace(smoke.world, vocab_size=300),
        generate=c.GenerateConfig(prompt_len=200, max_new_tokens=4, batch_size=5),
        bpo=dataclasses.replace(smoke.bpo, num_steps=0),
        eval_questions=1,
    )
    main.run(config, str(tmp_path / "run"))
    trained = load(tmp_path / "run" / "warmup").params
    for name, moved in (("language_model", False), ("vision_tower", False), ("projector", True)):
        same = jax.tree.map(np.array_equal, trained[name], imported[name])
        assert all(jax.tree.leaves(same)) != moved, name
    command(
        "export", tmp_path / "run" / "warmup", tmp_path / "out"
    )  # as the original, to be served
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", released.INDEX):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    again = load(tmp_path / "out").params
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, trained)))
    other = dataclasses.replace(
        config, model=dataclasses.replace(config.model, projector_norm=False)
    )
    with pytest.raises(c.ConfigError, match="config.model.projector_norm differ"):
        main.run(other, str(tmp_path / "other"))
    nowhere = dataclasses.replace(config, init_from=str(tmp_path))
    with pytest.raises(c.ConfigError, match="no converted checkpoint"):
        main.run(nowhere, str(tmp_path / "nowhere"))


EIGHT_DEVICES = """
import sys, jax, numpy as np
from r4b_jax.models import released
from r4b_jax.common.sharding import placement, training_mesh
from r4b_jax.config import MeshConfig
from r4b_jax.models.layers import logical_axes
folder = [released.read_folder(sys.argv[1])]
config, parts = released.describe(folder)
one, _ = released.load_params(folder, config, parts)
where = placement(logical_axes, training_mesh(MeshConfig(data=4)))
eight, _ = released.load_params(folder, config, parts, sharding=where)
assert len(jax.devices()) == 8
assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one, eight)))
split = [x for x in jax.tree.leaves(eight) if x.addressable_shards[0].data.size * 2 == x.size]
assert len(split) > 5, len(split)
"""


def test_parameters_come_onto_eight_devices_as_onto_one(folder):
    """Straight onto the mesh: no device ever holds a whole model that does not fit it."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", EIGHT_DEVICES, str(folder)], check=True, env=environment)


def test_check_ends_0_only_within_tolerance(folder, tmp_path, capsys, monkeypatch):
    """The command a user runs before trusting a conversion."""
    image = tmp_path / "picture.png"
    from PIL import Image

    Image.fromarray(reference.picture(3, 40)).save(image)
    command("check", folder, "--image", image)
    assert "largest relative difference" in capsys.readouterr().out
    monkeypatch.setattr(front, "TOLERANCE", 1e-9)
    with pytest.raises(SystemExit) as stop:
        command("check", folder, "--image", image)
    assert stop.value.code == 1


def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, capsys):
    """No trace back: the folder's name and what is wrong with it."""
    monkeypatch.setattr(sys, "argv", ["convert", "import", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        front.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.json" in error and str(tmp_path) in error
