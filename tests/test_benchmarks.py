"""The benchmarks' tables, judges and safety: what tests/test_goldens.py does not need."""

import base64
import contextlib
import csv
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from r4b_jax.config import ConfigError, EndpointConfig
from r4b_jax.evaluation import judge, tables
from r4b_jax.evaluation.benchmarks import BENCHMARKS, PAPER_ROWS, paper_numbers
from r4b_jax.evaluation.scoring import arithmetic, maths, symbolic, wording
from r4b_jax.evaluation.scoring.contract import PROFILES, Ask, Result
from r4b_jax.evaluation.scoring.report import Report, tally

PICTURES = [bytes([i]) * 60 for i in range(4)]
CELLS = [base64.b64encode(picture).decode() for picture in PICTURES]


def write(path, columns: list[str], *rows: list) -> str:
    """A TSV file; its md5."""
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f, delimiter="\t").writerows([columns, *rows])
    return hashlib.md5(path.read_bytes()).hexdigest()


# Tables


def test_a_missing_table_is_told_with_its_md5(tmp_path):
    """The one thing the user can do is to fetch that file: its name and md5 are what they need."""
    with pytest.raises(ConfigError) as told:
        BENCHMARKS["mmstar"].load(root=str(tmp_path))
    assert f"{tmp_path}/MMStar.tsv" in str(told.value)
    assert "e1ecd2140806c1b1bbf54b43372efb9e" in str(told.value)


def test_another_file_under_the_name_is_refused(tmp_path):
    """BLINK's table changed after the paper: the wrong one would give a number that compares with
    nothing."""
    md5 = write(tmp_path / "BLINK.tsv", ["index", "image", "question"], [1, CELLS[0], "?"])
    for profile, wanted in BENCHMARKS["blink"].md5.items():
        with pytest.raises(ConfigError, match=f"BLINK.tsv has md5 {md5}, not {wanted}"):
            BENCHMARKS["blink"].load(profile, str(tmp_path))
    assert len(BENCHMARKS["blink"].load(root=str(tmp_path), any_file=True).rows) == 1
    assert len(tables.read(["BLINK"], md5, str(tmp_path)).rows) == 1


def test_the_folder_is_vlmevalkits(tmp_path, monkeypatch):
    """Who has VLMEvalKit's tables has them there already."""
    monkeypatch.setenv("LMUData", str(tmp_path))
    assert tables.folder() == str(tmp_path)
    monkeypatch.delenv("LMUData")
    assert tables.folder() == os.path.expanduser("~/LMUData")


def test_variants_share_a_table(tmp_path):
    """VLMEvalKit downloads MMMU_Pro_10c twice, under two names; one is enough here."""
    columns = ["index", "image", "question", "A", "answer"]
    write(tmp_path / "MMMU_Pro_10c.tsv", columns, [1, CELLS[0], "?", "x", "A"])
    assert BENCHMARKS["mmmu_pro_10c_cot"].load(root=str(tmp_path), any_file=True).rows


def test_images_come_in_order_and_by_reference(tmp_path):
    """A swapped image is another question; MMBench's rotations hold only the first row's index."""
    md5 = write(
        tmp_path / "X.tsv",
        ["index", "question", "image", "answer"],
        [11, 'one\nline, and "another"', CELLS[0], "A"],
        [1000011, "rotated", "11", "B"],
        [12, "several", str([CELLS[2], CELLS[1]]), "C"],
        [13, "none", "", "D"],
        [14, "last\r\n", CELLS[3], "A"],
    )
    table = tables.read(["X"], md5, str(tmp_path))
    assert [row["index"] for row in table.rows] == [11, 1000011, 12, 14]
    assert table.rows[0]["question"] == 'one\nline, and "another"'
    assert "image" not in table.columns and "image" not in table.rows[0]
    found = [table.images(i) for i in range(4)]
    a, b, c, d = PICTURES
    assert found == [[a], [a], [c, b], [d]]


def test_a_reference_to_no_image_is_told(tmp_path):
    """A rotation whose first row is not in the file must not be asked without its image."""
    write(tmp_path / "X.tsv", ["index", "question", "image"], [1000011, "?", "11"])
    with pytest.raises(ConfigError, match="index 1000011 takes its image from index 11"):
        tables.read(["X"], None, str(tmp_path)).images(0)


def test_images_in_files_are_found(tmp_path):
    """VLMEvalKit splits tables over 1 GB into text and image files."""
    (tmp_path / "images" / "X").mkdir(parents=True)
    (tmp_path / "images" / "X" / "a.png").write_bytes(PICTURES[1])
    rows = [1, "?", "a.png"], [2, "?", "['a.png', 'a.png']"], [3, "?", "b.png"]
    write(tmp_path / "X.tsv", ["index", "question", "image_path"], *rows)
    table = tables.read(["X"], None, str(tmp_path))
    assert [len(table.images(i)) for i in range(2)] == [1, 2]
    assert table.images(0) == [PICTURES[1]]
    with pytest.raises(ConfigError, match=r"no image b\.png"):
        table.images(2)


