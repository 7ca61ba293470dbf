"""The benchmarks' run: every format answered, killed, resumed, scored and reported."""

import base64
import csv
import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import PIL.Image
import pytest
import reference
from helpers import MODEL, picture

from r4b_jax import evaluate as front
from r4b_jax.config import ConfigError, EndpointConfig, GenerateConfig
from r4b_jax.data.samples import PLACE
from r4b_jax.decoding.chat import Model
from r4b_jax.evaluation import judge as judging
from r4b_jax.evaluation import knob, paper, records, runner, scores, tables
from r4b_jax.evaluation.benchmarks import BENCHMARKS, PAPER_ROWS
from r4b_jax.evaluation.scoring import wording

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "dev"
ROWS = 4  # of each format
SETTINGS = runner.Settings(
    generate=GenerateConfig(prompt_len=1500, max_new_tokens=24, batch_size=3, queries_at_once=3)
)
ALL = [name for names in PAPER_ROWS.values() for name in names]


# Tables


def png(seed: int, width: int = 9, height: int = 8) -> str:
    out = io.BytesIO()
    PIL.Image.fromarray(picture(seed, max(width, height))[:height, :width]).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def golden_rows(name: str, count: int = ROWS) -> list[dict]:
    with open(GOLDENS / f"{name}.jsonl", encoding="utf-8") as f:
        found = [json.loads(line) for line in f]
    return [line for line in found if line["kind"] == "row"][:count]


def write_table(folder, name: str, count: int = ROWS, broken=()) -> list[dict]:
    """The benchmark's TSV with rows of its goldens and small pictures; of the rows in `broken`
    none can be read."""
    rows = golden_rows(name, count)
    columns = list(rows[0]["row"])
    path = os.path.join(folder, f"{BENCHMARKS[name].dataset}.tsv")
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, delimiter="\t")
        writer.writerow([*columns, "image"])
        for i, line in enumerate(rows):
            number = line.get("n_images", 1)
            cells = [png(10 * i + n, 8 + i) for n in range(number)]
            if i in broken:
                cells = [base64.b64encode(b"<html>" * 20).decode()] * number
            known = ["" if (c := line["row"][column]) is None else c for column in columns]
            writer.writerow([*known, cells[0] if number == 1 else str(cells)])
    return rows


def load(folder, names) -> dict[str, tables.Table]:
    return {name: BENCHMARKS[name].load("aug2025", str(folder), any_file=True) for name in names}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("LMUData")
    for name in ALL:
        write_table(folder, name)
    return folder


@pytest.fixture(scope="module")
def model(params, tokenizer) -> Model:
    """MODEL, some of whose replies end, and which chooses both modes: longer embeddings."""
    params = dict(params, language_model=dict(params["language_model"]))
    embedding = np.array(params["language_model"]["embed_tokens"])
    embedding[tokenizer.end_id] *= 2
    embedding[[tokenizer.thinking_id, tokenizer.end_think_id]] *= 1.5
    embedding[tokenizer.direct_id] *= -1.5
    params["language_model"]["embed_tokens"] = embedding
    return Model(MODEL, params, tokenizer, 4096)


def run(model, folder, names, out, settings=SETTINGS, **options) -> dict:
    options = {"any_file": True} | options
    return runner.evaluate(model, load(folder, names), settings, str(out), **options)


def files(out) -> dict[str, bytes]:
    """Everything that a run wrote, but for what names its time."""
    found = {}
    for path in sorted(pathlib.Path(out).rglob("*")):
        name = re.sub(r"T\d{8}-\d{6}", "T", path.relative_to(out).as_posix())
        if path.is_file() and name != "lock":
            found[name] = re.sub(rb"\d{8}-\d{6}", b"", path.read_bytes())
    return found


def dumped(value) -> str:
    return json.dumps(value, sort_keys=True)


