"""Curation: who thinks, decided by people of our own making, by a server that fails on purpose, and
by the own model."""

import collections
import contextlib
import dataclasses
import http.server
import io
import json
import os
import re
import threading
import time

import numpy as np
import PIL.Image
import pytest
from helpers import CONFIG, picture

from r4b_jax import config as c
from r4b_jax import curate as front
from r4b_jax.common.endpoint import Answer, Endpoint
from r4b_jax.config import ConfigError
from r4b_jax.curation import prompts
from r4b_jax.curation.answers import CUT_OFF, Ask, Outside, People, messages, people
from r4b_jax.curation.curate import decide
from r4b_jax.curation.filters import Near, num_words, refusal
from r4b_jax.data.samples import PLACE, Sample, SetAside, Turn
from r4b_jax.data.sources import Source

THOUGHT = "first this, then that"
PLAIN = c.CurationConfig(rewards={"maths": "maths"}, num_answers=4, num_traces=2)
DECIDED = ("decisions.jsonl", "samples.jsonl", "report.json", "report.md", "journal.jsonl")


def settings(batch_size=3, **changes) -> c.Config:
    return dataclasses.replace(
        CONFIG,
        generate=dataclasses.replace(CONFIG.generate, batch_size=batch_size),
        bpo=dataclasses.replace(CONFIG.bpo, reward_workers=0),  # in this process: it is quicker
        curation=dataclasses.replace(PLAIN, **changes),
    )


def maths(number: int, answer="7", thought=None, image=None) -> Sample:
    sample = Sample.ask("maths", image, f"What is problem {number}?", answer, thought)
    return dataclasses.replace(sample, id=f"m{number}")


def essay(number: int, thought=None) -> Sample:
    sample = Sample.ask("essays", None, f"Tell me about theme {number}.", "It is nice.", thought)
    return dataclasses.replace(sample, id=f"e{number}")


class Fake:
    """Answers as `say(question, try)` says: a text, an Answer, or an exception to raise."""

    def __init__(self, say):
        self.say, self.name, self.counters, self.seen = say, "a fake", {"asked": 0}, []

    def ask(self, asks, count=1, first=0):
        self.counters["asked"] += len(asks) * count
        out = []
        for ask in asks:
            out.append([])
            for number in range(first, first + count):
                said = self.say(ask.sample.last.question, number)
                self.seen.append((ask.sample, number))
                if isinstance(said, Exception):
                    raise said
                out[-1].append(said if isinstance(said, Answer) else Answer(said))
        return out


def all_of(teacher="7", judge="DECISION: DIRECT", reasoner=None) -> People:
    """People who say the same to everything, or as a function says; None = there is nobody."""
    said = {"teacher": teacher, "judge": judge, "reasoner": reasoner}
    constant = lambda text: lambda *_: text  # noqa: E731
    fakes = {
        role: None if say is None else Fake(say if callable(say) else constant(say))
        for role, say in said.items()
    }
    return People(**fakes)


