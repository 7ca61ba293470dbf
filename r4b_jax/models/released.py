"""Hugging Face folders on disk: read into parameters shard by shard, and written back.

A converted checkpoint is a folder of its own:

    model.json       the ModelConfig
    params/          the parameters (Orbax)
    hugging_face/    what else the original folder held: config, tokenizer, processor, template;
                     layout.json, which tensor lay in which shard with which dtype;
                     spare.safetensors, tensors that R-4B does not compute with
"""

import contextlib
import dataclasses
import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from r4b_jax.common.metrics import Progress
from r4b_jax.config import ModelConfig
from r4b_jax.models import convert, r4b
from r4b_jax.models.convert import CheckpointError, Tensor
from r4b_jax.models.hf_config import VISION_DEFAULTS, model_config, released_config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
NUMPY = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
ALL_PARTS = {"vision_tower", "projector", "image_newline", "language_model"}
WHOLE, TEXT, VISION = ("R", "llava_onevision"), ("qwen3",), ("siglip", "siglip_vision_model")
IMAGE_TOKEN = "<image>"


@dataclasses.dataclass(frozen=True)
class Folder:
    """What the headers of a Hugging Face folder say; no tensor has been read."""

    path: str
    config: dict  # config.json
    preprocessor: dict | None
    tensors: dict[str, Tensor]  # by canonical name

    @property
    def kind(self) -> str:
        return self.config.get("model_type", "")


def read_folder(path: str) -> Folder:
    """Config and headers of a Hugging Face folder.

    Raises:
      CheckpointError: no config, an unknown kind of model, a shard that is missing, truncated, or
        without a tensor the index promises.
    """
    config = read_json(path, "config.json")
    if config is None:
        raise CheckpointError(f"{path} has no config.json: it is no Hugging Face checkpoint")
    if config.get("model_type") not in (*WHOLE, *TEXT, *VISION):
        raise CheckpointError(
            f"{path} is a {config.get('model_type')!r}, not one of "
            f"{', '.join(WHOLE + TEXT + VISION)}"
        )
    index = read_json(path, INDEX)
    promised = index["weight_map"] if index else {}
    tensors = {}
    for file in sorted(set(promised.values())) or [SINGLE]:
        for tensor in _headers(path, file):
            name = convert.canonical(tensor.name)
            if name is not None:
                tensors[name] = tensor
            promised.pop(tensor.name, None)
    if promised:
        name, file = next(iter(promised.items()))
        raise CheckpointError(
            f"{len(promised)} tensors of the index are not in their shards: {name} not in {file}"
        )
    preprocessor = read_json(path, "preprocessor_config.json")
    if preprocessor is None:  # transformers 5 keeps it inside the processor's file
        preprocessor = (read_json(path, "processor_config.json") or {}).get("image_processor")
    return Folder(path, config, preprocessor, tensors)


def read_text(folder: str, name: str) -> str | None:
    """A file's text, or None if the folder does not have it."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as f:
        return f.read()


def read_json(folder: str, name: str) -> dict | None:
    """A file's JSON, or None if the folder does not have it."""
    text = read_text(folder, name)
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{os.path.join(folder, name)} is not JSON: {error}") from None


def template_of(folder: str) -> str | None:
    """The chat template of a Hugging Face folder, wherever it keeps it."""
    if (text := read_text(folder, "chat_template.jinja")) is not None:
        return text
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = (read_json(folder, name) or {}).get("chat_template")
        if isinstance(template, list):  # several by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if isinstance(template, str):
            return template
    return None


