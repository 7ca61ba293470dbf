"""Every format on real files: what is read, what is told, and what is looked up only once."""

import base64
import concurrent.futures
import csv
import dataclasses
import io
import json
import os
import tarfile

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from r4b_jax.config import ConfigError, SourceConfig
from r4b_jax.data import records
from r4b_jax.data.samples import PLACE, RecordError, Sample, Turn
from r4b_jax.data.sources import Source, index, write_array_record


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "r4b_jax"


def png(seed: int) -> bytes:
    """A real picture of a few hundred bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def record(i: int, picture=None) -> dict:
    """The i-th record: every third has a thought, every other a topic of its own."""
    return {
        "id": f"r{i}",
        "topic": "sums" if i % 2 else None,
        "question": f"{i}+{i}?",
        "answer": str(2 * i),
        "thought": f"{i} twice" if i % 3 == 0 else None,
        "image": png(i) if picture is None else picture,
    }


def expected(i: int, image: bytes | str, name: str = "mine") -> Sample:
    turn = Turn(f"{i}+{i}?", (image,), str(2 * i), f"{i} twice" if i % 3 == 0 else None)
    return Sample("sums" if i % 2 else name, (turn,), f"{name}/r{i}")


def write_json(path, items: list):
    path.write_text(json.dumps(items))


def write_lines(path, items: list):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def write_parquet(path, items: list):
    pa.parquet.write_table(pa.Table.from_pylist(items), path, row_group_size=70)


def write_records(path, items: list):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for item in items:
        writer.write(item if isinstance(item, bytes) else msgpack.packb(item))
    writer.close()


def write_tar(path, members: list[tuple[str, bytes]]):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_tsv(path, header: list, rows: list):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, delimiter="\t").writerows([header, *rows])


def members(i: int) -> list[tuple[str, bytes]]:
    """A record as WebDataset has it."""
    fields = {key: value for key, value in record(i).items() if key != "image"}
    return [(f"d/{i:03}.json", json.dumps(fields).encode()), (f"d/{i:03}.png", png(i))]


def write(folder, ending: str, count: int):
    """`count` records in a file of the format; JSON names its pictures, the others have them."""
    path = folder / f"data{ending}"
    if ending in (".json", ".jsonl"):
        items = [record(i, f"{i}.png") for i in range(count)]
        write_json(path, items) if ending == ".json" else write_lines(path, items)
    elif ending == ".parquet":
        write_parquet(path, [{**record(i), "image": {"bytes": png(i)}} for i in range(count)])
    elif ending == ".tar":
        write_tar(path, [member for i in range(count) for member in members(i)])
    elif ending == ".array_record":
        write_records(path, [record(i) for i in range(count)])
    else:
        encoded = [base64.b64encode(png(i)).decode() for i in range(count)]
        rows = [{**record(i), "index": f"r{i}", "image": encoded[i]} for i in range(count)]
        del_id = [{key: value for key, value in row.items() if key != "id"} for row in rows]
        write_tsv(path, list(del_id[0]), [list(row.values()) for row in del_id])
    return path


def source(path, name: str = "mine", **settings) -> Source:
    return Source(name, SourceConfig(path=str(path), **settings))


def reasons(path) -> list[str]:
    """Why the bad records of a file are bad."""
    return [reason for _, reason in index(source(path)).bad]


ENDINGS = (".json", ".jsonl", ".parquet", ".tar", ".array_record", ".tsv")


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same_samples(tmp_path, ending):
    """The format is how data came, not what they are; 150 records are several parquet batches."""
    path = write(tmp_path, ending, 150)
    mine = source(path)
    named = ending in (".json", ".jsonl")
    assert len(mine) == 150
    for i in (149, 0, 63, 64, 70, 127, 128):
        assert mine[i] == expected(i, str(tmp_path / f"{i}.png") if named else png(i))
    with pytest.raises(IndexError):
        mine[150]
    with pytest.raises(IndexError):
        mine[-1]


@pytest.mark.parametrize("ending", ENDINGS)
def test_threads_read_what_one_reader_reads(tmp_path, ending):
    """Grain reads from many threads: a shared position in a file would mix up samples."""
    mine = source(write(tmp_path, ending, 130))
    in_order = [mine[i] for i in range(130)]
    numbers = np.random.default_rng(0).permutation(np.repeat(np.arange(130), 4)).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(mine.__getitem__, numbers))
    assert found == [in_order[i] for i in numbers]


def test_many_files_are_one_source_in_the_order_of_their_names(tmp_path):
    """A sample's number must mean the same sample on every host."""
    for shard, count in (("b", 2), ("a", 3), ("c", 0)):
        (tmp_path / shard).mkdir()
        items = [{"question": f"{shard}{i}?", "answer": "x"} for i in range(count)]
        write_lines(tmp_path / shard / "data.jsonl", items)
    write_json(tmp_path / "z.json", [{"question": "z?", "answer": "x"}])
    mine = source(tmp_path / "**" / "*.json*")
    assert [mine[i].question for i in range(len(mine))] == ["a0?", "a1?", "a2?", "b0?", "b1?", "z?"]
    assert [mine[i].id for i in (0, 4, 5)] == [
        "mine/a/data.jsonl:1",
        "mine/b/data.jsonl:2",
        "mine/z.json:1",
    ]
    assert mine.locate(4) == mine[4].id