def lines(folder, name) -> list[dict]:
    with open(os.path.join(folder, name), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def decided(tmp_path, samples, asked, **changes) -> list[dict]:
    """The decisions about `samples`, checked for what must hold whatever is decided."""
    content = decide(settings(**changes), samples, asked, str(tmp_path))
    found = lines(tmp_path, "decisions.jsonl")
    assert [d["id"] for d in found] == [s.id for s in samples]
    assert all(d["cause"] and d["reason"] for d in found)
    kinds = collections.Counter(d["decision"] for d in found)
    assert content["queries"] == len(found) == sum(content["decisions"].values())
    for decision, count in content["decisions"].items():
        assert count == kinds[decision] == sum(content["causes"][decision].values())
        assert count == sum(row[decision] for row in content["topics"].values())
    kept = [(d["id"], d["decision"] == "reasoning") for d in found if d["decision"] != "set aside"]
    written = lines(tmp_path, "samples.jsonl")
    thinks = [bool(r["messages"][-1]["reasoning_content"]) for r in written]
    assert list(zip([r["id"] for r in written], thinks)) == kept
    return found


# Objective queries


def test_one_right_answer_of_n_is_direct_and_none_is_reasoning(tmp_path):
    """The paper's rule, and the whole of what decides who thinks in mathematics."""

    def say(question, number):
        return "7" if "problem 1?" in question and number == 3 else "8"

    asked = all_of(say)
    easy, hard = decided(tmp_path, [maths(1), maths(2, thought=THOUGHT)], asked)
    assert (easy["decision"], easy["right"], easy["tries"]) == ("direct", 1, 4)
    assert (hard["decision"], hard["right"], hard["tries"]) == ("reasoning", 0, 4)
    assert hard["who"] == "record" and "all 4 answers wrong" in hard["reason"]
    assert len(asked.teacher.seen) == 8


def test_an_answer_that_could_not_be_had_is_not_a_wrong_one(tmp_path):
    """Else an hour in which the server is down would turn every query into a reasoning one."""

    def say(question, number):
        fails = Answer(None, fault="HTTP 500: no") if number == 2 else "8"
        return "7" if "problem 2?" in question and number == 0 else fails

    lost, right = decided(tmp_path, [maths(1, thought=THOUGHT), maths(2)], all_of(say))
    assert (lost["decision"], lost["cause"]) == ("set aside", "answers missing")
    assert lost["reason"] == "teacher: 1 of 4 answers missing (HTTP 500: no)"
    assert (right["decision"], right["right"], right["tries"]) == ("direct", 1, 3)


def test_an_answer_that_cannot_be_graded_is_not_a_wrong_one(tmp_path):
    """A reference that no parser reads would make its query hard for ever."""
    (case,) = decided(tmp_path, [maths(1, answer="?!", thought=THOUGHT)], all_of("8"))
    assert case["cause"] == "answers missing" and "holds no mathematics" in case["reason"]


@pytest.mark.parametrize("whole, decision", [(1, "reasoning"), (0, "set aside")])
def test_an_answer_without_an_end_is_wrong_unless_none_has_one(tmp_path, whole, decision):
    """As in evaluation; but a limit too low for any answer says nothing about the query."""

    def say(_, number):
        return "8" if number < whole else Answer(None, fault=CUT_OFF)

    (case,) = decided(tmp_path, [maths(1, thought=THOUGHT)], all_of(say))
    assert case["decision"] == decision


def test_a_reward_counts_as_right_from_the_setting_on(tmp_path):
    """ANLS gives 0.5 to 1: which of them is right is for the person to say."""
    sample = dataclasses.replace(maths(1, answer="abcd"), topic="words")
    reward = {"rewards": {"words": "anls"}}
    (case,) = decided(tmp_path / "a", [sample], all_of("abcx"), right_from=0.7, **reward)
    assert case["decision"] == "direct"
    (case,) = decided(tmp_path / "b", [sample], all_of("abcx"), right_from=0.8, **reward)
    assert case["cause"] == "no reasoner"


# Subjective queries


def test_a_judge_decides_what_has_no_reward(tmp_path):
    """Half of the paper's topics have no answer that a rule could check."""

    def judge(question, _):
        return {
            "theme 1.": "Several steps.\n**DECISION: REASONING**",
            "theme 2.": "DECISION: REASONING\nno wait\nDecision: direct.",
            "theme 3.": "I would not know.",
            "theme 4.": Answer(None, fault="HTTP 500: no"),
        }[question.split("about ")[2].split("\n")[0]]

    samples = [essay(1, THOUGHT), essay(2), essay(3), essay(4)]
    found = decided(tmp_path, samples, all_of(judge=judge))
    outcomes = [(d["decision"], d["cause"]) for d in found]
    assert outcomes == [
        ("reasoning", "judge"),
        ("direct", "judge"),
        ("set aside", "judge unclear"),
        ("set aside", "judge failed"),
    ]
    assert "HTTP 500" in found[3]["reason"] and "would not know" in found[2]["reason"]
    assert all(d["right"] is None for d in found)


def test_the_judge_sees_pictures_and_earlier_turns(tmp_path):
    """What a question means may stand in them alone; and what is decided is the last turn."""
    turns = (Turn(f"In {PLACE} who?", (picture(1),), "Anna."), Turn("Why is she{0}?", (), "Tired."))
    asked = all_of()
    decided(tmp_path, [Sample("essays", turns, "x", "Be kind.")], asked)
    ((shown, _),) = asked.judge.seen
    assert shown.system == "Be kind." and shown.turns[0] == turns[0]
    assert "Why is she{0}?" in shown.last.question and "DECISION: DIRECT" in shown.last.question


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("AGREE: YES", True),
        ("they differ\n\n> agree - no!", False),
        ("AGREE: YES or AGREE: NO", None),
        ("AGREE: YES\nAGREE: NO", False),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_line_of_its_form(text, verdict):
    """A judge that repeats the choice has not made it."""
    assert prompts.agrees(text) is verdict


# Thoughts


def reasoned(text: str, answer="7") -> Answer:
    return Answer(answer, text)


def test_a_thought_is_tried_until_one_passes(tmp_path):
    """One bad trace of a good reasoner must not cost the sample; each refusal is counted."""
    tries = [reasoned("too short"), reasoned("the sum of all is eight", "8"), reasoned(THOUGHT)]
    asked = all_of("8", reasoner=lambda _, number: tries[number])
    (case,) = decided(tmp_path, [maths(1, thought="As an AI I cannot")], asked, num_traces=3)
    assert (case["decision"], case["who"]) == ("reasoning", "reasoner")
    assert [(r["who"], r["filter"]) for r in case["refused"]] == [
        ("record", "banned words"),
        ("reasoner", "too short"),
        ("reasoner", "another answer"),
    ]
    (record,) = lines(tmp_path, "samples.jsonl")
    assert record["messages"][-1]["reasoning_content"] == THOUGHT
    assert record["messages"][-1]["content"] == "7"  # the reference, not the reasoner's
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["thoughts"] == {"reasoner": 1} and sum(content["refused"].values()) == 3


def test_a_query_without_a_thought_is_set_aside_with_all_that_was_tried(tmp_path):
    """It needs reasoning: as a direct sample it would teach the wrong mode."""
    faults = ["HTTP 500: no after 7 tries", "cut off (length)", ""]
    say = lambda _, number: Answer(None if faults[number] else "8", THOUGHT, faults[number])  # noqa: E731
    asked = all_of("8", reasoner=say)
    (case,) = decided(tmp_path, [maths(1)], asked, num_traces=3)
    assert (case["decision"], case["cause"]) == ("set aside", "no thought passed")
    for told in ("all 4 answers wrong", "no reply", "cut off", "another answer"):
        assert told in case["reason"]


def test_nobody_is_asked_who_is_not_there(tmp_path):
    """Records with thoughts of their own need no reasoner, and a query says whom it lacks."""
    samples = [maths(1), essay(1)]
    found = decided(tmp_path / "a", samples, People(None, None, None))
    assert [d["cause"] for d in found] == ["no teacher", "no judge"]
    found = decided(tmp_path / "b", [maths(1), maths(2, thought=THOUGHT)], all_of("8"))
    assert [d["cause"] for d in found] == ["no reasoner", "all wrong"]


@pytest.mark.parametrize(
    "verdict, cause", [("AGREE: YES", "judge"), ("AGREE: NO", "no thought passed"), ("?", "")]
)
def test_the_judge_compares_answers_that_no_rule_can(tmp_path, verdict, cause):
    """A trace that leads elsewhere than to the answer it is put before teaches to contradict."""

    def judge(question, _):
        return verdict if "AGREE" in question else "DECISION: REASONING"

    asked = all_of(judge=judge, reasoner=Answer("It is very nice.", THOUGHT))
    (case,) = decided(tmp_path, [essay(1)], asked, num_traces=1)
    compared = asked.judge.seen[-1][0].last.question
    assert "It is nice." in compared and "It is very nice." in compared and "theme 1" in compared
    if cause:
        assert case["cause"] == cause
    else:
        assert case["refused"][0]["filter"] == "not compared"


def test_the_same_thought_for_two_questions_about_one_picture_is_about_neither(tmp_path):
    """A reasoner that is stuck writes the same whatever it is asked."""
    samples = [maths(1, image=picture(1)), maths(2, image=picture(1)), maths(3, image=picture(2))]
    asked = all_of("8", reasoner=reasoned("as the picture shows it is seven"))
    found = decided(tmp_path, samples, asked, batch_size=1)
    assert [d["decision"] for d in found] == ["reasoning", "set aside", "reasoning"]
    assert "of the thought of m1" in found[1]["reason"]


@pytest.mark.parametrize(
    "thought, refused",
    [
        (None, "empty"),
        (" \n", "empty"),
        ("two words", "too short"),
        ("one two three", None),
        ("one two three four five six", "too long"),
        ("as  an AI model", "banned words"),
        ("as an aid here", None),
        ("I can’t see the image", "banned words"),
        ("one two \ud83d", "not Unicode"),  # could not be written
        ("三加四得七", None),  # five characters, five words
    ],
)
def test_filters_of_a_thought(thought, refused):
    """Each would be learned, thousands of times."""
    found = refusal(dataclasses.replace(PLAIN, max_thought_words=5), thought)
    assert (found and found[0]) == refused


def test_words_are_counted_in_scripts_without_spaces():
    """A Chinese thought of a thousand characters is not one word."""
    assert num_words("三加四 is 7, ok") == 6


# Near duplicates

STORY = " ".join(f"word{'abcdefghijklmnopqrstuvwxyz'[i % 26]}{'xyz'[i % 3]}" for i in range(60))


@pytest.mark.parametrize(
    "similarity, about, text, twin",
    [
        (0.9, "a", STORY, True),
        (0.9, "a", STORY.upper() + " end", True),  # one triple of 59 is new
        (0.9, "b", STORY, False),  # other pictures
        (0.9, "a", " ".join(STORY.split()[:40]), False),
        (0.9, "a", " ".join(reversed(STORY.split())), False),
        (1.0, "a", "  " + STORY.title(), True),
        (1.0, "a", STORY + " end", False),
    ],
)
def test_near_duplicates_share_most_words_in_order_and_the_pictures(similarity, about, text, twin):
    """What is nearly the same counts twice in training; what only looks so is lost."""
    near = Near(similarity)
    assert near.add("a", STORY, "first") is None
    assert near.add(about, text, "second") == ("first" if twin else None)


def test_the_next_problem_of_a_series_is_no_duplicate():
    """Word problems often differ in nothing but their numbers."""
    near = Near(0.9)
    assert near.add("", STORY + " with 12 apples", "a") is None
    assert near.add("", STORY + " with 13 apples", "b") is None
    assert near.add("", STORY + " with 13 apples.", "c") == "b"


def test_the_index_misses_next_to_nothing():
    """It is made of chances: near the limit it must still find what an exact comparison finds."""
    rng, near, missed = np.random.default_rng(0), Near(0.9), 0
    for i in range(200):
        words = [f"w{chr(97 + a)}{chr(97 + b)}" for a, b in rng.integers(0, 26, (80, 2))]
        near.add(str(i), " ".join(words), f"{i}")
        words[rng.integers(3, 77)] = "other"  # 3 of 78 triples: 0.926
        missed += near.add(str(i), " ".join(words), "twin") is None
    assert missed == 0


# All kinds of records


def test_every_query_ends_with_a_reason_and_the_report_adds_up(tmp_path):
    """Nothing disappears: what is not in the dataset is in the list, with the reason."""
    samples = [
        SetAside("broken", "line 3 is no JSON"),
        maths(1, image=b"no picture"),
        maths(2, image="/no/such/file.png"),
        dataclasses.replace(maths(3), turns=(Turn("And now?", (), "  "),)),
        maths(4),
        dataclasses.replace(maths(4), id="twin"),
        maths(4, image=picture(1)),
        essay(1),
    ]
    found = decided(tmp_path, samples, all_of())
    aside = [d["cause"] for d in found if d["decision"] == "set aside"]
    assert aside == ["unreadable"] * 3 + ["no answer", "duplicate"]
    assert found[0]["reason"] == "line 3 is no JSON" and "/no/such/file.png" in found[2]["reason"]
    assert found[5]["reason"].endswith("m4")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["topics"]["(unknown)"]["queries"] == 1
    assert content["topics"]["maths"]["right"] == [0, 0, 0, 0, 2]
    assert content["who"]["judge"] == {"name": "a fake", "asked": 1}
    report = (tmp_path / "report.md").read_text()
    assert "| maths | 6 | 2 | 0 | 4 | 0.0% |" in report and "unreadable | 3 |" in report
    with PIL.Image.open(tmp_path / "distribution.png") as figure:
        assert figure.width > 600


def test_nothing_at_all_gives_an_empty_report(tmp_path):
    """A filter of the source that lets nothing through is no crash."""
    content = decide(settings(), [], all_of(), str(tmp_path))
    assert content["queries"] == 0


def test_what_was_written_is_read_back_as_it_was(tmp_path):
    """The dataset is worth what a training run reads of it."""
    out = io.BytesIO()
    PIL.Image.fromarray(picture(1)).save(out, "JPEG")
    jpeg, file = out.getvalue(), tmp_path / "own.png"
    PIL.Image.fromarray(picture(2)).save(file)
    turns = (
        Turn(f"First {PLACE}, then {PLACE} with <image> in it", (jpeg, str(file)), "Both."),
        Turn("And this?", (picture(3),), "7 <think>", THOUGHT),
    )
    samples = [Sample("maths", turns, "chat", "Be kind."), maths(2, image=jpeg)]
    folder = tmp_path / "curation"
    found = decided(folder, samples, all_of(lambda q, _: "7" if "problem" in q else "8"))
    assert [d["decision"] for d in found] == ["reasoning", "direct"]
    source = Source("s", c.SourceConfig(path=str(folder / "samples.jsonl")))
    chat, direct = source[0], source[1]
    assert (chat.id, chat.topic, chat.system) == ("s/chat", "maths", "Be kind.")
    assert [(t.question, t.answer, t.thought) for t in chat.turns] == [
        (t.question, t.answer, t.thought) for t in turns
    ]
    assert (direct.question, direct.answer, direct.last.thought) == (
        "What is problem 2?",
        "7",
        None,
    )
    kept, named, array = chat.images
    assert named == str(file) and kept == direct.images[0] and kept.endswith(".jpg")
    with open(kept, "rb") as f:
        assert f.read() == jpeg
    with PIL.Image.open(array) as opened:
        np.testing.assert_array_equal(np.asarray(opened), picture(3))


# Going on


def many(count: int) -> list[Sample]:
    """Queries of both kinds; every third repeats an earlier one."""
    samples = []
    for i in range(count):
        sample = essay(i // 3) if i % 3 == 1 else maths(i // 3, image=picture(i // 2))
        samples.append(dataclasses.replace(sample, id=str(i)))
    return samples


def opinions(stops_at: str = "") -> People:
    """Fakes whose answers depend on the question alone; the teacher breaks at one of them."""

    def teacher(question, number):
        if stops_at and stops_at in question:
            raise RuntimeError("killed")
        return "7" if hash_of(question) % 2 and number == 1 else "8"

    def judge(question, _):
        if "AGREE" in question:
            return "AGREE: YES"
        return "DECISION: REASONING" if hash_of(question) % 2 else "DECISION: DIRECT"

    return all_of(teacher, judge, lambda q, n: Answer("7", f"{THOUGHT} {n} {hash_of(q) % 3}"))


def hash_of(text: str) -> int:
    return sum(text.encode())


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, torn):
    """Curation takes days; and near duplicates span the kill."""
    samples, whole, killed = many(20), tmp_path / "whole", tmp_path / "killed"
    decide(settings(), samples, opinions(), str(whole))
    with pytest.raises(RuntimeError, match="killed"):
        decide(settings(), samples, opinions("problem 5"), str(killed))
    before = len(lines(killed, "decisions.jsonl"))
    assert 0 < before < 20 and before % 3 == 0
    if torn:  # killed within a block: some of its lines are on the disk
        for name in ("decisions.jsonl", "samples.jsonl", "journal.jsonl"):
            with open(killed / name, "a", encoding="utf-8") as f:
                f.write('{"id": "half a li')
    asked = opinions()
    decide(settings(), samples, asked, str(killed))
    assert not any("problem 1?" in s.question for s, _ in asked.teacher.seen)
    for name in DECIDED:
        assert (killed / name).read_text() == (whole / name).read_text(), name
    assert len(lines(whole, "decisions.jsonl")) == 20
    pictures = [sorted(p.name for p in f.rglob("*.png")) for f in (whole, killed)]
    assert pictures[0] == pictures[1] and len(pictures[0]) > 2


def test_a_file_shorter_than_the_journal_says_is_made_again(tmp_path):
    """After a crash of the machine a journal may be ahead of what reached the disk."""
    samples, whole, lost = many(9), tmp_path / "whole", tmp_path / "lost"
    for folder in (whole, lost):
        decide(settings(), samples, opinions(), str(folder))
    os.truncate(lost / "samples.jsonl", 100)
    os.remove(lost / "report.json")
    decide(settings(), samples, opinions(), str(lost))
    assert (lost / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


# Endpoints


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said, seed = body["messages"][-1]["content"], body["seed"]
        if not isinstance(said, str):
            said = "".join(part.get("text", "") for part in said)
        with self.server.lock:
            attempt = self.server.attempts[said, seed]
            self.server.attempts[said, seed] += 1
        if self.server.fails and ("problem 13?" in said or attempt < 3):
            fault = (attempt + seed) % 4
            if "problem 13?" in said or fault == 0:
                return self.reply(500, '{"error": {"message": "out of memory"}}')
            if fault == 1:
                return self.reply(429, "slow down")
            if fault == 2:
                return self.reply(200, "<html>garbage")
            time.sleep(0.6)  # longer than the time-out
        message = say(body["model"], said, seed)
        self.reply(200, json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}))

    def reply(self, status: int, text: str):
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:
            pass  # the client hung up


