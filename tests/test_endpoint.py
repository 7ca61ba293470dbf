"""The client of OpenAI-compatible servers, against a real server that fails on purpose."""

import asyncio
import base64
import collections
import contextlib
import dataclasses
import email.utils
import http.server
import io
import json
import logging
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import PIL.Image
import pytest

from r4b_jax.common import endpoint
from r4b_jax.common.endpoint import Answer, Endpoint, Request, user_message
from r4b_jax.config import ConfigError, EndpointConfig

KEY = "sk-secret-0123456789"


def reply(content="yes", finish_reason="stop", **message) -> dict:
    """The JSON of a completion."""
    message = {"role": "assistant", "content": content} | message
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}


def send(body, status=200, **headers):
    """A step of a script: answer with `body` (JSON, or text as it is)."""

    def step(handler):
        raw = (body if isinstance(body, str) else json.dumps(body)).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", len(raw))
        handler.end_headers()
        handler.wfile.write(raw)

    return step


def slowly(seconds, step):
    """A step that takes its time; a client that hung up meanwhile is its own business."""

    def slow(handler):
        time.sleep(seconds)
        with contextlib.suppress(OSError):
            step(handler)

    return slow


def drop(handler):
    """A step that promises a body and hangs up within it."""
    handler.send_response(200)
    handler.send_header("Content-Length", 1000)
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *_):
        pass

    def send_response(self, *args):
        with self.server.lock:  # before the client can know
            self.server.now -= 1
        super().send_response(*args)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with server.lock:
            steps = server.script.get(prompt, [])
            step = steps[server.tries[prompt]] if server.tries[prompt] < len(steps) else None
            server.tries[prompt] += 1
            server.seen.append((time.monotonic(), prompt, body, dict(self.headers), self.path))
            server.now += 1
            server.most = max(server.most, server.now)
        (step or server.default or send(reply(f"re: {prompt}")))(self)


class Server(http.server.ThreadingHTTPServer):
    """Answers "re: PROMPT", but first plays `script[PROMPT]`, a step a try; `default` for all."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.default, self.lock = {}, None, threading.Lock()
        self.tries, self.seen = collections.Counter(), []
        self.now = self.most = 0  # requests in flight
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):
        pass  # a client that hung up

    def order(self) -> list[str]:
        return [prompt for _, prompt, *_ in self.seen]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("R4B_TEST_KEY", KEY)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def make(server, tmp_path):
    """An endpoint of the server, in the same cache each time; the arguments are settings."""
    with contextlib.ExitStack() as stack:

        def build(cache="cache", first_wait=0.01, **settings) -> Endpoint:
            settings = {"key_variable": "R4B_TEST_KEY", "concurrency": 4, "retries": 2} | settings
            config = EndpointConfig(**({"url": server.url, "model": "m", "timeout": 5} | settings))
            return stack.enter_context(Endpoint(config, str(tmp_path / cache), first_wait))

        yield build


def asks(*prompts, **settings) -> list[Request]:
    return [Request(user_message(prompt), **settings) for prompt in prompts]


def counts(asked: Endpoint) -> dict:
    return {name: getattr(asked, name) for name in ("asked", "cached", "retried", "failed")}


def test_a_request_is_what_openai_defines(server, make):
    """A server that takes OpenAI's requests must take these, with the key where it belongs."""
    messages = user_message("hello", system="be brief")
    client = make(temperature=0.25, max_tokens=77, url=server.url + "/")
    assert client.ask([Request(messages, 3)]) == [Answer("re: hello")]
    _, _, body, headers, path = server.seen[0]
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hello"},
        ],
        "temperature": 0.25,
        "max_tokens": 77,
        "seed": 3,
    }
    assert path == "/v1/chat/completions" and headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == f"Bearer {KEY}"


def test_without_a_key_no_header_is_sent(server, make):
    """`Bearer ` with nothing behind is refused by some local servers."""
    make(key_variable="R4B_NO_SUCH_KEY").ask(asks("a"))
    assert "Authorization" not in server.seen[0][3]


def test_a_notebook_can_ask_too(make):
    """There an event loop runs already, and asyncio allows but one a thread."""

    async def cell():
        return make().ask(asks("x", "y"))

    assert [answer.text for answer in asyncio.run(cell())] == ["re: x", "re: y"]