def test_settings_of_a_source_stand_where_a_record_is_silent(tmp_path):
    """topic, prompt, folder of the pictures, and the run's own folder."""
    write_json(tmp_path / "a[1].json", [{"image": "1.png", "caption": "a cat"}])
    config = SourceConfig(
        path="{workdir}/a[1].json", images="{workdir}/pictures", topic="cats", prompt="What?"
    )
    (sample,) = [Source("mine", config, str(tmp_path))[0]]
    turn = Turn("What?", (str(tmp_path / "pictures" / "1.png"),), "a cat")
    assert sample == Sample("cats", (turn,), "mine/a[1].json:1")


def test_what_cannot_be_a_source_is_told_at_once(tmp_path):
    """FAULTS 20: a wrong path must not be found out hours later, and names what is wrong."""
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "folder.json").mkdir()
    for name, reason in (
        ("a.csv", r"a\.csv is of no known format: \.json \.jsonl \.parquet \.tar"),
        ("no*.json", r"sources\.mine\.path: no file matches '.*no\*\.json'"),
        ("folder.json", "no file matches"),
    ):
        with pytest.raises(ConfigError, match=reason):
            source(tmp_path / name)


@pytest.mark.parametrize("ending", (".json", ".parquet", ".tar", ".array_record", ".tsv"))
@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 99], ids=["empty", "html"])
def test_a_file_that_cannot_be_opened_is_named(tmp_path, ending, content):
    """A download that failed leaves such files; array_record alone would read them as empty."""
    path = tmp_path / f"data{ending}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"cannot read .*data{ending}: ."):
        source(path)


def test_lines_that_are_no_records_are_set_aside_and_no_others(tmp_path):
    """FAULTS 11: one bad line of a million must cost one line, and be found."""
    path = tmp_path / "data.jsonl"
    good = json.dumps({"question": "1?", "answer": "1"}).encode()
    lines = [b"\xef\xbb\xbf" + good, b"", b'{"question": "\xff"}', b" \t\r", b"{bad", b"[1]", good]
    lines += [b"[" * 100_000, b'{"question": "\\ud800", "answer": "1"}', good[:-9]]
    path.write_bytes(b"\n".join(lines))
    found = index(source(path))
    assert found.topic.tolist() == [0, -1, -1, -1, 0, -1, -1, -1]
    assert [where for where, _ in found.bad] == [f"mine/data.jsonl:{i}" for i in (2, 3, 4, 6, 7, 8)]
    told = "not UTF-8", "not JSON", "the record is list", "not JSON", "not Unicode", "not JSON"
    for (_, reason), words in zip(found.bad, told):
        assert words in reason