def say(role: str, said: str, seed: int) -> dict:
    """Teacher, judge and reasoner: odd problems are easy, odd themes want reasoning."""
    number = int(re.search(r"(?:problem|theme) (\d+)", said)[1])
    if role == "judge" and "AGREE" in said:
        return {"content": "AGREE: YES"}
    if role == "judge":
        return {"content": f"DECISION: {'REASONING' if number % 2 else 'DIRECT'}"}
    if role == "teacher":
        return {"content": "\\boxed{7}" if number % 2 and seed == 1 else "\\boxed{8}"}
    return {"content": "\\boxed{7}", "reasoning_content": f"This is about {said} and so on."}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads, running.lock = True, threading.Lock()
    running.attempts, running.fails = collections.Counter(), True
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    with running:
        thread.start()
        yield running
        running.shutdown()


def endpoint(server, role: str) -> c.EndpointConfig:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return c.EndpointConfig(url=url, model=role, timeout=0.4, retries=4, concurrency=8)


def test_a_server_that_fails_on_purpose_costs_only_what_stays_dead(tmp_path, server):
    """429, 500, garbage and time-outs pass; the query that never gets an answer is set aside, and
    the answers that were paid for are never asked for again."""
    samples = [maths(1), maths(2), maths(13), essay(0), essay(1)]
    counters = {}

    def run(name):
        with contextlib.ExitStack() as stack:
            found = {}
            for role in ("teacher", "judge", "reasoner"):
                config = endpoint(server, role)
                shared = Endpoint(config, str(tmp_path / "cache"), first_wait=0.01)
                found[role] = Outside(config, stack.enter_context(shared))
            decisions = decided(tmp_path / name, samples, People(**found))
            counters.update({role: who.counters for role, who in found.items()})
            return decisions

    found = run("a")
    assert [(d["decision"], d["cause"]) for d in found] == [
        ("direct", "right"),
        ("reasoning", "all wrong"),
        ("set aside", "answers missing"),
        ("direct", "judge"),
        ("reasoning", "judge"),
    ]
    assert [d["tries"] for d in found] == [4, 4, 0, None, None]
    assert "4 of 4 answers missing" in found[2]["reason"] and "out of memory" in found[2]["reason"]
    assert counters["teacher"]["failed"] == 4 and counters["teacher"]["retried"] >= 4 * 4 + 8 * 3
    tries = sum(server.attempts.values())
    assert run("b") == found
    assert [counters[role]["asked"] for role in counters] == [4, 0, 0]  # the dead query's answers
    assert sum(server.attempts.values()) == tries + 4 * 5
    server.fails = False  # it is well again: what was missing is asked, and nothing else
    assert run("c")[2]["decision"] == "direct" and counters["teacher"]["asked"] == 4