def lines(path) -> list[dict]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """(folder, report.json) of a run over all 25 formats that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(model, data, ALL, out)


# One whole run


def test_all_25_formats_are_answered_in_all_modes(whole):
    """A format that cannot be asked would be found after hours, on the real tables."""
    (out, content), seen = whole, set()
    assert set(content["benchmarks"]) == set(ALL) and len(content["table"]) == 25
    for name in ALL:
        found = lines(out / "records" / f"{name}.jsonl")
        keys = [(record["row"], record["mode"]) for record in found]
        count = content["benchmarks"][name]["rows"]
        assert sorted(keys) == [(r, m) for r in range(count) for m in sorted(SETTINGS.modes)]
        for record in found:
            assert 0 < record["p_think"] < 1 and len(record["prompt"]) == 64
            assert record["tokens"] <= 24
            if record["mode"] != "auto":
                assert record["chosen"] == record["mode"]
            if record["finish"] == "length":
                assert record["answer"] is None and "cut_off" in record
            seen.add((record["mode"], record["chosen"], record["finish"]))
    assert seen >= {("non-thinking", "non-thinking", finish) for finish in ("end", "length")}
    assert {chosen for mode, chosen, _ in seen if mode == "auto"} > {"thinking", "non-thinking"}


def test_auto_mode_is_one_of_the_forced_modes(whole):
    """Both follow from one prefill and one token: what differs was computed from another prompt."""
    out, _ = whole
    for name in ALL:
        by_row: dict = {}
        for record in lines(out / "records" / f"{name}.jsonl"):
            by_row.setdefault(record["row"], {})[record["mode"]] = record
        for modes in by_row.values():
            assert len({tuple(record["mode_logps"]) for record in modes.values()}) == 1
            auto = modes["auto"]
            if auto["chosen"] == "thinking":
                assert auto["thought"] == modes["thinking"]["thought"]
                assert auto["answer"] == modes["thinking"]["answer"]


def test_the_reports_numbers_are_those_of_the_records(whole):
    """A reader adds them up: accuracy from scores, tokens and counts from records."""
    out, content = whole
    for name in ALL:
        part = content["benchmarks"][name]
        for mode, cell in part["modes"].items():
            found = [r for r in lines(out / "records" / f"{name}.jsonl") if r["mode"] == mode]
            assert cell["tokens"] == np.mean([r["tokens"] for r in found])
            assert cell["truncated"] == sum(r["finish"] == "length" for r in found)
            assert cell["answered"] == part["rows"] and not part["set_aside"]
            if mode == "auto":
                assert cell["think_rate"] == np.mean([r["thinks"] for r in found])
    scored = lines(out / "scores" / "mmstar.jsonl")
    for mode, cell in content["benchmarks"]["mmstar"]["modes"].items():
        values = [record["score"] for record in scored if record["mode"] == mode]
        assert cell["score"] == pytest.approx(100 * np.mean(values)) and len(values) == ROWS


def test_scored_records_are_what_calibrate_takes(whole):
    """The bias is chosen from the same run, without another look at the model."""
    out, _ = whole
    queries = knob.pair(knob.read(str(out / "scores" / "mmstar.jsonl")))
    assert len(queries.thresholds) == ROWS and set(queries.topics) == {"mmstar"}


def test_the_same_command_again_asks_nothing_and_writes_the_same(whole, model, data, monkeypatch):
    """To see a report again must not cost a run."""
    out, content = whole
    before = files(out)
    monkeypatch.setattr(runner, "generate", None)
    again = run(model, data, ALL, out)
    assert files(out) == before
    assert json.dumps(again, default=str) == json.dumps(content, default=str)


def test_the_report_hides_nothing(whole):
    """Truncated, empty, refused, unjudged, set aside: each count stands in each form."""
    out, content = whole
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    for title, figures in paper.TABLE.items():
        row = next(line for line in text.split("\n") if line.startswith(f"| {title} |"))
        cells = re.sub(r"[*†]", "", row).split(" | ")
        assert cells[4:9] == [f"{figure:.1f}" for figure in figures]
    for said in ("profile aug2025", "truncated", "refused", "unjudged", "set aside", "no judge"):
        assert said in text and said in page
    assert "unjudged, outside the mean" in " ".join(content["remarks"])
    assert content["benchmarks"]["mmvet"]["modes"]["auto"]["score"] is None
    assert "data:image/png;base64," in page and "http" not in re.sub(
        "https?://[^ <]*arxiv", "", page
    )
    for name in ("table.png", "tokens.png"):
        assert PIL.Image.open(out / name).width > 500


def test_the_papers_table_is_ours():
    """A row whose title is spelled otherwise would stand without the paper's figures."""
    assert list(paper.TABLE) == list(PAPER_ROWS)
    assert set(paper.TOKENS) | set(paper.OPEN) <= set(PAPER_ROWS)
    assert all(len(figures) == len(paper.COLUMNS) for figures in paper.TABLE.values())