@pytest.mark.parametrize("cut", [1, 300, 700, 1300, 1600])
def test_a_tar_that_was_cut_off_gives_what_is_whole(tmp_path, cut):
    """A shard whose upload broke off: its last record may lack members, so it is not used."""
    path = write(tmp_path, ".tar", 4)
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar]
    path.write_bytes(path.read_bytes()[: starts[6] + cut])
    mine = source(path)
    good = 2 if cut < 512 else 3  # was the broken header of record 2's next member, or of record 3?
    assert [mine[i] for i in range(good)] == [expected(i, png(i)) for i in range(good)]
    ((where, reason),) = index(mine).bad
    assert where == f"mine/data.tar:{good + 1}"
    assert "cut off or damaged near byte" in reason


def test_a_tar_with_a_broken_header_says_so(tmp_path):
    """tarfile takes it for the end of the archive: all that follows would be missed in silence."""
    path = write(tmp_path, ".tar", 4)
    with tarfile.open(path) as tar:
        start = tar.getmembers()[4].offset
    data = bytearray(path.read_bytes())
    data[start + 20] ^= 0xFF
    path.write_bytes(data)
    found = index(source(path))
    assert found.topic.tolist() == [0, -1]
    assert f"near byte {start}" in found.bad[0][1]


def test_a_tar_groups_its_members_by_name(tmp_path):
    """WebDataset: pictures in the order of their endings, the JSON's own name for one left out."""
    said = {"conversations": [{"from": "human", "value": "<image><image>Same?"}], "image": "x.jpg"}
    said["conversations"].append({"from": "gpt", "value": "No."})
    write_tar(
        tmp_path / "a.tar",
        [
            ("x/1.b.PNG", b"second"),
            ("x/1.a.png", b"first"),
            ("x/1.json", json.dumps(said).encode()),
            ("x/._1.json", b"a Mac's"),
            ("x/2.jpg", b"cat"),
            ("x/2.txt", "eine Kätzin".encode()),
            ("y/2.txt", b"no picture"),
            ("y/3.webp", b"cat"),
            ("y/3.txt", b"\xff"),
            ("y/4.cls", b"1"),
        ],
    )
    mine = source(tmp_path / "a.tar")
    assert mine[0] == Sample("mine", (Turn("Same?", (b"first", b"second"), "No."),), "mine/x/1")
    turn = Turn("Describe the picture.", (b"cat",), "eine Kätzin")
    assert mine[1] == Sample("mine", (turn,), "mine/x/2")
    told = ["a caption without a picture", "not UTF-8", "no known shape: its keys are id"]
    assert [words in reason for words, reason in zip(told, reasons(tmp_path / "a.tar"))] == [
        True
    ] * 3


def test_parquet_keeps_the_hubs_nested_columns(tmp_path):
    """Typed parts are structs with every key in every part; pictures are structs of bytes."""
    parts = [
        [{"type": "image", "text": None}, {"type": "text", "text": "Same as "}],
        [{"type": "image", "text": None}, {"type": "text", "text": "?"}],
    ]
    rows = [
        {
            "images": [{"bytes": png(0), "path": None}, {"bytes": png(1), "path": "1.png"}],
            "messages": [
                {"role": "user", "content": parts[0] + parts[1], "reasoning_content": None},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "No."}],
                    "reasoning_content": "They differ.",
                },
            ],
        }
    ]
    write_parquet(tmp_path / "a.parquet", rows)
    turn = Turn(f"{PLACE}Same as {PLACE}?", (png(0), png(1)), "No.", "They differ.")
    assert source(tmp_path / "a.parquet")[0].turns == (turn,)
    pa.parquet.write_table(
        pa.table({"question": pa.array([], pa.string())}), tmp_path / "0.parquet"
    )
    assert len(source(tmp_path / "0.parquet")) == 0


