"""AnyRes, tile by tile and token by token, against transformers' LLaVA-OneVision processing."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from helpers import MODEL
from PIL import Image
from transformers.models.llava_onevision import modeling_llava_onevision as reference
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from r4b_jax.config import VisionConfig
from r4b_jax.data import images

SIDE = 28  # pixels of a tile: small, and no power of two
GRID = tuple((SIDE * i, SIDE * j) for i in range(1, 7) for j in range(1, 7))
VISION = VisionConfig(
    image_size=SIDE, patch_size=5, grid_pinpoints=GRID, max_grid_tiles=4, image_mean=(0.4, 0.5, 0.6)
)
PATCHES_A_SIDE = SIDE // 5
# (height, width): squares, portraits, landscapes, thin lines, smaller than a tile and far larger.
SIZES = [(28, 28), (60, 60), (61, 33), (33, 61), (1, 1), (1, 300), (300, 2), (500, 90), (97, 211)]
SIZES += [tuple(size) for size in np.random.default_rng(0).integers(3, 260, (40, 2)).tolist()]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth and coloured, so that a wrong resampling shows."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def processor() -> LlavaOnevisionImageProcessorPil:
    return LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[list(point) for point in GRID],
        image_mean=list(VISION.image_mean),
        image_std=list(VISION.image_std),
    )


def normalised(tiles: np.ndarray) -> np.ndarray:
    """uint8[i, h, w, 3] -> float[i, 3, h, w] as the tower takes them."""
    values = (tiles / 255 - np.array(VISION.image_mean)) / np.array(VISION.image_std)
    return values.transpose(0, 3, 1, 2)


def packed(size: tuple[int, int], features: torch.Tensor, newline: torch.Tensor) -> np.ndarray:
    """transformers' own packing of one picture's features [i, P, D]."""

    class Model:
        class config:
            class vision_config:
                image_size, patch_size = SIDE, 5

            image_grid_pinpoints = [list(point) for point in GRID]

    out, _ = reference.LlavaOnevisionModel.pack_image_features(
        Model, [features], torch.tensor([size]), newline, vision_aspect_ratio="anyres_max_4"
    )
    return out[0].numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_picture_of_any_size_becomes_the_same_tiles_and_the_same_features(size, processor):
    """The released weights saw these tiles in this order; any other is another picture to them."""
    image = picture(*size)
    (prepared,) = images.prepare([image], VISION)
    expected = processor([image], return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(normalised(prepared.tiles), expected, atol=1e-5)

    patches = PATCHES_A_SIDE**2
    features = torch.randn(
        len(prepared.tiles), patches, 4, generator=torch.Generator().manual_seed(1)
    )
    newline = torch.full((4,), 7.0)
    table = np.concatenate([features.numpy().reshape(-1, 4), newline.numpy()[None]])
    index = np.where(prepared.index == images.NEWLINE, len(table) - 1, prepared.index)
    ours = np.einsum("nkd,nk->nd", table[index], prepared.weight)
    np.testing.assert_allclose(ours, packed(size, features, newline), atol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_number_of_image_tokens_is_the_processors(size, processor):
    """One placeholder too many or too few and the prompt no longer fits its picture."""
    model = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    model.image_processor, model.num_image_tokens = processor, PATCHES_A_SIDE**2
    model.vision_aspect_ratio = "anyres_max_4"
    (prepared,) = images.prepare([picture(*size)], VISION)
    assert len(prepared.index) == model._get_number_of_features(*size, SIDE, SIDE)


def test_several_pictures_are_one_padded_tile_each(processor):
    """In company no picture gets a grid: base tile and newline only."""
    pictures = [picture(40, 90, 1), picture(50, 50, 2), picture(90, 41, 3)]
    prepared = images.prepare(pictures, VISION)
    expected = processor([pictures], return_tensors="np")["pixel_values"]
    for ours, theirs in zip(prepared, expected):
        np.testing.assert_allclose(normalised(ours.tiles), theirs, atol=1e-5)
        assert ours.index[:, 0].tolist() == [*range(PATCHES_A_SIDE**2), images.NEWLINE]


def test_the_full_models_grid_is_llava_onevisions():
    """36 pinpoints in this order: the first of equals wins."""
    default = LlavaOnevisionImageProcessorPil.image_grid_pinpoints
    assert [list(point) for point in VisionConfig().grid_pinpoints] == default


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pictures_are_read_as_transformers_reads_them(tmp_path):
    """Palette, alpha, grey, CMYK, 16 bit, turned by EXIF, animated: what the processor sees."""
    from transformers.image_utils import load_image

    rgb = picture(20, 30)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [picture(20, 30, seed) for seed in range(3)]
    cases = {
        "rgb.png": encoded(rgb, "PNG"),
        "palette.png": encoded(rgb.quantize(16), "PNG"),
        "alpha.png": encoded(rgb.convert("RGBA"), "PNG"),
        "clear.gif": encoded(rgb.quantize(8), "GIF", transparency=3),
        "grey.png": encoded(rgb.convert("L"), "PNG"),
        "grey-alpha.png": encoded(rgb.convert("LA"), "PNG"),
        "deep.png": encoded(
            Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)), "PNG"
        ),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "turned.jpg": encoded(rgb, "JPEG", exif=turned),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        expected = np.asarray(load_image(str(path)))
        for source in (path, str(path), content, Image.open(path)):
            np.testing.assert_array_equal(np.asarray(images.read(source)), expected, err_msg=name)
    assert images.read(cases["turned.jpg"]).size == (20, 30)
    for array in (np.asarray(rgb), np.asarray(rgb.convert("L")), np.asarray(rgb.convert("RGBA"))):
        expected = np.asarray(Image.fromarray(array).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(images.read(array)), expected)
    with pytest.raises(images.ImageError, match="ndarray"):
        images.read(np.zeros((4, 4, 3)))


@pytest.mark.parametrize(
    "name, content",
    [
        ("missing.png", None),
        ("empty.png", b""),
        ("page.jpg", b"<html>no picture</html>"),
        ("cut.jpg", encoded(picture(200, 200), "JPEG")[:1500]),
        ("bomb.png", encoded(Image.new("1", (20000, 20000)), "PNG")),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(tmp_path, name, content):
    """A trace from inside a decoder tells nobody which of ten thousand files it was."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(images.ImageError, match=name):
        images.read(path)


def test_no_pinpoints_mean_one_tile_and_no_newline():
    """The small world's pictures: 4 patches of 8 x 8 pixels and nothing else."""
    (prepared,) = images.prepare([picture(30, 70)], MODEL.vision)
    assert prepared.tiles.shape == (1, 8, 8, 3) and prepared.index[:, 0].tolist() == [0, 1, 2, 3]
    assert images.prepare([], dataclasses.replace(MODEL.vision)) == []