# Killed and resumed


class Killed(BaseException):
    pass


SOME = ["mmmu_val", "mmstar", "olympiadbench"]


@pytest.fixture(scope="module")
def undisturbed(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    run(model, data, SOME, out)
    return files(out)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_item_and_resumed_it_is_the_same_run(
    model, data, undisturbed, tmp_path, monkeypatch, seed
):
    """No gap, no repeat, not one other byte: thoughts and log-probabilities included."""
    rng, made = np.random.default_rng(seed), runner.record_of
    left = int(rng.integers(0, 30))
    kills = 0

    def deadly(*args):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return made(*args)

    monkeypatch.setattr(runner, "record_of", deadly)
    while True:
        try:
            run(model, data, SOME, tmp_path)
            break
        except Killed:
            kills += 1
            left = int(rng.integers(1, 30))
            for path in (tmp_path / "records").iterdir():  # as a kill within a write leaves it
                if path.stat().st_size and rng.random() < 0.5:
                    with open(path, "ab") as f:
                        f.write(b'{"benchmark": "mms')
    assert kills and files(tmp_path) == undisturbed


def test_a_file_cut_anywhere_is_mended(model, data, undisturbed, tmp_path):
    """kill -9 leaves any number of bytes of the last line; a whole one without its newline is half
    a line, too."""
    run(model, data, SOME, tmp_path)
    path = tmp_path / "records" / "mmstar.jsonl"
    content = path.read_bytes()
    last = content.rindex(b"\n", 0, -1) + 1
    for size in (len(content) - 1, last + 1, last, content.index(b"\n"), 1, 0):
        path.write_bytes(content[:size])
        run(model, data, SOME, tmp_path)
        assert files(tmp_path) == undisturbed


def test_a_damaged_line_that_is_not_the_last_is_told(tmp_path):
    """Cut off silently, every record behind it would be lost."""
    path = tmp_path / "mmstar.jsonl"
    path.write_text('{"row": 0, "mode": "auto"}\n{"row": 1, "mo\n{"row": 2, "mode": "auto"}\n')
    with pytest.raises(ConfigError, match="line 2 is damaged"):
        records.Records(str(path))
    assert path.read_text().count("\n") == 3


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    """Two writers would give every record twice; a lock that outlives a kill would stop all."""
    code = (
        "import sys, time; from r4b_jax.evaluation.records import Folder\n"
        "Folder(sys.argv[1], {'a': 1}); "
    )
    with records.Folder(str(tmp_path), {"a": 1}):
        with pytest.raises(ConfigError, match=f"written by process {os.getpid()}"):
            records.Folder(str(tmp_path), {"a": 1})
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
        )
        assert other.returncode and "one at a time" in other.stderr
    held = code + "f = Folder(sys.argv[1], {'a': 1}); print('held', flush=True); time.sleep(60)"
    held = held.replace("Folder(sys.argv[1], {'a': 1}); f", "f")
    process = subprocess.Popen([sys.executable, "-c", held, str(tmp_path)], stdout=-1, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {process.pid}"):
        records.Folder(str(tmp_path), {"a": 1})
    process.kill()
    process.wait()
    records.Folder(str(tmp_path), {"a": 1}).close()


@pytest.mark.parametrize(
    "name, change",
    [
        ("max_new_tokens", dict(generate=dataclasses.replace(SETTINGS.generate, max_new_tokens=9))),
        ("modes", dict(modes=("auto",))),
        ("think_bias", dict(think_bias=0.5)),
        ("limit", dict(limit=2)),
        ("weights", {}),
    ],
)
def test_other_settings_than_the_folders_are_refused_by_name(
    model, data, whole, params, tokenizer, name, change
):
    """Half a benchmark of one model and half of another is a number of none."""
    before = files(whole[0])
    if name == "weights":
        model = Model(MODEL, params, tokenizer, 4096)
    with pytest.raises(ConfigError, match=f"{name}: .* there, .* here"):
        run(model, data, ["mmstar"], whole[0], dataclasses.replace(SETTINGS, **change))
    assert files(whole[0]) == before


def test_another_table_is_refused(model, tmp_path):
    """Rows are named by their places: with another table, answers would go to other questions."""
    write_table(tmp_path, "mmstar", 3)
    run(model, tmp_path, ["mmstar"], tmp_path / "out")
    write_table(tmp_path, "mmstar", 4)
    with pytest.raises(ConfigError, match="from a table with md5"):
        run(model, tmp_path, ["mmstar"], tmp_path / "out")


# What goes wrong in a benchmark


def test_a_picture_that_cannot_be_read_is_neither_right_nor_wrong(model, tmp_path):
    """It is set aside with its id and reason, and stands in no mean; but VLMEvalKit's number has
    it."""
    rows = write_table(tmp_path, "mmstar", 7, broken=(2,))
    content = run(model, tmp_path, ["mmstar"], tmp_path / "out")
    part = content["benchmarks"]["mmstar"]
    index = str(rows[2]["row"]["index"])
    assert list(part["set_aside"]) == [index] and "cannot read" in part["set_aside"][index]
    for cell in part["modes"].values():
        assert (cell["answered"], cell["unjudged"]) == (6, 0)
        assert cell["vlmevalkit_score"] == pytest.approx(cell["score"] * 6 / 7)
    assert f"MMStar {index}: cannot read" in (tmp_path / "out" / "report.md").read_text()
    assert run(model, tmp_path, ["mmstar"], tmp_path / "out") == content


def test_a_picture_that_breaks_in_its_pixels_spoils_no_neighbour(model, tmp_path):
    """Its header is fine, so it is found when its batch is made; the others answer as ever."""
    write_table(tmp_path, "mmstar", 7)
    run(model, tmp_path, ["mmstar"], tmp_path / "out")
    expected = lines(tmp_path / "out" / "records" / "mmstar.jsonl")
    path = tmp_path / "MMStar.tsv"
    cut = base64.b64encode(base64.b64decode(png(40, 12))[:120]).decode()
    path.write_text(path.read_text().replace(png(40, 12), cut))
    content = run(model, tmp_path, ["mmstar"], tmp_path / "other")
    found = lines(tmp_path / "other" / "records" / "mmstar.jsonl")
    assert list(content["benchmarks"]["mmstar"]["set_aside"]) == ["4"]
    kept = [record for record in found if "mode" in record]
    assert kept == [record for record in expected if record["row"] != 4]


def test_a_prompt_longer_than_the_context_is_set_aside(model, data, whole, tmp_path):
    """One long prompt is no reason to lose a benchmark; all too long is a wrong setting."""
    found = lines(whole[0] / "records" / "mmstar.jsonl")
    lengths = sorted({record["prompt_tokens"] for record in found})
    sizes = dataclasses.replace(SETTINGS.generate, prompt_len=lengths[-2])
    settings = dataclasses.replace(SETTINGS, generate=sizes)
    content = run(model, data, ["mmstar"], tmp_path / "out", settings)
    [reason] = content["benchmarks"]["mmstar"]["set_aside"].values()
    assert reason == f"the prompt has {lengths[-1]} tokens, more than {lengths[-2]}"
    with pytest.raises(ConfigError, match="no query can be asked"):
        run(model, data, ["dynamath"], tmp_path / "out", settings)
    short = Model(model.config, model.params, model.tokenizer, 20)
    with pytest.raises(ConfigError, match="no room for a prompt"):
        run(short, data, ["mmstar"], tmp_path / "none")


def test_pictures_stand_where_the_benchmark_shows_them(data):
    """MMMU shows them within the question, OlympiadBench after it, all others first."""
    shown = {}
    for name in ("mmmu_val", "olympiadbench", "blink"):
        table = load(data, [name])[name]
        queries = [runner.query_of(BENCHMARKS[name], table, row) for row in range(ROWS)]
        shown[name] = [query.sample.last.question for query in queries]
        for query in queries:
            marks = query.sample.last.question.count(PLACE)
            assert marks in (0, len(query.sample.images))
    assert any(PLACE in text.strip(PLACE) for text in shown["mmmu_val"])
    assert all(text.rstrip(PLACE) and text.endswith(PLACE) for text in shown["olympiadbench"])
    assert not any(PLACE in text for text in shown["blink"])


def test_what_is_cut_off_is_no_prediction(model, tokenizer):
    """FAULTS 17: neither a thought nor half an answer is scored, and both are told apart."""
    end, close = tokenizer.end_id, tokenizer.end_think_id
    thinking, direct = tokenizer.thinking_id, tokenizer.direct_id
    seven = tokenizer.encode("7")
    asker = runner.Asker(model, dataclasses.replace(SETTINGS, modes=("auto",)))
    job = scores.Job(BENCHMARKS["mmstar"], None, 0, None)
    job = dataclasses.replace(job, table=types.SimpleNamespace(rows=[{"index": 1}]))
    for ids, answer, finish, chosen in (
        ([thinking, *seven, close, *seven, end], "7", "end", "thinking"),
        ([thinking, *seven], None, "length", "thinking"),
        ([thinking, *seven, close, *seven], None, "length", "thinking"),
        ([thinking, *seven, end], None, "end", "thinking"),
        ([direct, close, *seven, end], "7", "end", "non-thinking"),
        ([direct, close, *seven], None, "length", "non-thinking"),
        ([direct, close, end], "", "end", "non-thinking"),
        ([*seven, close, *seven, end], "7", "end", "neither"),
    ):
        out = types.SimpleNamespace(
            tokens=np.array([[ids]]),
            lengths=np.array([[len(ids)]]),
            mode_logps=np.zeros((1, 2), np.float32),
        )
        query = runner.Query(0, None, "hash")
        record = runner.record_of(asker, job, query, 5, out, 0, 0)
        assert (record["answer"], record["finish"], record["chosen"]) == (answer, finish, chosen)
        if answer is None and close in ids:
            assert record["cut_off"] == "7"


def test_queries_at_work_are_those_that_fit(model, monkeypatch):
    """Keys and values of long replies fill a device: found out by running it is hours too late."""
    asker, language = runner.Asker(model, SETTINGS), MODEL.language
    width = language.num_layers * 2 * language.num_kv_heads * language.head_dim * 4
    held = sum(x.nbytes for x in jax.tree.leaves(asker.params))

    def fitting(queries: float) -> int:
        limit = held + queries * width * (64 + 3 * 24) / runner.MEMORY_SHARE
        device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit})
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        return asker._fitting(64)

    assert [fitting(n) for n in (0.5, 1.01, 2.01, 100)] == [1, 1, 2, 3]