def test_answers_keep_their_order_and_the_server_its_bound(server, make):
    """A swapped answer is a wrong label; and a server is asked as many at once as it was told."""
    prompts = [f"q{i}" for i in range(24)]
    for i, prompt in enumerate(prompts):  # the later ones of each handful come first
        server.script[prompt] = [slowly(0.01 * (4 - i % 4), send(reply(f"re: {prompt}")))]
    client, told = make(concurrency=3), []

    class Bar:
        advance = staticmethod(told.append)

    answers = client.ask(asks(*prompts), Bar)
    assert [answer.text for answer in answers] == [f"re: {prompt}" for prompt in prompts]
    assert server.most == 3
    assert sum(told) == 24
    assert client.ask([]) == []


PASSING = {
    "429": send({"error": {"message": "slow down"}}, 429),
    "408": send("", 408),
    "500": send("oh no", 500),
    "503": send("<html>\nstarting\n</html>", 503),
    "garbage": send('{"choices": [{"mess'),
    "not an object": send("[1, 2]"),
    "no choices": send({"error": {"message": "the engine died"}}),
    "empty choices": send({"choices": []}),
    "no message": send({"choices": [{"message": None}]}),
    "content of another kind": send(reply(content=["yes"])),
    "null content": send(reply(content=None)),
    "blank content": send(reply(content=" \n")),
    "thought alone": send(reply(content=None, reasoning_content="hm")),
    "thought without end": send(reply(content="<think>hm")),
    "aborted": send(reply(finish_reason="abort")),
    "hang": slowly(0.8, send(reply("late"))),
    "drop": drop,
}


@pytest.mark.parametrize("step", PASSING.values(), ids=PASSING)
def test_what_may_pass_is_asked_again(server, make, step):
    """Each of these happens on a good server in a bad moment; a label must not be lost to it."""
    server.script["a"] = [step]
    client = make(timeout=0.5 if step is PASSING["hang"] else 5)
    assert client.ask(asks("a", "b")) == [Answer("re: a"), Answer("re: b")]
    assert counts(client) == {"asked": 2, "cached": 0, "retried": 1, "failed": 0}


FAULTS = {
    "500": "HTTP 500: oh no after 3 tries",
    "503": "HTTP 503: <html> starting </html> after 3 tries",
    "garbage": "the reply is no JSON after 3 tries",
    "no choices": "the reply has no text in its choices: the engine died after 3 tries",
    "blank content": "the reply is empty after 3 tries",
    "hang": "time-out (0.5 s) after 3 tries",
    "drop": "the connection broke (RemoteProtocolError(",
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_pass_is_told_in_one_line(server, make, name):
    """Tries are bounded, the fault is one request's own, and the report says what to look at."""
    server.script["a"] = [PASSING[name]] * 9
    client = make(timeout=0.5 if name == "hang" else 5)
    bad, good = client.ask(asks("a", "b"))
    assert bad.text is None and bad.fault.startswith(FAULTS[name]) and "\n" not in bad.fault
    assert good == Answer("re: b")
    assert server.tries["a"] == 3
    assert counts(client) == {"asked": 2, "cached": 0, "retried": 2, "failed": 1}


@pytest.mark.parametrize("name", ["error", "message", "detail", ""])
def test_a_refusal_is_not_asked_again_and_carries_the_servers_words(server, make, name):
    """A picture too large stays too large; only the server's words tell the user so."""
    words = f"key {KEY}:\n too\tlarge " + "x" * 1000
    told = {"error": {"error": {"message": words}}}.get(name, {name: words})
    server.script["a"] = [send(told if name else words, 400)]
    answer = make().ask(asks("a"))[0]
    assert answer.text is None
    assert answer.fault.startswith("HTTP 400: key ***: too large xxx")
    assert len(answer.fault) <= endpoint.MESSAGE_LEN
    assert server.tries["a"] == 1


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_reply_that_was_cut_off_is_no_answer(server, make, reason):
    """Half a thought would be trained on as if it were a whole one."""
    server.script["a"] = [send(reply("the answer is 1", reason, reasoning_content="so"))]
    assert make().ask(asks("a")) == [Answer(None, fault=f"cut off ({reason})")]
    assert server.tries["a"] == 1


@pytest.mark.parametrize("status", [401, 403, 404, 405, 307])
def test_what_would_fail_every_request_stops_at_once(server, make, status):
    """Nobody wants 100,000 requests with a wrong key; the message tells what to look at."""
    error = {"error": {"message": f"no access with {KEY}"}}
    server.default = send(error, status, Location="http://127.0.0.1:1/")
    with pytest.raises(ConfigError) as caught:
        make(concurrency=2).ask(asks(*map(str, range(200))))
    told = str(caught.value)
    for part in (server.url, "R4B_TEST_KEY, which is set", "(m)", f"HTTP {status}: no access"):
        assert part in told.replace("$", "")
    assert KEY not in told
    assert len(server.seen) <= 4  # what was under way


@pytest.mark.parametrize("in_answer", [True, False])
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "inline", "template"])
def test_the_thought_is_taken_apart_wherever_it_stands(server, make, name, in_answer):
    """vLLM, OpenRouter, and servers that know no thoughts, with `<think>` in the prompt or not."""
    text = "B, not </think> 2" if in_answer else "B"
    replies = {
        "inline": reply(f"\n<think>\n1 + 1\n</think>\n\n{text}"),
        "template": reply(f"1 + 1\n</think>\n\n{text}"),
    }
    server.script["a"] = [send(replies.get(name) or reply(text, **{name: "\n1 + 1\n"}))]
    assert make().ask(asks("a")) == [Answer(text, "1 + 1")]
    assert make().ask(asks("a")) == [Answer(text, "1 + 1")]  # from the cache
    assert server.tries["a"] == 1