def test_parquet_is_copied_once_and_again_when_it_changes(tmp_path, cache):
    """The copy is what makes a random row cheap; a stale one would be yesterday's data."""
    path = write(tmp_path, ".parquet", 100)
    assert source(path)[99] == expected(99, png(99))
    (copy,) = cache.glob("*.arrow")
    before = copy.stat().st_ino
    source(path)
    assert copy.stat().st_ino == before
    write_parquet(path, [record(i) for i in range(7, 9)])
    assert source(path)[0] == expected(7, png(7))
    copy.write_bytes(copy.read_bytes()[:-100])
    assert source(path)[1] == expected(8, png(8))
    assert [file.suffix for file in cache.iterdir()] == [".arrow"]


def test_a_damaged_page_of_parquet_names_the_file(tmp_path):
    """The footer is whole, so it opens: the damage shows when the rows are copied."""
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([record(i) for i in range(50)])
    pa.parquet.write_table(table, path, write_page_checksum=True, compression="zstd")
    data = bytearray(path.read_bytes())
    data[100:4000] = bytes(3900)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="a.parquet"):
        source(path)


def test_an_array_record_may_hold_json_and_bad_records(tmp_path):
    """One bad record is one bad record, also where the file's own checksum finds it."""
    good = {"question": "1?", "answer": "1"}
    write_records(
        tmp_path / "a.array_record",
        [
            b"\n" + json.dumps(good).encode(),
            good,
            b"\xc1",
            b"{bad",
            b"",
            msgpack.packb([1]),
            bytes(99),
        ],
    )
    mine = source(tmp_path / "a.array_record")
    assert mine[0].turns == mine[1].turns == (Turn("1?", (), "1"),)
    assert index(mine).topic.tolist() == [0, 0, -1, -1, -1, -1, -1]
    path = write(tmp_path, ".array_record", 9)
    data = bytearray(path.read_bytes())
    place = data.index(png(4)[20:80])
    data[place] ^= 0xFF
    path.write_bytes(data)
    found = index(source(path))
    assert (found.topic < 0).sum() == 1
    assert "the record is damaged" in found.bad[0][1]


def test_a_tsv_is_read_as_vlmevalkit_reads_it(tmp_path):
    """BENCHMARKS.md: lists, cells that point to another row, names of files, cells of lines."""
    one, two = (base64.b64encode(png(i)).decode() for i in (1, 2))
    header = ["index", "image", "image_path", "question", "hint", "A", "B", "answer"]
    rows = [
        ["1", one, "unused.png", 'Which\n"one"?', "a\tb", "cat", "None", "A"],
        ["7", "1", "", "Which?", "", "cat", "", "A"],
        ["8", f"['{one}', '{two}']", "", "Same?", "", "", "", "no"],
        ["9", "", "['a.png', 'b.png']", "Same?", "", "", "", "no"],
        ["10", "", "a.png", "Which?", "", "", "", "cat"],
        ["11", "", "", "1+1?", "", "", "", "2"],
        ["12", "99", "", "Which?", "", "", "", "cat"],
        ["13", "7", "", "Which?", "", "", "", "cat"],
        ["14", "[" + one, "", "Which?", "", "", "", "cat"],
        ["15", "['x', 3]", "", "Which?", "", "", "", "cat"],
        ["16", "['x' + 3]", "", "Which?", "", "", "", "cat"],
        ["17", "", "", "Which?", "", "", "cat"],
        ["18", "", "", "Which?", "", "", "", ""],
    ]
    path = tmp_path / "a.tsv"
    write_tsv(path, header, rows)
    path.write_bytes(path.read_bytes() + b"19\t\t\t\xff?\t\t\t\tx\r\n20\t\t\ta\rb?\t\t\t\tx\r\n")
    mine = source(path, images="p")
    first = Turn('Hint: a\tb\nWhich\n"one"?\nA. cat\nB. None', (png(1),), "A")
    assert mine[0] == Sample("mine", (first,), "mine/1")
    assert mine[1].turns == (Turn("Which?\nA. cat", (png(1),), "A"),)
    assert mine[2].images == (png(1), png(2))
    assert mine[3].images == ("p/a.png", "p/b.png")
    assert mine[4].images == ("p/a.png",)
    assert mine[5].turns == (Turn("1+1?", (), "2"),)
    told = [
        "its picture is that of row '99', which has none",
        "its picture is that of row '7', which has none",
        "a picture that is not base64",
        "a list of other things than text",
        "a cell that is no list",
        "7 cells, and the header has 8",
        "a question without an answer",
        "not UTF-8",
        "not a row of cells",
    ]
    found = index(mine).bad
    assert len(found) == len(told)
    for (_, reason), words in zip(found, told):
        assert words in reason


