"""The server: many clients at once against one after another, over HTTP, with the tiny model.

    python benchmarks/serve.py runs/tiny-seed0/bpo
    python benchmarks/serve.py runs/tiny-seed0/bpo --clients=64 --slots=64 --thinking-mode=long
    python benchmarks/serve.py --url=http://127.0.0.1:8000 --model=r4b       one that runs already

A server is started with as many slots as there are clients, warmed up, and asked the questions of
the small world, half of them with a picture, in VLMEvalKit's shape: one message, a list of parts,
pictures as JPEG in data URLs, n = 1, temperature 0. In each round one client asks the first
--serial of them one after another; then --clients clients ask all of them at once, each its next
one when it has its answer. A ratio is taken within a round, as a machine that others use changes
between rounds; what is reported are medians over the rounds. Tokens are those the server counts.
Clients live in a process of their own, on the same cores. The server's CPU time a request is told
beside, as it hardly depends on who else uses the machine.

While few ask, the server computes an eighth of its slots alone, which makes one after another
several times faster and the ratio smaller. --narrow=1 turns that off.

The last line is JSON.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
from PIL import Image

TOPICS = ("maths", "arithmetic", "vqa", "arithmetic")
SHORT_SIDE = 100  # VLMEvalKit enlarges pictures to it


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("checkpoint", nargs="?", help="what `python -m r4b_jax.serve` takes")
    p.add_argument("--url", help="of a server that runs already, without /v1")
    p.add_argument("--model", default="r4b", help="its name there (r4b)")
    p.add_argument("--clients", type=int, default=32, help="clients at once (32)")
    p.add_argument("--slots", type=int, help="of the server; default as many as clients")
    p.add_argument("--narrow", type=int, default=8, help="of the server (8)")
    p.add_argument("--requests", type=int, default=320, help="of all clients together, a round")
    p.add_argument("--serial", type=int, default=64, help="asked one after another, a round (64)")
    p.add_argument("--rounds", type=int, default=5, help="(5)")
    p.add_argument("--max-tokens", type=int, default=64, help="of a reply (64)")
    p.add_argument("--thinking-mode", default="auto", choices=("auto", "long", "short"))
    p.add_argument("--stream", action="store_true", help="ask for streams")
    p.add_argument("--chat", action="store_true", help="also Model.chat, without any server")
    return p


def questions(count: int) -> list[tuple[str, np.ndarray | None]]:
    """(question, picture or None) of the small world's test split."""
    from r4b_jax.config import WorldConfig
    from r4b_jax.data.worlds import World

    world, rng = World(WorldConfig(), "test"), np.random.default_rng(0)
    samples = [world.question(TOPICS[i % len(TOPICS)], rng) for i in range(count)]
    return [(s.question, s.images[0] if s.images else None) for s in samples]


def body(question: str, picture, args) -> bytes:
    """A request as VLMEvalKit sends it."""
    parts = [{"type": "text", "text": question}]
    if picture is not None:
        image = Image.fromarray(np.asarray(picture))
        scale = max(1.0, SHORT_SIDE / min(image.size))
        image = image.resize([round(side * scale) for side in image.size])
        image.save(file := io.BytesIO(), "JPEG")
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    fields = {"model": args.model, "n": 1, "max_tokens": args.max_tokens, "temperature": 0.0}
    fields["chat_template_kwargs"] = {"thinking_mode": args.thinking_mode}
    fields["messages"] = [{"role": "user", "content": parts}]
    if args.stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(fields).encode()