def test_an_answer_about_thoughts_is_no_thought(server, make):
    """Tags within an answer, and an empty block before it, are not what the model thought."""
    about = "The tags <think> and </think> enclose it."
    server.script = {"a": [send(reply(about))], "b": [send(reply("<think>\n\n</think>\n\nB"))]}
    assert make().ask(asks("a", "b")) == [Answer(about), Answer("B")]


def test_broken_characters_stop_nothing(server, make):
    """Half a surrogate pair, legal in JSON, fits in no file: neither ours nor the caller's."""
    server.default = send(
        '{"choices": [{"message": {"content": "x\\ud83d\\u0000 \\ud83d\\ude00"}}]}'
    )
    for _ in range(2):
        assert make().ask(asks("q\ud83d")) == [Answer("x?\0 \U0001f600")]


def test_a_back_off_grows(server, make):
    """An overloaded server recovers only if it is left alone for longer and longer."""
    server.script["a"] = [PASSING["500"]] * 3
    assert make(first_wait=0.08, retries=3).ask(asks("a")) == [Answer("re: a")]
    times = [at for at, *_ in server.seen]
    waits = [b - a for a, b in zip(times, times[1:])]
    assert all(wait >= least for wait, least in zip(waits, (0.08, 0.16, 0.32))), waits


def test_a_back_off_holds_no_slot(server, make):
    """Else a few bad requests would keep the good ones waiting."""
    server.script["a"] = [PASSING["500"]]
    make(first_wait=0.2, concurrency=1).ask(asks("a", "b", "c"))
    assert server.order() == ["a", "b", "c", "a"]


def test_retry_after_holds_for_every_request(server, make):
    """A rate limit is the key's: the next request would only be refused, too."""
    server.script["a"] = [send("", 429, Retry_After="0.5")]
    answers = make(concurrency=1).ask(asks("a", "b"))
    assert answers == [Answer("re: a"), Answer("re: b")]
    (first, *_), (second, *_), (third, *_) = server.seen
    assert second - first >= 0.5 and third - first >= 0.5


def test_retry_after_is_a_number_or_a_date():
    """RFC 9110 has both; a wait of an hour is a mistake or a reason to give up."""
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < endpoint._retry_after(later) <= 30
    assert endpoint._retry_after("2.5") == 2.5
    assert endpoint._retry_after("99999") == endpoint.LONGEST_WAIT
    past = email.utils.formatdate(time.time() - 30, usegmt=True)
    for value in ("", "0", "-3", "nan", "soon", past, "Wed, 99 Oct 99999 07:28:00 GMT"):
        assert 0 <= endpoint._retry_after(value) <= endpoint.LONGEST_WAIT
        assert endpoint._retry_after(value) == 0 or "99999" in value