def test_the_index_says_what_there_is(tmp_path):
    """Mixtures are made of it: topics by name, modes by the last turn, bad records by place."""
    items = [record(i, f"{i}.png") for i in range(6)]
    del items[2]["answer"]
    items.append(
        {
            "topic": "chat",
            "conversations": [
                {"from": "human", "value": "1?"},
                {"from": "gpt", "value": "<think>a</think>1"},
                {"from": "human", "value": "2?"},
                {"from": "gpt", "value": "2"},
            ],
        }
    )
    write_lines(tmp_path / "a.jsonl", items)
    found = index(source(tmp_path / "a.jsonl"))
    assert found.topics == ("chat", "mine", "sums")
    assert found.topic.tolist() == [1, 2, -1, 2, 1, 2, 0]
    assert found.thinks.tolist() == [True, False, False, True, False, False, False]
    assert found.bad == [("mine/a.jsonl:3", "a question without an answer")]


def test_the_index_is_made_once_and_again_when_something_changes(tmp_path, cache, monkeypatch):
    """A pass over all data is minutes to hours: once, unless the files or the settings changed."""
    path, parsed = tmp_path / "a.jsonl", []
    write_lines(path, [record(i, f"{i}.png") for i in range(9)])
    parse = records.parse
    monkeypatch.setattr(records, "parse", lambda *a, **k: parsed.append(1) or parse(*a, **k))

    def looks(**settings) -> int:
        parsed.clear()
        found = index(source(path, **settings))
        assert len(found.topic) == len(found.thinks) == len(source(path))
        return len(parsed)

    assert [looks(), looks()] == [9, 0]
    assert [looks(topic="cats"), looks(topic="cats"), looks()] == [9, 0, 0]
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert [looks(), looks()] == [9, 0]
    write_lines(path, [record(i, f"{i}.png") for i in range(4)])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert [looks(), looks()] == [4, 0]
    for damage in (lambda data: data[:-1], lambda data: data[:-1] + b"\0", lambda data: b""):
        for file in cache.iterdir():
            file.write_bytes(damage(file.read_bytes()))
        assert [looks(), looks()] == [4, 0]


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    """Without it every start would take the whole pass again, and no one would know why."""
    path = write(tmp_path, ".tar", 2)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot write to .*file/r4b_jax"):
        source(path)


def test_samples_written_are_read_back_as_they_were(tmp_path):
    """Curation's result is read by annealing: ids, topics, turns and pictures are all there."""
    (tmp_path / "1.png").write_bytes(png(1))
    turns = (
        Turn(f"Is {PLACE} like {PLACE}?", (png(0), png(3)), "No.", "They differ."),
        Turn("And <image>?", (png(2),), "<think> No."),
    )
    samples = [
        Sample("a", turns, "mine/x/1", "Be brief."),
        expected(1, str(tmp_path / "1.png")),
        Sample.ask("c", None, "1+1?", "2", "1 twice"),
    ]
    path = tmp_path / "out" / "a.array_record"
    write_array_record(iter(samples), str(path))
    mine = source(path)
    assert mine[0] == samples[0]
    assert mine[1] == expected(1, png(1))
    assert mine[2] == dataclasses.replace(samples[2], id="mine/a.array_record:3")
    assert source(path, "other")[0].id == "other/mine/x/1"
    with pytest.raises(RecordError, match="an empty answer"):
        write_array_record([Sample.ask("c", None, "1+1?", "")], str(path))
    assert os.listdir(path.parent) == ["a.array_record"]
    assert len(source(path)) == 3