def test_columns_have_the_types_of_pandas(tmp_path):
    """A missing cell makes 12 a 12.0, and the model is shown that."""
    cells = [["7", "007"], ["7", ""], ["1.50", "2"], ["True", "false"], ["7", "x"], ["", "NA"]]
    wanted = [[7, 7], [7.0, None], [1.5, 2.0], [True, False], ["7", "x"], [None, None]]
    found = [tables.typed_column(column) for column in cells]
    assert found == wanted
    assert [[type(x) for x in column] for column in found] == [
        [type(x) for x in column] for column in wanted
    ]
    assert tables.pandas_float("56.666666666666664") == 56.66666666666666  # pandas' own last digit


def test_what_is_no_table_is_told(tmp_path):
    """A wrong download, such as an error page, must not look like an empty benchmark."""
    (tmp_path / "X.tsv").write_text("<html>\nnot found")
    with pytest.raises(ConfigError, match="X.tsv has no column `index`"):
        tables.read(["X"], None, str(tmp_path))
    (tmp_path / "X.tsv").write_text("index\tquestion\n1\ta\tb\n")
    with pytest.raises(ConfigError, match="a row of 3 cells under 2 names"):
        tables.read(["X"], None, str(tmp_path))
    (tmp_path / "X.tsv").write_bytes(b"index\tquestion\n1\t\xff\n")
    with pytest.raises(ConfigError, match="X.tsv, after byte"):
        tables.read(["X"], None, str(tmp_path))


def test_prediction_files_hold_what_was_predicted(tmp_path):
    """VLMEvalKit's `--mode eval` reads the file with pandas, as our reader does."""
    rows = [{"index": 1, "question": "a\tb", "A": None}, {"index": 2, "question": "c", "A": "x"}]
    predictions = ["line\nline", 'say "B"\t\r\n']
    path = tables.prediction_path(str(tmp_path), "r4b", "MMStar", "20250828-120000")
    assert path == str(tmp_path / "r4b/T20250828-120000/r4b_MMStar.tsv")
    os.makedirs(os.path.dirname(path))
    tables.write_predictions(path, rows, predictions, thinking=["", "hm"])
    found = tables.Table(path)
    assert found.columns == ["index", "question", "A", "prediction", "thinking"]
    assert [row["prediction"] for row in found.rows] == predictions
    assert [row["A"] for row in found.rows] == [None, "x"]
    with pytest.raises(ConfigError, match="no slash"):
        tables.prediction_path(str(tmp_path), "org/r4b", "MMStar", "1")


# Safety


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {file}')",
        "open('{file}', 'w')",
        "[x for x in ().__class__.__base__.__subclasses__()]",
        "exec('import os')",
        "(lambda: 12)()",
    ],
)
def test_a_reply_is_never_run(text, tmp_path):
    """VLMEvalKit runs eval() on what the model wrote."""
    file = tmp_path / "written"
    with pytest.raises(ValueError):
        arithmetic.value(text.format(file=file))
    assert not maths.equal(text.format(file=file), "12") and not file.exists()


@pytest.mark.parametrize("text", ["9**9**9**9", "1<<9**9", "pow(10, 10**10)", "9^{9^{9^{9}}}"])
def test_a_reply_cannot_fill_the_memory(text):
    """Its value would have more digits than the machine has bytes."""
    assert not maths.equal(text, "12")


def test_a_comparison_has_a_deadline(monkeypatch):
    """A parser can take hours for what a model repeats; VLMEvalKit waits for 30 seconds."""
    monkeypatch.setattr(symbolic, "SECONDS", 0.5)
    assert not maths.equal("word " * 5000, "12")
    monkeypatch.setattr(symbolic, "SECONDS", 30.0)
    assert maths.equal("\\frac{6}{8}", "\\frac{3}{4}")  # a new process took over


def test_arithmetic_is_pythons():
    """The strings that VLMEvalKit's eval gives a value, without eval."""
    for text in ("2**3+2", "2^3", "-7//2", "7%4", "1<2", "not 3", "3 and 4", "0 or 5", "1e3", "~3"):
        assert arithmetic.value(text) == eval(text), text
    assert maths.equal("0.75", "3/4") and maths.equal("60^\\circ", "60")
    assert not maths.equal("\\sqrt{50}", "5\\sqrt{2}")  # eval knows no sqrt
    assert not maths.equal("50\\%", "0.5")  # no percentages with the antlr of VLMEvalKit