def _headers(folder: str, file: str) -> list[Tensor]:
    path = os.path.join(folder, file)
    if not os.path.exists(path):
        raise CheckpointError(f"the shard {path} is missing")
    try:
        with safe_open(path, "np") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}
            return [
                Tensor(name, file, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            ]
    except SafetensorError as error:
        raise CheckpointError(f"the shard {path} is damaged: {error}") from None


def describe(folders: list[Folder]) -> tuple[ModelConfig, set[str]]:
    """The model that one whole checkpoint, or a text model and a tower, make up; and which parts
    they hold. The others start random, as in stage 1."""
    if folders[0].kind in WHOLE:
        if len(folders) > 1:
            raise CheckpointError(f"{folders[0].path} is whole: give it alone")
        whole = folders[0]
        has_norm = "projector.pre_norm.weight" in whole.tensors
        config = whole.config
        no_head = "language_model.lm_head.weight" not in whole.tensors
        if no_head and config["text_config"].get("tie_word_embeddings"):
            config = config | {"tie_word_embeddings": True}  # older files say it of the text alone
        return model_config(config, whole.preprocessor, has_norm), ALL_PARTS
    text = [f for f in folders if f.kind in TEXT]
    vision = [f for f in folders if f.kind in VISION]
    if len(text) != 1 or len(vision) != 1:
        raise CheckpointError("give one whole checkpoint, or one Qwen3 and one SigLIP folder")
    tower = vision[0].config.get("vision_config", vision[0].config)
    size = (VISION_DEFAULTS | tower)["image_size"]
    both = {
        "text_config": text[0].config,
        "vision_config": tower,
        "image_grid_pinpoints": [[size * i, size * j] for i in range(1, 7) for j in range(1, 7)],
    }
    # Of the tower's own processor only the pixels' mean and std: AnyRes resizes in its own way.
    names = ("image_mean", "image_std")
    pixels = {n: v for n, v in (vision[0].preprocessor or {}).items() if n in names}
    # Its errors are told before any weight is read.
    _with_image_token(text[0].path, both["text_config"].get("vocab_size", 0))
    return model_config(both, pixels), {"vision_tower", "language_model"}


def load_params(
    folders: list[Folder], config: ModelConfig, parts: set[str], *, sharding=None, seed: int = 0
) -> tuple[dict, dict[str, np.ndarray]]:
    """Read every tensor to where it will stay, one at a time, shard by shard.

    Host memory holds one tensor and its converted copy; files are mapped, not read whole.

    Args:
      sharding: function (path, shape) -> jax Sharding of a parameter; None = the default device.
      seed: of the parts that no folder holds.
    Returns:
      parameters (bfloat16 where every tensor is, else float32), and the spare tensors.
    Raises:
      CheckpointError: before the first tensor is read.
    """
    tensors = {name: t for folder in folders for name, t in folder.tensors.items()}
    spare_names = convert.check_tensors(tensors, config, parts)
    dtype = "bfloat16" if all(t.dtype == "BF16" for t in tensors.values()) else "float32"
    filler, spare = convert.Filler(config, dtype, sharding), {}
    with Progress("import", len(tensors)) as progress:
        for folder in folders:
            by_file: dict[str, list] = {}
            for name, tensor in folder.tensors.items():
                by_file.setdefault(tensor.file, []).append((name, tensor))
            for file, members in by_file.items():
                with safe_open(os.path.join(folder.path, file), "np") as shard:
                    for name, tensor in members:
                        value = shard.get_tensor(tensor.name)
                        if name in spare_names:
                            spare[name] = value
                        else:
                            filler.put(name, value)
                        progress.advance()
    head = spare.pop("language_model.lm_head.weight", None)
    params = filler.tree(None if parts == ALL_PARTS else _random(config, dtype, seed))
    table = params["language_model"]["embed_tokens"]
    if head is not None and not np.array_equal(head.astype(table.dtype), np.asarray(table)):
        raise CheckpointError("tie_word_embeddings is true, but lm_head is not the embedding table")
    return params, spare


def _random(config: ModelConfig, dtype: str, seed: int) -> dict:
    """Fresh values of the parts that have no checkpoint, by path."""
    params = r4b.init(
        dataclasses.replace(
            config,
            vision=dataclasses.replace(config.vision, num_layers=1),
            language=dataclasses.replace(config.language, num_layers=1),
        ),
        jax.random.key(seed),
    )
    leaves = jax.tree_util.tree_leaves_with_path(
        {name: params[name] for name in ("projector", "image_newline")}
    )
    return {tuple(key.key for key in path): leaf.astype(dtype) for path, leaf in leaves}


def side_files(folder: str) -> list[str]:
    """The files of a Hugging Face folder that hold no weights."""
    names = sorted(os.listdir(folder))
    return [
        name
        for name in names
        if os.path.isfile(os.path.join(folder, name))
        and not name.endswith(WEIGHTS)
        and name not in ("layout.json", "spare.safetensors")
    ]


def keep_originals(
    folders: list[Folder], config: ModelConfig, spare: dict, target: str, template: str
):
    """Write hugging_face/: the side files, layout.json, spare.safetensors; `template` is the chat
    template of a model of parts that have none."""
    os.makedirs(target, exist_ok=True)
    if len(folders) > 1:
        _join_parts(folders, config, target, template)
        return
    for name in side_files(folders[0].path):
        shutil.copy2(os.path.join(folders[0].path, name), os.path.join(target, name))
    layout = {
        t.name: {"file": t.file, "dtype": t.dtype, "shape": list(t.shape)}
        for t in folders[0].tensors.values()
    }
    _write_json(os.path.join(target, "layout.json"), layout)
    if spare:
        save_file(spare, os.path.join(target, "spare.safetensors"))


def _join_parts(folders: list[Folder], config: ModelConfig, target: str, template: str):
    """The text model's side files, an image token in its tokenizer, and a config of the whole."""
    (text,) = (folder for folder in folders if folder.kind in TEXT)
    for name in side_files(text.path):
        if name != INDEX:
            shutil.copy2(os.path.join(text.path, name), os.path.join(target, name))
    spec, image_id = _with_image_token(text.path, config.language.vocab_size)
    tokenizer = json.dumps(spec, ensure_ascii=False, indent=1)
    write_side_files(target, config, tokenizer, image_id, template)


def _with_image_token(folder: str, vocab_size: int) -> tuple[dict, int]:
    """A text model's tokenizer.json with a token for pictures, and that token's id.

    Raises:
      CheckpointError: no tokenizer, or no room in the vocabulary.
    """
    spec = read_json(folder, "tokenizer.json")
    if spec is None:
        raise CheckpointError(f"{folder} has no tokenizer.json")
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    if IMAGE_TOKEN not in added:
        last = max(*spec["model"]["vocab"].values(), *added.values())
        if last + 1 >= vocab_size:
            raise CheckpointError(f"the vocabulary of {folder} has no room for {IMAGE_TOKEN}")
        token = {"id": last + 1, "content": IMAGE_TOKEN, "special": True}
        token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        spec["added_tokens"].append(token)
        added[IMAGE_TOKEN] = last + 1
    return spec, added[IMAGE_TOKEN]


def write_side_files(
    folder: str, config: ModelConfig, tokenizer: str, image_id: int, template: str
):
    """What stands beside the weights of a model that was put together or trained here: config,
    preprocessor, processor, tokenizer and chat template. Files of the last two that are there stay.

    Args:
      tokenizer: the content of tokenizer.json.
    """
    vision = config.vision
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": IMAGE_TOKEN,
        "num_image_tokens": vision.num_patches,
        "vision_aspect_ratio": f"anyres_max_{vision.max_grid_tiles}",
        "vision_feature_select_strategy": "full",
    }
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    preprocessor = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": vision.image_size, "width": vision.image_size},
        "image_grid_pinpoints": [list(point) for point in vision.grid_pinpoints],
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        "resample": 3,
    }
    _write_json(os.path.join(folder, "config.json"), released_config(config, image_id))
    _write_json(os.path.join(folder, "preprocessor_config.json"), preprocessor)
    _write_json(os.path.join(folder, "processor_config.json"), processor)
    if not os.path.exists(path := os.path.join(folder, "tokenizer_config.json")):
        _write_json(path, tokens)
    if template_of(folder) is None:
        with open(os.path.join(folder, "chat_template.jinja"), "w", encoding="utf-8") as f:
            f.write(template)
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as f:
        f.write(tokenizer)