def test_a_question_is_sent_with_pictures_turns_and_the_form_of_the_answer():
    """An outside model sees what the own one sees, and must answer so that a rule can read it."""
    turns = (Turn(f"See {PLACE}!", (picture(1),), "I do.", "hm"), Turn("How many?", (), "7"))
    said = messages(Ask(Sample("maths", turns, "x", "Be kind."), 0, "maths"))
    system, first, reply, last = said
    assert system == {"role": "system", "content": "Be kind."}
    assert [p["type"] for p in first["content"]] == ["text", "image_url", "text"]
    assert first["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert reply == {"role": "assistant", "content": "I do."}  # thoughts are not shown again
    assert last["content"] == "How many?\n" + prompts.FORMS["maths"]
    assert messages(Ask(Sample("essays", turns[1:], "x"), 0))[-1]["content"] == "How many?"


def test_a_picture_is_sent_as_it_is_unless_a_server_might_turn_it():
    """Photos of phones lie on their side until their EXIF is read; a TIFF is read by few."""
    upright, turned, tiff = io.BytesIO(), io.BytesIO(), io.BytesIO()
    image = PIL.Image.new("RGB", (4, 2), "red")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image.save(upright, "JPEG")
    image.save(turned, "JPEG", exif=exif)
    image.save(tiff, "TIFF")
    turn = Turn("?", tuple(x.getvalue() for x in (upright, turned, tiff)), "7")
    *sent, _ = messages(Ask(Sample("t", (turn,), "x"), 0))[0]["content"]
    kinds = [part["image_url"]["url"].split(";")[0] for part in sent]
    assert kinds == ["data:image/jpeg", "data:image/png", "data:image/png"]


def test_the_front_curates_a_persons_own_file(tmp_path, server, capsys):
    """The command as the README has it, without any model of our own."""
    server.fails = False
    records = [{"id": f"q{i}", "question": f"What is problem {i}?", "answer": 7} for i in range(6)]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in records) + "{broken\n")
    asked = {role: endpoint(server, role) for role in ("teacher", "reasoner")}
    sources = {"mine": c.SourceConfig(path=str(data), topic="maths")}
    config = dataclasses.replace(settings(**asked), sources=sources)
    content = front.curate(config, str(tmp_path / "work"))
    assert content["decisions"] == {"direct": 3, "reasoning": 3, "set aside": 1}
    assert content["causes"]["set aside"] == {"unreadable": 1}
    assert content["who"]["judge"] == {"name": "nobody"}
    requests = sum(server.attempts.values())
    assert front.curate(config, str(tmp_path / "work")) == content  # done: shown again
    assert sum(server.attempts.values()) == requests == 6 * 4 + 3
    assert "who thinks" in capsys.readouterr().out
    other = dataclasses.replace(settings(num_answers=2, **asked), sources=sources)
    with pytest.raises(ConfigError, match="other settings"):
        front.curate(other, str(tmp_path / "work"))


