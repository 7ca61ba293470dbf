"""Batches of people's own files: epochs, bad pictures, multi-turn, resuming in the middle."""

import dataclasses
import io
import json
import re

import grain
import jax
import numpy as np
import pytest
import rich.console
from helpers import CONFIG, MODEL, assert_trees_close, one_a_row, picture
from PIL import Image

from r4b_jax import config as c
from r4b_jax import main
from r4b_jax.common import metrics
from r4b_jax.common.checkpoint import StageCheckpoints
from r4b_jax.common.metrics import read_metrics
from r4b_jax.data import __main__ as front
from r4b_jax.data import images, show
from r4b_jax.data.examples import Packer, encode_sample, place_tiles
from r4b_jax.data.loader import Loader, examples
from r4b_jax.data.mixture import queries
from r4b_jax.data.samples import Sample, SetAside, Turn
from r4b_jax.models import block_attention, r4b
from r4b_jax.models.attention import attend, packed_mask
from r4b_jax.models.packed_attention import packed_attention
from r4b_jax.rl.loop import Queries
from r4b_jax.training.loop import run_stage
from r4b_jax.training.losses import supervised_loss

GRID = dataclasses.replace(
    MODEL, vision=dataclasses.replace(MODEL.vision, grid_pinpoints=((8, 8), (8, 16), (16, 8)))
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Indices of these files are nobody else's business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def encoded(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def zoo() -> dict[str, tuple[bytes | None, str]]:
    """name -> (file or None = missing, why it is set aside or "" = it is good)."""
    rgb = Image.fromarray(picture(3, 24))
    turned = Image.Exif()
    turned[0x0112] = 6
    bomb = encoded(Image.new("1", (20000, 20000)), "PNG")
    cannot = "cannot read the image"
    return {
        "good.png": (encoded(rgb, "PNG"), ""),
        "cut.jpg": (encoded(rgb.resize((200, 200)), "JPEG")[:900], cannot),
        "empty.jpg": (b"", cannot),
        "page.jpg": (b"<html><body>404</body></html>", cannot),
        "cmyk.jpg": (encoded(rgb.convert("CMYK"), "JPEG"), ""),
        "deep.png": (encoded(Image.fromarray(np.full((9, 7), 40000, np.uint16)), "PNG"), ""),
        "palette.png": (encoded(rgb.quantize(8), "PNG", transparency=3), ""),
        "moving.gif": (encoded(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)]), ""),
        "turned.jpg": (encoded(rgb.resize((24, 12)), "JPEG", exif=turned), ""),
        "dot.png": (encoded(rgb.resize((1, 1)), "PNG"), ""),
        "thread.png": (encoded(Image.new("RGB", (1, 20000)), "PNG"), ""),
        "bomb.png": (bomb, "decompression bomb"),
        "missing.png": (None, "there is no image file"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA file: every picture of the zoo between good texts, two turns each fourth record."""
    folder = tmp_path_factory.mktemp("llava")
    records = []
    for i, (name, (content, _)) in enumerate(zoo().items()):
        if content is not None:
            (folder / name).write_bytes(content)
        turns = [("human", f"<image>\nWhat is in {i}?"), ("gpt", f"It is {i}.")]
        turns += [("human", "And now?"), ("gpt", "Still.")] * (i % 4 == 0)
        said = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": name, "image": name, "conversations": said})
        text = [{"from": "human", "value": f"What is {i} + 1?"}, {"from": "gpt", "value": "more"}]
        records.append({"id": f"text-{i}", "conversations": text})
    records.insert(5, {"id": "blank", "conversations": []})
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def config_of(folder, model=MODEL, **changes) -> c.Config:
    stage = c.StageConfig(
        num_steps=9, batch_rows=2, packed_len=150, packed_tiles=4, lr_projector=1e-3, **changes
    )
    sources = {"mine": c.SourceConfig(path=str(folder / "data.jsonl"))}
    return dataclasses.replace(CONFIG, model=model, sources=sources, annealing=stage)


def all_of(config, tokenizer, *position) -> list:
    """Every batch until the data end."""
    return list(Loader(config, "annealing", tokenizer).batches(*position))


@pytest.mark.parametrize("model", [MODEL, GRID], ids=["one tile", "grid"])
def test_bad_pictures_are_set_aside_by_name_and_disturb_nobody(folder, tokenizer, model):
    """FAULTS 10: a truncated file among a million must cost its own sample and no other's place."""
    taken = all_of(config_of(folder, model, epochs=1), tokenizer)
    aside = [a for packed in taken for a in (*packed.set_aside, *packed.undecoded)]
    expected = {f"mine/{name}": reason for name, (_, reason) in zoo().items() if reason}
    assert {a.id for a in aside} == set(expected)
    assert all(expected[a.id] in a.reason for a in aside)
    # What was found out only when it was decoded has a place that carries no loss.
    learned = sum(
        bool((packed.batch.loss_weights[row] * (packed.batch.segment_ids[row] == s)).any())
        for packed in taken
        for row in range(2)
        for s in range(1, packed.batch.segment_ids[row].max() + 1)
    )
    assert learned == 2 * len(zoo()) - len(expected)


def test_an_epoch_has_every_sample_once_and_the_next_in_another_order(folder, tokenizer):
    """Epochs are what people count in; a sample that came twice would be learned twice."""
    config = config_of(folder, epochs=2)
    stream, bad = examples(config, "annealing", tokenizer)
    n = 2 * len(zoo())
    assert [a.id for a in bad] == ["mine/data.jsonl:6"] and len(stream) == 2 * n
    first, second = ([stream[i].id for i in range(k * n, k * n + n)] for k in range(2))
    assert len(set(first)) == n and set(first) == set(second) and first != second


def test_a_run_resumed_in_mid_pack_sees_the_same_batches(folder, tokenizer):
    """The counter alone is not enough: some samples before it still wait for room."""
    config = config_of(folder, epochs=3)
    whole = all_of(config, tokenizer)
    assert len(whole) > 4 and any(packed.position.waiting for packed in whole[:-1])
    for k, packed in enumerate(whole[:-1]):
        again = all_of(config, tokenizer, packed.position)
        same = jax.tree.map(
            np.array_equal, [p.batch for p in whole[k + 1 :]], [p.batch for p in again]
        )
        assert all(jax.tree.leaves(same)) and len(again) == len(whole) - k - 1
        assert [p.undecoded for p in again] == [p.undecoded for p in whole[k + 1 :]]


def test_a_stage_ends_with_its_data_and_tells_what_it_set_aside(
    folder, tokenizer, params, tmp_path, capsys
):
    """Two epochs asked for are two epochs done: then the stage is over, also when asked again."""
    config = dataclasses.replace(config_of(folder, epochs=1), log_every=1, checkpoint_every=2)
    stage = dataclasses.replace(config.annealing, num_steps=50)
    config = dataclasses.replace(config, annealing=stage)
    given = jax.tree.map(jax.numpy.array, params)
    run_stage(config, "annealing", given, tokenizer, str(tmp_path))
    assert "the data end after step" in capsys.readouterr().err
    records = read_metrics(str(tmp_path), "annealing")
    lines = (tmp_path / "set_aside.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    bad = {f"mine/{name}" for name, (_, reason) in zoo().items() if reason}
    assert {t["id"] for t in told} == bad | {"mine/data.jsonl:6"} and told[0]["step"] == 0
    assert records[-1]["set_aside"] == len(told) == len(bad) + 1
    assert all(0 < r["packed"] <= 1 for r in records) and len(records) < 50
    last = StageCheckpoints(str(tmp_path / "annealing")).latest
    given = jax.tree.map(jax.numpy.array, params)
    run_stage(config, "annealing", given, tokenizer, str(tmp_path))
    assert StageCheckpoints(str(tmp_path / "annealing")).latest == last
    assert (tmp_path / "set_aside.jsonl").read_text().splitlines() == lines


def test_queries_that_cannot_be_asked_are_replaced_by_the_next(folder, tokenizer, tmp_path):
    """BPO needs whole groups: a broken picture costs a name in the log, not a hole in the step."""
    config = config_of(folder)
    bpo = dataclasses.replace(config.bpo, topics={"mine": 1.0}, num_queries=5)
    config = dataclasses.replace(config, bpo=bpo)
    drawn = Queries(config, tokenizer, str(tmp_path), 0, position=0, set_aside=0)
    asked = [sample.id for step in (1, 2, 3, 4) for sample, _ in drawn.draw(step)]
    assert len(asked) == 20 and drawn.position == 20 + drawn.set_aside - 1  # one was never there
    told = [json.loads(x) for x in (tmp_path / "set_aside.jsonl").read_text().splitlines()]
    assert len(told) == drawn.set_aside > 0
    assert not {t["id"] for t in told} & set(asked)
    later = [t for t in told if t["step"] > 2]
    assert (told[0]["id"], told[0]["step"]) == ("mine/data.jsonl:6", 0)
    again = Queries(config, tokenizer, str(tmp_path), 2, 10 + len(told) - 1 - len(later), 0)
    assert [s.id for step in (3, 4) for s, _ in again.draw(step)] == asked[10:]
    assert [json.loads(x) for x in (tmp_path / "set_aside.jsonl").read_text().splitlines()] == told


def test_a_topic_of_the_world_and_of_a_file_has_the_samples_of_both(folder, tokenizer):
    """Else one of the two would be lost without a word, or end the stream."""
    config = config_of(folder, mixture={"ocr": (1.0, 0.0)})
    sources = config.sources | {"world": c.SourceConfig(path="world")}
    sources["mine"] = dataclasses.replace(sources["mine"], topic="ocr")
    both = dataclasses.replace(config, sources=sources)
    stream, _ = examples(both, "annealing", tokenizer)
    ids = [stream[i].id for i in range(8 * len(zoo()))]
    assert len(set(i for i in ids if i.startswith("mine/"))) == 2 * len(zoo())
    assert len(set(i for i in ids if i.startswith("world/"))) == 4 * len(zoo())
    asked, bad = queries(both, (), {"ocr": 1.0}, "any", "", endless=True)
    assert {asked[i].id.split("/")[0] for i in range(20)} == {"mine", "world"} and len(bad) == 1


def test_every_sample_of_the_topics_is_a_query_where_no_number_is_wanted(folder):
    """Topics of different sizes: none may end the stream for the others."""
    config = config_of(folder)
    (folder / "few.jsonl").write_text('{"question": "1?", "answer": 1, "topic": "few"}\n')
    sources = config.sources | {"few": c.SourceConfig(path=str(folder / "few.jsonl"))}
    config = dataclasses.replace(config, sources=sources)
    found, bad = queries(config, (), {"mine": 1.0, "few": 1.0}, "curation", "")
    assert len(found) == 2 * len(zoo()) + 1 and len(bad) == 1
    assert len({found[i].id for i in range(len(found))}) == len(found)
    assert len(queries(config, (), {"mine": 1.0, "few": 1.0}, "curation", "", number=9)[0]) == 2


def test_a_thin_picture_among_others_is_no_bomb(tokenizer):
    """Several pictures in a prompt are padded to squares: 1 x 20,000 would take 1.2 GB."""
    thread = encoded(Image.new("RGB", (1, 20000)), "PNG")
    sample = Sample("a", (Turn("?", (thread, picture(1)), "x"),))
    with pytest.raises(images.ImageError, match="400000000 in memory"):
        encode_sample(tokenizer, GRID.vision, sample)
    alone = Sample("a", (Turn("?", (thread,), "x"),))
    assert encode_sample(tokenizer, GRID.vision, alone).num_tiles >= 2


def test_a_conversation_of_hundreds_of_turns_is_rendered_in_a_moment(tokenizer):
    """Each turn's prompt is the beginning of the next one's; encoding all anew would take hours."""
    turns = tuple(Turn(f"How many {i}?", (), f"{i} of them") for i in range(150))
    example = encode_sample(tokenizer, MODEL.vision, Sample("a", turns))
    assert example.branch_ids.max() == 149 and (example.loss_weights > 0).sum() > 150 * 4


def test_all_samples_come_in_order_where_no_topics_are_named(folder):
    """Curation looks at everything once, bad records too: nothing disappears."""
    found, _ = queries(config_of(folder), (), {}, "curation", "")
    assert len(found) == 2 * len(zoo()) + 1
    assert isinstance(found[5], SetAside) and "does not end" in found[5].reason
    assert [found[i].id for i in (0, 1, 6)] == ["mine/good.png", "mine/text-0", "mine/text-2"]


def test_turns_in_one_row_are_the_conversations_asked_one_after_another(params, tokenizer):
    """Loss and gradients of a conversation = those of each of its questions, asked when it was
    asked and answered as it was answered, with the pictures shown so far."""
    turns = (
        Turn("Sum?", (picture(5),), "7", "3+4=7"),
        Turn("Read the top row.", (), "12"),
        Turn("and this one", (picture(6),), "3", "1+2=3"),
    )
    settings = dict(mask_empty_block=True, length_power=0.0)
    whole = encode_sample(tokenizer, MODEL.vision, Sample("any", turns), **settings)
    asked = []
    for k in range(3):
        one = encode_sample(tokenizer, MODEL.vision, Sample("any", turns[: k + 1]), **settings)
        if k:  # the earlier replies were learned already
            last = one.branch_ids == 0
            first = np.flatnonzero(last & (one.tokens == tokenizer.think_id))[-1]
            weights = np.where(np.arange(len(one.tokens)) > first, one.loss_weights, 0)
            one = dataclasses.replace(one, loss_weights=weights)
        asked.append(one)

    @jax.jit
    def loss_and_grads(params, batch):
        def loss(params):
            return supervised_loss(r4b.bind(MODEL, params), batch, MODEL.loss_chunk)

        return jax.value_and_grad(loss, has_aux=True)(params)

    packer = Packer(1, 150, 4, MODEL.vision, tokenizer.pad_id)
    assert packer.add(encode_sample(tokenizer, MODEL.vision, Sample.ask("a", None, "x", "y")))
    assert packer.add(whole)  # behind another segment, whose loss does not count here
    packer.batch.loss_weights[packer.batch.segment_ids == 1] = 0
    place_tiles(packer.batch, 0, 0, whole)
    (total, weight), grads = jax.device_get(loss_and_grads(params, packer.batch))
    rows = one_a_row(asked, max(len(e.tokens) for e in asked), tokenizer.pad_id)
    (expected, count), expected_grads = jax.device_get(loss_and_grads(params, rows))
    assert weight == count == sum((e.loss_weights > 0).sum() for e in asked) > 20
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert_trees_close(grads, expected_grads, 1e-4)


def test_rows_are_nearly_full_on_a_realistic_mix(tokenizer):
    """95 % of the slots hold real tokens at 16,384, also with one row at a time; counted on
    lengths alone: a third is text, the others have 2 to 10 tiles of 700 tokens."""
    one = encode_sample(tokenizer, MODEL.vision, Sample.ask("a", picture(1), "x", "y"))

    def example(_, rng):
        tiles = int(rng.choice([0, 2, 3, 5, 7, 10], p=[0.3, 0.1, 0.2, 0.2, 0.1, 0.1]))
        length = int(np.clip(rng.lognormal(5.5, 1.0), 20, 8000)) + tiles * 700
        longer = {
            name: np.resize(value, (length, *value.shape[1:]))
            for name, value in vars(one).items()
            if isinstance(value, np.ndarray)
        }
        return dataclasses.replace(one, **longer, pictures=one.pictures * tiles)

    stage = c.StageConfig(mixture={"ocr": (1.0, 0.0)}, packed_len=16384, packed_tiles=24)
    loader = Loader(dataclasses.replace(CONFIG, annealing=stage), "annealing", tokenizer)
    loader.examples = grain.MapDataset.range(2**40).seed(0).random_map(example)
    batches = loader.batches()
    full = [(next(batches).batch.segment_ids > 0).mean() for _ in range(30)]
    batches.close()
    assert np.mean(full) > 0.95


# Looking at it


def test_inspect_shows_what_is_trained_on(folder, tokenizer, tmp_path, monkeypatch):
    """What one looks at must be the batch itself: its texts, its tiles, and what it left out."""
    seen = io.StringIO()
    console = rich.console.Console(file=seen, width=200, force_terminal=True, highlight=False)
    monkeypatch.setattr(metrics, "console", console)
    monkeypatch.setattr(main, "tokenizer_of", lambda *_: tokenizer)
    front.inspect(config_of(folder, epochs=1), "annealing", "", 1, 99, str(tmp_path / "tiles.png"))
    plain = re.sub("\x1b\\[[0-9;]*m", "", seen.getvalue())
    (packed, *_) = all_of(config_of(folder, epochs=1), tokenizer)
    for row, one in show.segments(packed.batch):
        assert f"row {row}, segment {one}:" in plain
        assert show.segment(packed.batch, row, one, tokenizer).plain in plain
    for aside in (*packed.set_aside, *packed.undecoded):
        assert f"set aside: {aside.id}" in plain
    assert "[4 tokens of a picture]" in plain and "mine/data.jsonl:6" in plain
    counts = [show.num_tiles(packed.batch, row, MODEL.vision.num_patches) for row in range(2)]
    with Image.open(tmp_path / "tiles.png") as drawn:
        assert drawn.width == max(counts) * (128 + show.MARGIN) + show.MARGIN


def test_colours_tell_what_carries_loss(tokenizer):
    """Green where the loss is, yellow where the empty block of stage 3 is masked."""
    turns = (Turn("one?", (picture(1),), "1"), Turn("two?", (), "2", "1+1=2"))
    example = encode_sample(tokenizer, MODEL.vision, Sample("a", turns), mask_empty_block=True)
    batch = one_a_row([example], len(example.tokens), tokenizer.pad_id)
    text = show.segment(batch, 0, 1, tokenizer)
    painted = [(text.plain[s.start : s.end], s.style) for s in text.spans]
    assert ("\n\n</think>", show.MASKED) in painted and (
        "[4 tokens of a picture]",
        show.PICTURE,
    ) in painted
    assert ("\n\n1<|im_end|>", show.LEARNED) in painted
    assert ("\n1+1=2\n</think>\n\n2<|im_end|>", show.LEARNED) in painted
    learned = "".join(part for part, style in painted if style == show.LEARNED)
    assert learned == "\n\n1<|im_end|>\n1+1=2\n</think>\n\n2<|im_end|>"


def test_a_converted_source_gives_the_same_batches_and_tells_what_it_left_out(
    folder, tokenizer, tmp_path, capsys
):
    """The fast file must be the data and nothing else."""
    config = config_of(folder, epochs=1)
    out = str(tmp_path / "mine.array_record")
    front.convert(config, "mine", "", out)
    captured = capsys.readouterr()
    assert "mine/data.jsonl:6" in captured.err and "missing.png" in captured.err
    assert "25 samples, 2 left out" in captured.out
    packed = {"mine": c.SourceConfig(path=out)}
    again = examples(dataclasses.replace(config, sources=packed), "annealing", tokenizer)[0]
    stream = examples(config, "annealing", tokenizer)[0]
    ids = {stream[i].id for i in range(len(stream))} - {"mine/missing.png"}
    assert len(again) == 25 and {again[i].id for i in range(25)} == ids
    with pytest.raises(c.ConfigError, match="one of: mine"):
        front.convert(config, "mein", "", out)


def test_blocks_of_attention_see_turns_between_branches(monkeypatch):
    """A conversation's replies stand between its turns: the list of blocks may not count on
    branches that ascend."""
    monkeypatch.setattr(block_attention, "BLOCK", 16)
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, 24)  # turn, reply, turn, reply ... of four conversations
    pieces = np.arange(24)
    segments = np.repeat(1 + pieces // 6, lengths)
    branches = np.repeat(np.where(pieces % 2, 1 + pieces % 6 // 2, 0), lengths)
    padding = (0, 300 - len(segments))
    ids = [np.pad(x, padding)[None].astype(np.int32) for x in (segments, branches)]
    q = rng.standard_normal((1, 300, 4, 8), np.float32)
    k, v = (rng.standard_normal((1, 300, 2, 8), np.float32) for _ in range(2))
    real = (ids[0] > 0)[..., None, None]
    found = packed_attention(*map(jax.numpy.asarray, ids))(q, k, v) * real
    np.testing.assert_allclose(found, attend(q, k, v, packed_mask(*ids)) * real, atol=1e-5)