def _write_json(path: str, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)


def write_folder(
    params: dict, config: ModelConfig, originals: str, target: str, max_shard_bytes: int = 5 * 10**9
):
    """Write parameters as a Hugging Face folder, spelled and sharded as the original was.

    Args:
      originals: the hugging_face/ folder kept at import; without a layout.json (a model of parts),
        names are the released checkpoint's and the dtype that of `params`.
    """
    os.makedirs(target, exist_ok=True)
    for name in side_files(originals):
        shutil.copy2(os.path.join(originals, name), os.path.join(target, name))
    layout = read_json(originals, "layout.json") or _fresh_layout(params, config, max_shard_bytes)
    files: dict[str, list[str]] = {}
    for name, entry in layout.items():
        files.setdefault(entry["file"], []).append(name)
    table, sizes = convert.slots(config), {}
    with contextlib.ExitStack() as stack, Progress("export", len(layout)) as progress:
        spare = None
        if os.path.exists(path := os.path.join(originals, "spare.safetensors")):
            spare = stack.enter_context(safe_open(path, "np"))
        for file, names in files.items():
            shard = {}
            for name in names:
                dtype, shape = NUMPY[layout[name]["dtype"]], tuple(layout[name]["shape"])
                value = _tensor(convert.canonical(name), params, table, spare, shape)
                shard[name] = np.ascontiguousarray(value.astype(dtype))
                sizes[name] = shard[name].nbytes
                progress.advance()
            save_file(shard, os.path.join(target, file), metadata={"format": "pt"})
    if set(files) != {SINGLE} and not os.path.exists(os.path.join(target, INDEX)):
        weight_map = {name: entry["file"] for name, entry in layout.items()}
        total = {"total_size": sum(sizes.values())}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        with open(os.path.join(target, INDEX), "w", encoding="utf-8") as f:
            f.write(json.dumps(index, indent=2) + "\n")


def _tensor(name: str, params: dict, table: dict, spare, shape) -> np.ndarray:
    """One tensor by its canonical name, as the file has it."""
    if name == "language_model.lm_head.weight" and name not in table:  # a tied head's copy
        name = "language_model.embed_tokens.weight"
    if name in table:
        slot, _ = table[name]
        return convert.to_theirs(convert.leaf_of(params, slot), slot, shape)
    return spare.get_tensor(name)


def _fresh_layout(params: dict, config: ModelConfig, max_shard_bytes: int) -> dict:
    """A layout in the released checkpoint's spelling, in shards of at most `max_shard_bytes`."""
    dtype = "BF16" if jax.tree.leaves(params)[0].dtype == ml_dtypes.bfloat16 else "F32"
    shards, room = [{}], max_shard_bytes
    for name, (_, shape) in convert.slots(config).items():
        size = int(np.prod(shape)) * (2 if dtype == "BF16" else 4)
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        room -= size
        shards[-1][convert.released_name(name)] = {"dtype": dtype, "shape": list(shape)}
    if len(shards) == 1:
        return {name: entry | {"file": SINGLE} for name, entry in shards[0].items()}
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    return {
        name: entry | {"file": file}
        for file, shard in zip(files, shards)
        for name, entry in shard.items()
    }