def test_the_front_refuses_rewards_without_a_teacher(tmp_path):
    """Random weights are nobody to learn from."""
    sources = {"mine": c.SourceConfig(path="mine.jsonl")}
    with pytest.raises(ConfigError, match="no teacher"):
        front.curate(dataclasses.replace(settings(), sources=sources), str(tmp_path))


# The own model


def own(**changes) -> c.Config:
    config = settings(batch_size=4, num_answers=3, min_thought_words=1, **changes)
    # Random weights seldom end, and never soon.
    generate = dataclasses.replace(config.generate, prompt_len=480, max_new_tokens=50)
    return dataclasses.replace(config, generate=generate)


def own_queries() -> list[Sample]:
    return [maths(i, image=picture(i)) for i in range(5)] + [with_picture(essay(1))]


def with_picture(sample: Sample) -> Sample:
    """One shape of prompts, one compilation."""
    last = dataclasses.replace(sample.last, images=(picture(9),))
    return dataclasses.replace(sample, turns=(last,))


def test_the_own_model_decides_and_a_killed_run_ends_alike(tmp_path, tokenizer, params):
    """In a run the model of the stage before is teacher, judge and reasoner; and its samples must
    not depend on when the run was killed."""
    config, samples = own(), own_queries()
    with people(config, params, tokenizer, "") as asked:
        found = decided(tmp_path / "whole", samples, asked, **changes_of(config))
        assert asked.teacher.counters["asked"] == 5 * 3
        with pytest.raises(AttributeError):  # in its second block
            decide(config, [*samples[:4], None, None], asked, str(tmp_path / "killed"))
    assert len(lines(tmp_path / "killed", "decisions.jsonl")) == 4
    with people(config, params, tokenizer, "") as asked:
        decide(config, samples, asked, str(tmp_path / "killed"))
    for name in ("decisions.jsonl", "samples.jsonl"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert all(d["tries"] == 3 for d in found if d["topic"] == "maths")
    assert found[-1]["cause"] in ("judge", "judge unclear", "judge failed")


def changes_of(config: c.Config) -> dict:
    values = {f.name: getattr(config.curation, f.name) for f in dataclasses.fields(PLAIN)}
    return {"batch_size": config.generate.batch_size} | values


def test_the_own_models_answers_depend_on_query_and_try_alone(tokenizer, params):
    """Not on the block: else another batch size, or one query more, would decide otherwise."""
    config, samples = own(), own_queries()
    with people(config, params, tokenizer, "") as asked:
        asks = [Ask(sample, number) for number, sample in enumerate(samples[:5])]
        together = asked.teacher.ask(asks, 3)
        assert [len(a) for a in together] == [3] * 5
        assert len({a.text or a.fault for of_one in together for a in of_one}) > 1
        assert asked.teacher.ask(asks[3:4], 2, first=1) == [together[3][1:]]
        thinking = asked.reasoner.ask(asks[:2])
        assert all(a.thought for (a,) in thinking)
        assert not any(a.thought for of_one in together for a in of_one)


def test_a_prompt_too_long_for_the_own_model_is_one_querys_fault(tokenizer, params):
    """One long question among thousands must not stop the run, nor shift its neighbours."""
    config = own()
    long = Sample.ask("maths", None, "long " * 500, "7")
    asks = [Ask(with_picture(maths(0)), 0), Ask(long, 1), Ask(maths(2, image=b"x"), 2)]
    asks.append(Ask(with_picture(maths(3)), 3))
    with people(config, params, tokenizer, "") as asked:
        first, second, third, fourth = asked.teacher.ask(asks, 2)
        assert [a.text for a in second + third] == [None] * 4
        assert "exceeds generate.prompt_len" in second[0].fault and "read" in third[0].fault
        assert asked.teacher.ask([asks[3]], 2) == [fourth] and len(first) == 2