@contextlib.contextmanager
def server(args):
    """The url of the server, started here unless there is one, and its process id or None."""
    if args.url:
        yield args.url, None
        return
    command = [sys.executable, "-m", "r4b_jax.serve", args.checkpoint, "--port=0"]
    command += [f"--slots={args.slots or args.clients}", f"--name={args.model}"]
    command += [f"--narrow={args.narrow}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = next((line.split()[-1] for line in process.stdout if " at http" in line), None)
        if url is None:
            sys.exit("the server did not start")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        if code := process.wait(60):
            print(f"the server ended with {code}", file=sys.stderr)


def cpu_seconds(pid: int | None) -> float:
    """What a process has computed so far; NaN where that is not known."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
            user, system = f.read().rpartition(")")[2].split()[11:13]
    except OSError:
        return float("nan")
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def ask(connection, content: bytes) -> int:
    """One request; the tokens of its answer. Raises ValueError if there is none."""
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-x"}
    connection.request("POST", "/v1/chat/completions", content, headers)
    response = connection.getresponse()
    raw = response.read()
    if response.status != 200:
        raise ValueError(f"{response.status}: {raw[:200]}")
    if raw.startswith(b"data:"):
        *events, end = raw.decode().strip().split("\n\n")
        assert end == "data: [DONE]"
        return json.loads(events[-1].removeprefix("data: "))["usage"]["completion_tokens"]
    answer = json.loads(raw)
    if not answer["choices"][0]["message"]["content"]:
        raise ValueError("an empty content")
    return answer["usage"]["completion_tokens"]


def load(url: str, pid: int | None, contents: list[bytes], clients: int) -> dict:
    """All requests by so many clients: tokens a second, latencies, errors."""
    before = cpu_seconds(pid)
    left, lock = list(reversed(contents)), threading.Lock()
    host = urllib.parse.urlsplit(url).netloc

    def client(_):
        connection, seconds, tokens, errors = http.client.HTTPConnection(host), [], 0, []
        while True:
            with lock:
                if not left:
                    connection.close()
                    return seconds, tokens, errors
                content = left.pop()
            start = time.perf_counter()
            try:
                tokens += ask(connection, content)
            except (OSError, ValueError, http.client.HTTPException) as error:
                errors.append(str(error))
                connection.close()
            seconds.append(time.perf_counter() - start)

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        parts = list(pool.map(client, range(clients)))
    wall = time.perf_counter() - start
    seconds = sorted(s for part in parts for s in part[0])
    return {
        "tokens_per_s": sum(part[1] for part in parts) / wall,
        "tokens_per_reply": sum(part[1] for part in parts) / len(seconds),
        "p50_ms": 1e3 * seconds[len(seconds) // 2],
        "p95_ms": 1e3 * seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))],
        "server_cpu_ms_per_request": 1e3 * (cpu_seconds(pid) - before) / len(contents),
        "errors": [error for part in parts for error in part[2]],
    }


def chat(args, asked) -> float:
    """Tokens a second of `Model.chat`, one question after another in one process."""
    import r4b_jax

    model = r4b_jax.load(args.checkpoint)

    def run() -> int:
        settings = dict(mode=args.thinking_mode, max_new_tokens=args.max_tokens)
        replies = [model.chat(q, [] if p is None else [p], **settings) for q, p in asked]
        return sum(reply.num_tokens for reply in replies)

    run()  # compiles
    start = time.perf_counter()
    return run() / (time.perf_counter() - start)


def main():
    p = parser()
    args = p.parse_args()
    if not args.checkpoint and not args.url:
        p.error("a CHECKPOINT, or the --url of a server")
    asked = questions(args.requests)
    contents = [body(question, picture, args) for question, picture in asked]
    rounds, before = [], os.getloadavg()
    with server(args) as (url, pid):
        load(
            url, pid, contents[: 2 * args.clients], args.clients
        )  # programs of other shapes, caches
        for _ in range(args.rounds):
            alone = load(url, pid, contents[: args.serial], 1)
            together = load(url, pid, contents, args.clients)
            rounds.append((alone, together))
            print(
                f"one after another {alone['tokens_per_s']:6.0f} tokens/s, "
                f"{args.clients} clients {together['tokens_per_s']:6.0f}: "
                f"{together['tokens_per_s'] / alone['tokens_per_s']:.1f} x",
                flush=True,
            )
    sides = {"one after another": [r[0] for r in rounds], "together": [r[1] for r in rounds]}
    names = ("tokens_per_s", "tokens_per_reply", "p50_ms", "p95_ms")
    names += ("server_cpu_ms_per_request",)
    out: dict = {
        side: {name: round(statistics.median(r[name] for r in runs), 1) for name in names}
        for side, runs in sides.items()
    }
    ratios = [b["tokens_per_s"] / a["tokens_per_s"] for a, b in rounds]
    out["ratio"], out["ratios"] = round(statistics.median(ratios), 2), [round(x, 2) for x in ratios]
    errors = [error for runs in sides.values() for run in runs for error in run["errors"]]
    out["errors"], out["first_errors"] = len(errors), errors[:3]
    if args.chat and args.checkpoint:
        out["Model.chat, tokens_per_s"] = round(chat(args, asked[: args.serial]), 1)
    out |= {"clients": args.clients, "cores": len(os.sched_getaffinity(0))}
    out["load_average_before_and_after"] = [round(x, 1) for x in (before[0], os.getloadavg()[0])]
    print(json.dumps(out))


if __name__ == "__main__":
    main()