def test_refusals_are_known_by_their_beginning():
    """A count that also takes answers would hide that nothing was refused."""
    for text in ("I'm sorry, but I can't", "Sorry, no.", "I cannot see it", "Unable to tell"):
        assert scores.refuses(text), text
    for text in ("B", "He said sorry", "No, I can", "The sign says: I cannot wait", "Sorrow"):
        assert not scores.refuses(text), text


# Scores


def answered_with_goldens(monkeypatch, name: str, count: int):
    """Every reply becomes the prediction of the golden row."""
    predictions = [line["prediction"] for line in golden_rows(name, count)]
    made = runner.record_of

    def canned(*args):
        record = made(*args)
        return record | {"answer": predictions[record["row"]], "finish": "end"}

    monkeypatch.setattr(runner, "record_of", canned)
    return predictions


@pytest.mark.parametrize("name", ["mmstar", "mmbench_v11_en", "ocrbench", "hallusionbench"])
def test_scores_and_prediction_files_are_vlmevalkits(model, tmp_path, monkeypatch, name):
    """The way from reply to number, against what VLMEvalKit made of the same predictions."""
    rows = write_table(tmp_path, name, 100)
    predictions = answered_with_goldens(monkeypatch, name, 100)
    out, dataset = tmp_path / "out", BENCHMARKS[name].dataset
    content = run(model, tmp_path, [name], out, profile="head", name="m")
    cell = content["benchmarks"][name]["modes"]["auto"]
    with open(GOLDENS / f"{name}.jsonl", encoding="utf-8") as f:
        [golden] = [
            line
            for line in map(json.loads, f)
            if line["kind"] == "aggregate" and line["mode"] in ("exact_matching", "no_judge")
        ]
    theirs = golden["result"]
    theirs = theirs if isinstance(theirs, list) else [theirs]
    assert sorted(map(dumped, cell["table"])) == sorted(map(dumped, theirs))
    [path] = out.glob(f"m-auto/T*/m-auto_{dataset}.tsv")
    with open(path, encoding="utf-8", newline="") as f:
        file = list(csv.DictReader(f, delimiter="\t"))
    assert list(file[0]) == [*rows[0]["row"], "prediction"]
    assert [line["prediction"] for line in file] == predictions
    assert [line["index"] for line in file] == [str(row["row"]["index"]) for row in rows]