def test_requests_per_minute_are_spread_evenly(server, make):
    """A burst at the head of each minute is what servers refuse."""
    client, begin = make(requests_per_minute=1200), time.monotonic()  # 50 ms
    client.ask(asks(*"abcd"))
    client.ask(asks(*"efgh"))  # the limit is the endpoint's, not the call's
    for i, (at, *_) in enumerate(server.seen):
        assert at - begin >= 0.05 * i
    assert time.monotonic() - begin < 5


def test_a_second_run_asks_nothing(server, make):
    """Hours and money; and the way from one server to another with other time-outs is free."""
    requests = asks(*"abc") + asks("a", number=1)
    first = make().ask(requests)
    client = make(concurrency=1, timeout=9, retries=0, requests_per_minute=1)
    assert client.ask(requests) == first
    assert counts(client) == {"asked": 0, "cached": 4, "retried": 0, "failed": 0}
    assert len(server.seen) == 4


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"temperature": 0.5}, {"max_tokens": 5}, {"url": "v2"}, "number"]
)
def test_another_question_is_not_answered_from_the_cache(server, make, change):
    """An answer of another model or another try would be told as this one's."""
    make().ask(asks("a"))
    if "url" in change:
        change = {"url": server.url.replace("v1", "v2")}
    client = make() if change == "number" else make(**change)
    client.ask(asks("a", number=int(change == "number")))
    assert client.asked == 1 and len(server.seen) == 2


def test_the_cache_never_forgets(make):
    """diskcache would drop the oldest answers from 1 GB on, and the next run would pay again."""
    assert make()._cache.eviction_policy == "none"


def test_faults_are_asked_again_by_the_next_run(server, make):
    """A fault in the cache would outlive the server's bad day."""
    server.script = {
        "a": [PASSING["500"]] * 3,
        "b": [send("", 400)],
        "c": [send(reply("", "length"))],
    }
    assert [answer.text for answer in make().ask(asks(*"abcd"))] == [None, None, None, "re: d"]
    client = make()
    assert [answer.text for answer in client.ask(asks(*"abcd"))] == [f"re: {x}" for x in "abcd"]
    assert client.asked == 3 and client.cached == 1


def test_equal_requests_are_sent_once(server, make):
    """Two samples of one request could differ, and a second run would not repeat the first."""
    client = make()
    assert client.ask(asks("a", "b", "a")) == [Answer("re: a"), Answer("re: b"), Answer("re: a")]
    assert counts(client) == {"asked": 2, "cached": 1, "retried": 0, "failed": 0}