def test_heavy_packages_stay_out():
    """Scoring a file of predictions must not wait for jax, and needs neither pandas nor torch."""
    code = (
        "import sys; from r4b_jax.evaluation import judge, benchmarks, tables\n"
        "print([x for x in ('jax', 'torch', 'pandas', 'sympy') if x in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Where VLMEvalKit crashes

EMPTY = {
    "mmmu_pro_10c_cot": {"A": "x", "B": "y", "answer": "A", "question": "?"},
    "vlmblind": {"task": "Touching Circles", "answers": "Yes"},
    "wemath": {"A": "x", "B": "y", "answer": "A", "question": "?"},
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_prediction_is_wrong(name):
    """It crashes VLMEvalKit, and with it the evaluation of all other rows."""
    result = BENCHMARKS[name].score({"index": 1} | EMPTY[name], tables.read_back(["", "x"])[0])
    assert result.score == 0


def test_a_subset_has_a_table():
    """VLMEvalKit divides by the rows of sources and categories that are not there."""
    row = {"index": 1, "source": "OE_TO_maths_en_COMP", "final_answer": "['3']", "error": 0.5}
    row |= {"answer_type": "Numerical"}
    result = BENCHMARKS["olympiadbench"].score(row, "So the final answer is \\boxed{3.4}.")
    report = BENCHMARKS["olympiadbench"].report([row], [result])
    assert report.headline == 100 and report.table[0]["zh_maths"] is None
    row = {"index": 1, "category": "Other", "answer": "B"}
    result = BENCHMARKS["visulogic"].score(row, "Answer: \\boxed{B}")
    report = BENCHMARKS["visulogic"].report([row], [result])
    assert report.headline == 100 and report.table[1]["acc"] is None


def test_pairs_and_variants_may_be_incomplete():
    """VLMEvalKit refuses an odd MMVP file, and stops where DynaMath's first variant is missing."""
    rows = [{"index": i} for i in (1, 2, 3)]
    report = BENCHMARKS["mmvp"].report(rows, [Result(1.0), Result(0.0), Result(1.0)])
    assert report.table == [{"Average": pytest.approx(2 / 3), "Overall": 0.0}]
    rows = [{"index": 10 + v, "qid": q, "varid": v} for q, v in ((1, 1), (1, 2), (2, 2))]
    report = BENCHMARKS["dynamath"].report(rows, [Result(1.0), Result(1.0), Result(0.0)])
    assert [line["Overall"] for line in report.table] == [pytest.approx(2 / 3), 1.0]


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("profile", PROFILES)
def test_no_rows_have_a_report(name, profile):
    """A run that was stopped at once can still be looked at."""
    report = BENCHMARKS[name].report([], [], profile)
    assert report.num_rows == 0
    assert report.headline is None or name.startswith("wemath")


def test_numbers_where_a_list_was_meant():
    """DocVQA's [12, 13] crashes VLMEvalKit."""
    assert BENCHMARKS["docvqa"].score({"answer": "[12, 13]"}, "13").score == 1


def test_a_grade_of_nan_is_asked_again():
    """float() takes it, and VLMEvalKit crashes at the end of the run."""
    row = {"question": "?", "answer": "a", "category": "ocr"}
    assert isinstance(BENCHMARKS["mmvet"].score(row, "b", ["nan"]), Ask)
    assert BENCHMARKS["mmvet"].score(row, "b", ["nan", "0.5"]).score == 0.5


# Judges


class Echo:
    """A judge that says the same to all, or what `reply` makes of a question."""

    wording = wording.own()

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def ask(self, questions, progress=None):
        self.asked += questions
        return [self.reply(q) if callable(self.reply) else self.reply for q in questions]


def choices(index: int, answer: str, **more) -> dict:
    return {"index": index, "question": "{odd} question?", "A": "cat", "B": "dog"} | {
        "answer": answer,
        **more,
    }


def test_a_random_letter_is_never_drawn():
    """VLMEvalKit draws one after three replies without a letter: a score of chance."""
    row, mute = choices(1, "A"), Echo("hard to say")
    (result,) = judge.score_all(BENCHMARKS["mmstar"], [row], ["neither"], mute)
    assert (result.score, result.strict, result.asked) == (None, None, 3)
    assert [question.number for question in mute.asked] == [0, 1, 2]
    report = BENCHMARKS["mmstar"].report([row], [result])
    assert (report.headline, report.unjudged) == (None, 1)
    (result,) = judge.score_all(BENCHMARKS["mmstar"], [row], ["neither"], None)
    assert result.score == 0  # no judge was wanted: VLMEvalKit's exact matching


def test_a_lost_group_is_not_asked_about():
    """Each question to a judge costs; a group with a wrong rotation is wrong already."""
    rows = [choices(7, "A", g_index=7), choices(1000007, "B", g_index=7)]
    rows += [choices(8, "A", g_index=8), choices(1000008, "B", g_index=8)]
    predictions = ["neither", "A", "neither", "neither"]
    asking = Echo("B")
    results = judge.score_all(BENCHMARKS["mmbench_v11_en"], rows, predictions, asking)
    assert [question.row for question in asking.asked] == [2]  # and that one is wrong as well
    assert [result.score for result in results] == [None, 0, 0, None]
    report = BENCHMARKS["mmbench_v11_en"].report(rows, results)
    assert (report.headline, report.unjudged, report.asked) == (0, 0, 1)


def test_every_question_has_our_own_wording():
    """Without a checkout of VLMEvalKit its texts are not there; braces in a reply stay as they
    are."""
    kinds = set(wording._BUILDERS) | {f"dynamath_{x}" for x in ("choice", "float", "text")}
    slots = dict.fromkeys(("question", "options", "answer", "extract"), "Q") | {
        "prediction": "\\boxed{x} {question}"
    }
    for kind in kinds:
        text = wording.own().text(Ask(kind, slots))
        shown = slots["prediction"] in text or kind == "mathverse_score"
        assert shown and "{rule}" not in text and "{extra}" not in text, kind


def test_a_checkout_that_is_none_is_told(tmp_path):
    """Else the report would say VLMEvalKit's wording and use another."""
    with pytest.raises(ConfigError, match="is no checkout of VLMEvalKit"):
        wording.of_checkout(str(tmp_path))


@contextlib.contextmanager
def server(content: str, status: int = 200):
    """An OpenAI-compatible server that says `content`; gives (its url, the bodies it was sent)."""
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
            raw = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/v1", bodies
        running.shutdown()


def test_an_endpoint_judges_once(tmp_path):
    """Replies are kept on disk: a run that was stopped pays for none twice."""
    rows, benchmark = [choices(i, "B") for i in range(3)], BENCHMARKS["mmstar"]
    predictions = ["neither", "B", "something else"]
    with server("B") as (url, bodies):
        config = EndpointConfig(url=url, model="j", concurrency=2)
        for _ in range(2):
            asked = judge.EndpointJudge(config, str(tmp_path / "judge"))
            results = judge.score_all(benchmark, rows, predictions, asked)
            assert [result.score for result in results] == [1, 1, 1]
    assert len(bodies) == 2 and {body["temperature"] for body in bodies} == {0.0}
    assert (asked.asked, asked.failed, asked.fault) == (2, 0, "")


def test_a_judge_that_is_gone_leaves_rows_unjudged(tmp_path):
    """Its silence is not the model's mistake, and the next run asks again."""
    config = EndpointConfig(url="http://127.0.0.1:9/v1", model="j", concurrency=1, retries=0)
    gone = judge.EndpointJudge(config, str(tmp_path / "judge"), first_wait=0.01)
    rows = [choices(i, "B") for i in range(4)]
    results = judge.score_all(BENCHMARKS["mmstar"], rows, ["B", "neither", "x", "y"], gone)
    assert [result.score for result in results] == [1, None, None, None]
    assert gone.fault and gone.failed == gone.asked
    report = BENCHMARKS["mmstar"].report(rows, results)
    assert (report.headline, report.unjudged) == (100, 3)


# Reports


def test_the_papers_rows_average_their_benchmarks():
    """MMMU-Pro is two tables; VLMEvalKit gives no number for both."""
    assert PAPER_ROWS["MMMU-Pro"] == ("mmmu_pro_10c", "mmmu_pro_v")
    reports = {name: Report([], 40.0, "") for name in ("mmmu_pro_10c", "mmstar")}
    assert paper_numbers(reports) == {"MMStar": 40.0}
    reports["mmmu_pro_v"] = Report([], 60.0, "")
    assert paper_numbers(reports) == {"MMStar": 40.0, "MMMU-Pro": 50.0}


def test_one_number_hides_nothing():
    """Empty answers, refusals and thoughts without an end are wrong answers of another kind."""
    predictions = [
        "B",
        " ",
        "I’m sorry, I can't help.",
        "<think>so",
        "Failed to obtain answer via API.",
    ]
    assert tally(predictions) == {"empty": 1, "refused": 1, "failed": 1, "unclosed_thought": 1}


def test_headlines_are_percent():
    """The paper's table is; VLMEvalKit's tables are percent, fractions or counts."""
    row = {"answer": "4", "question": "?"}
    benchmark = BENCHMARKS["countbench"]
    for profile, printed in (("aug2025", 1.0), ("head", 100.0)):
        report = benchmark.report([row], [Result(1.0)], profile)
        assert (report.headline, report.table) == (100.0, [{"accuracy": printed}])