class Judge:
    """Says `text` to every question, and remembers them; None = it never answers."""

    def __init__(self, text):
        self.text, self.questions, self.wording = text, [], wording.own()

    def ask(self, questions, progress=None):
        self.questions += questions
        return [self.text] * len(questions)


def test_rows_that_no_judge_decides_are_unjudged_and_said_to_be(model, data, tmp_path):
    """An unreachable judge is not the model's mistake, and an average without those rows says so;
    with a judge the same records are scored without a model."""
    config = EndpointConfig(url="http://127.0.0.1:9/v1", model="none", concurrency=2, retries=0)
    down = judging.EndpointJudge(config, str(tmp_path / "judge"), first_wait=0.01)
    content = run(model, data, ["mmvet"], tmp_path / "out", judge=down)
    cell = content["benchmarks"]["mmvet"]["modes"]["auto"]
    assert (cell["score"], cell["unjudged"], cell["vlmevalkit_score"]) == (None, ROWS, 0)
    assert content["judge"]["failed"] and any("given up" in x for x in content["remarks"])
    assert "| –† |" in (tmp_path / "out" / "report.md").read_text()
    up = Judge("0.5")
    content = run(model, data, ["mmvet"], tmp_path / "out", judge=up)
    cell = content["benchmarks"]["mmvet"]["modes"]["auto"]
    assert (cell["score"], cell["unjudged"], cell["asked"]) == (50, 0, ROWS)
    assert len(up.questions) == 3 * ROWS and content["judge"]["model"] == "Judge"