SCRIPT = """
import signal, sys
from r4b_jax.common.endpoint import Endpoint, Request, user_message
from r4b_jax.config import EndpointConfig
assert "jax" not in sys.modules
signal.signal(signal.SIGINT, signal.default_int_handler)
config = EndpointConfig(url=sys.argv[1], model="m", concurrency=4, key_variable="R4B_TEST_KEY")
Endpoint(config, sys.argv[2]).ask([Request(user_message(str(i))) for i in range(200)])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_goes_on_where_it_was(server, make, tmp_path, number):
    """Ctrl-C, or the end of a machine, loses what was under way and nothing else."""
    server.default = slowly(0.02, send(reply("yes")))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, server.url, str(tmp_path / "cache")],
        stderr=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).parent.parent,
    )
    deadline = time.monotonic() + 20
    while len(server.seen) < 30 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == -number, said
    if number == signal.SIGINT:
        assert said.strip().endswith("KeyboardInterrupt") and "destroyed" not in said
    time.sleep(0.2)  # the server reads what was sent
    came = len(server.seen)
    assert 30 <= came < 200
    client = make()
    assert client.ask(asks(*map(str, range(200)))) == [Answer("yes")] * 200
    assert came - 4 <= client.cached <= came
    assert len(server.seen) == came + client.asked


def test_the_key_is_on_no_disk_and_in_no_log(server, make, tmp_path, caplog):
    """Caches are copied and logs are posted."""
    caplog.set_level(logging.INFO)
    server.script["a"] = [send(f"bad {KEY}", 500)]
    server.script["b"] = [send({"error": {"message": f"bad {KEY}"}}, 400)]
    client = make()
    answers = client.ask(asks("a", "b"))
    client.close()
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)
    assert KEY not in caplog.text + repr(answers) and "HTTP Request" not in caplog.text


def test_a_server_that_is_gone_stops_the_list(make):
    """Each request alone would go through all its tries, for days."""
    with socket.socket() as unused:  # bound, but it does not listen
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        client = make(url=url, concurrency=2)
        with pytest.raises(ConfigError, match=f"{url}.* 4 requests in a row.*no connection"):
            client.ask(asks(*map(str, range(500))))
        assert client.asked <= 3 + 2 * endpoint.OPEN
        few = make(url=url).ask(asks("a"))  # too few to tell
        assert few[0].text is None and "no connection" in few[0].fault


def test_a_server_that_refuses_all_stops_the_list(server, make):
    """So looks an account without money: 429, for ever."""
    server.default = send({"error": {"message": "quota used up"}}, 429)
    with pytest.raises(ConfigError, match="quota used up"):
        make(concurrency=2, retries=1).ask(asks(*map(str, range(500))))
    assert len(server.seen) < 50


def test_bad_requests_do_not_stop_the_list(server, make):
    """A rerun asks those that failed, all in a row: if that stopped it, it would never end."""
    server.default = PASSING["500"]
    client = make(concurrency=1, retries=0)
    assert client.ask(asks(*map(str, range(30)))) == [Answer(None, fault="HTTP 500: oh no")] * 30


def test_one_good_answer_shows_that_the_server_is_there(server, make):
    """Faults that are spread over hours are no dead server."""
    for i in range(0, 40, 2):
        server.script[str(i)] = [PASSING["503"]]
    client = make(concurrency=1, retries=0)
    client.ask(asks(*map(str, range(40))))
    assert client.failed == 20


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"url": ""}, "url ''"),
        ({"url": "localhost:8000/v1"}, "localhost:8000"),
        ({"model": ""}, "model ''"),
        ({"concurrency": 0}, "concurrency"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(make, change, told):
    """Before hours of work that leads up to the first request."""
    with pytest.raises(ConfigError, match=told):
        make(**change)


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", f"{KEY}\u2026"])
def test_a_key_that_fits_in_no_header_is_not_printed(make, monkeypatch, key):
    """httpx names the whole header in its error, and a traceback gets posted."""
    monkeypatch.setenv("R4B_TEST_KEY", key)
    with pytest.raises(ConfigError, match="R4B_TEST_KEY") as caught:
        make()
    assert KEY not in str(caught.value)


def test_a_key_file_may_end_in_a_newline(server, make, monkeypatch):
    """`export KEY="$(< file)"` drops it, a container's secret does not."""
    monkeypatch.setenv("R4B_TEST_KEY", KEY + "\n")
    make().ask(asks("a"))
    assert server.seen[0][3]["Authorization"] == f"Bearer {KEY}"


def test_every_setting_of_the_endpoint_is_known_here():
    """A new sampling setting belongs in the body, and so in the key of the cache."""
    assert {field.name for field in dataclasses.fields(EndpointConfig)} == {
        *("url", "model", "key_variable", "concurrency", "requests_per_minute"),
        *("timeout", "retries", "max_tokens", "temperature"),
    }


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "MPO"])
def test_pictures_travel_as_they_are_with_their_type(kind):
    """Servers refuse a wrong type; re-coding would show the teacher another picture."""
    file, image = io.BytesIO(), PIL.Image.new("RGB", (3, 2), (9, 8, 7))
    more = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
    image.save(file, kind, **more)
    (message,) = user_message("what?", [file.getvalue()] * 2)
    *pictures, text = message["content"]
    assert text == {"type": "text", "text": "what?"} and len(pictures) == 2
    head, data = pictures[0]["image_url"]["url"].split(",")
    assert head == f"data:image/{kind.lower().replace('mpo', 'jpeg')};base64"
    assert base64.b64decode(data) == file.getvalue()


def test_a_file_that_is_no_picture_is_refused():
    """Each server has its own words for it, after an upload."""
    with pytest.raises(OSError, match="cannot identify"):
        user_message("what?", [b"<html>"])