def test_the_profile_is_named_with_every_score(model, data, whole, capsys):
    """The same records give another number by other rules."""
    out, _ = whole
    before = files(out)
    content = run(model, data, ["countbench"], out, profile="head")
    assert content["about"]["profile"] == "head" and "[head]" in capsys.readouterr().out
    assert "profile head" in (out / "report.md").read_text()
    run(model, data, ALL, out)
    assert files(out) == before


# The command line


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return reference.save(reference.whole(tokenizer), tokenizer, folder, released=True)


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, args)])
    front.main()


def test_a_run_from_the_command_line(monkeypatch, capsys, folder, data, tmp_path):
    """The command of the README, on a few queries."""
    args = [folder, "--data", data, "--any-file", "--out", tmp_path, "--max-new-tokens", 6]
    args += ["--benchmarks=MMStar,mathvista_mini", "--modes=auto,short", "--limit=2"]
    args += ["--batch-size=2", "--max-prompt-tokens=900", "--name=mine"]
    command(monkeypatch, *args)
    assert "report.html" in capsys.readouterr().out
    content = json.loads((tmp_path / "report.json").read_text())
    assert list(content["benchmarks"]) == ["mmstar", "mathvista"]
    assert list(content["benchmarks"]["mmstar"]["modes"]) == ["auto", "non-thinking"]
    assert "Only the first 2 queries" in " ".join(content["remarks"])
    assert not list(tmp_path.glob("mine-*"))  # VLMEvalKit refuses a part of a table


def test_mistakes_on_the_command_line_are_one_line(monkeypatch, capsys, tmp_path, data):
    """Told before anything heavy is read: a missing table after hours is too late."""
    for args, said in (
        (["--benchmarks=mmstarr"], "did you mean mmstar?"),
        (["--modes=deep"], "--modes are some of auto"),
        (["--profile=2025"], "--profile is one of aug2025, head"),
        (["--benchmarks=mmstar", "--data", tmp_path], "MMStar.tsv is missing"),
        (["--benchmarks=mmstar", "--data", data], "has md5"),
        (["--limit=-1"], "--limit is at least 0"),
        (["--think-bias=inf"], "--think-bias is finite"),
        (["--judge-url=http://x"], "go together"),
        (["--benchmarks=mmstar", "--data", data, "--any-file"], "there is no folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, tmp_path / "none", "--out", tmp_path, *args)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and said in error, error
