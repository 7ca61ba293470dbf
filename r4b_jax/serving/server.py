"""The web server: an OpenAI-compatible API and a page, in front of the batching engine."""

import asyncio
import contextlib
import functools
import hmac
import importlib.resources
import json
import logging
import math
import os
import signal
import time

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.routing import Route

from r4b_jax.serving import api
from r4b_jax.serving.api import ApiError, Asked, Options
from r4b_jax.serving.engine import Engine, Ticket
from r4b_jax.serving.replies import Reply

BODY_SECONDS = 60.0  # a body may take, as its sender has a place
ALIVE_SECONDS = 15.0  # between signs of life to one who waits for a stream
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

log = logging.getLogger(__name__)


class HungUp(Exception):
    """The client is gone: whatever is answered, nobody reads it."""


class App:
    """The routes, and who is inside."""

    def __init__(self, engine: Engine, options: Options):
        self.engine, self.options = engine, options
        self.inside = 0  # requests taken and not answered yet
        self.seconds = 1.0  # that a request takes, about
        self.created = int(time.time())
        # Pictures are decoded beside the device's work; more threads would not be faster.
        self.readers = anyio.CapacityLimiter(max(2, (os.cpu_count() or 2) // 2))
        page = importlib.resources.files("r4b_jax.serving").joinpath("page.html")
        self.page_text = page.read_text(encoding="utf-8")
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/v1/chat/completions", self.completions, methods=["POST"]),
        ]
        handlers = {ApiError: _refuse, HTTPException: _refuse_http, Exception: _fail}
        self.starlette = Starlette(routes=routes, exception_handlers=handlers)

    async def page(self, request: Request):
        return HTMLResponse(self.page_text, headers=PAGE_HEADERS)

    async def health(self, request: Request):
        running, waiting = self.engine.load
        state = {"status": "ok" if self.engine.alive else "the device has failed"}
        bias = self.options.think_bias
        bias = self.engine.model.think_bias if bias is None else bias
        bias = max(-99.0, min(99.0, bias))  # JSON has no infinity
        state |= {"model": self.options.name, "think_bias": bias}
        state |= {"running": running, "waiting": waiting}
        return JSONResponse(state, 200 if self.engine.alive else 503)

    async def models(self, request: Request):
        self._check_key(request)
        known = self.options.name
        model = {"id": known, "object": "model", "created": self.created, "owned_by": "r4b_jax"}
        model |= {"max_model_len": self.engine.model.limit}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != known:
            raise ApiError(404, f"there is no model {name!r} here", "model_not_found", "model")
        return JSONResponse(model)

    async def completions(self, request: Request):
        """A chat completion. One who does not fit in is told before his body is read."""
        self._check_key(request)
        if self.inside >= self.engine.slots + self.options.queue:
            wait = math.ceil(min(60.0, self.seconds * self.inside / self.engine.slots))
            message = "too many requests at once; try again later"
            raise ApiError(429, message, "queue_full", None, **{"Retry-After": str(max(1, wait))})
        self.inside += 1
        visit = Visit(self)
        try:
            asked = await self._read(request)
            reply = Reply(self.engine.model, asked, self.options.name)
            visit.submit(asked)
            if asked.stream:
                return Stream(visit, _events(visit, reply))
            return JSONResponse(await _whole(visit, reply, request))
        except HungUp:
            return JSONResponse({}, 499)
        finally:
            if not visit.streams:
                visit.end()

    def _check_key(self, request: Request):
        if not self.options.api_key:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        expected = self.options.api_key.encode()
        same = hmac.compare_digest(key.strip().encode("latin-1"), expected)  # as they were sent
        if not same or scheme.lower() != "bearer":
            message = "a wrong API key, or none: Authorization: Bearer KEY"
            raise ApiError(401, message, "invalid_api_key", **{"WWW-Authenticate": "Bearer"})

    async def _read(self, request: Request) -> Asked:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site could send any other kind
            raise ApiError(415, "Content-Type must be application/json", "invalid_content_type")
        most, body = self.options.max_body, bytearray()
        too_large = ApiError(413, f"a body has at most {most} bytes", "body_too_large")
        if int(request.headers.get("content-length", "0")) > most:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_large
        except ClientDisconnect:
            raise HungUp from None
        except TimeoutError:
            raise ApiError(408, "the body took too long to come", "timeout") from None
        sizes = self.engine.prompt_len, self.engine.reply_len
        read = functools.partial(api.read, body, self.engine.model, self.options, *sizes)
        return await anyio.to_thread.run_sync(read, limiter=self.readers)


class Visit:
    """One request's stay, from its admission to its end, which comes in any case."""

    def __init__(self, app: App):
        self.app, self.start = app, time.monotonic()
        self.ticket: Ticket | None = None
        self.news = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.streams = self.ended = False

    def submit(self, asked: Asked):
        looks = asked.stream or asked.stop  # else it need not be told before the end

        def deliver(ticket: Ticket):  # in the engine's thread
            if looks or ticket.done:
                self.loop.call_soon_threadsafe(self.news.set)

        try:
            self.ticket = self.app.engine.submit(asked.request, deliver)
        except RuntimeError as error:
            raise ApiError(503, f"{error}", "unavailable") from None
        self.streams = asked.stream

    def end(self):
        if self.ended:
            return
        self.ended = True
        self.app.inside -= 1
        if self.ticket and not self.ticket.done:
            self.app.engine.cancel(self.ticket)
        elif self.ticket:
            self.app.seconds += (time.monotonic() - self.start - self.app.seconds) / 8


class Stream(StreamingResponse):
    """Server-sent events; however they end, the visit does."""

    def __init__(self, visit: Visit, events):
        super().__init__(events, media_type="text/event-stream")
        self.headers["Cache-Control"], self.headers["X-Accel-Buffering"] = "no-cache", "no"
        self.visit = visit

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.visit.end()


async def _events(visit: Visit, reply: Reply):
    """The stream of a reply: chunks, the usage if it is wanted, [DONE]."""
    ticket, begun = visit.ticket, False
    while not reply.ended:
        try:
            await asyncio.wait_for(visit.news.wait(), ALIVE_SECONDS)
        except TimeoutError:
            yield ": waiting\n\n"
            continue
        visit.news.clear()
        new = reply.update(ticket)
        if ticket.failed:
            yield _event(_failed(visit).body)
            break
        if not begun and reply.ids:
            begun = True
            yield _event(reply.chunk({"role": "assistant", "content": ""}))
        for field, text in new.items():
            yield _event(reply.chunk({field: text}))
    else:
        yield _event(reply.chunk({}, last=True))
        if reply.asked.include_usage:
            yield _event(reply.usage_chunk())
    yield "data: [DONE]\n\n"


def _event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _whole(visit: Visit, reply: Reply, request: Request) -> dict:
    """The reply at its end.

    Raises:
      HungUp: the client is gone.
      ApiError: the device failed.
    """
    gone = asyncio.ensure_future(_hangs_up(request))
    try:
        while not reply.ended:
            news = asyncio.ensure_future(visit.news.wait())
            await asyncio.wait((news, gone), return_when=asyncio.FIRST_COMPLETED)
            news.cancel()
            if gone.done():
                raise HungUp
            visit.news.clear()
            reply.update(visit.ticket)
    finally:
        gone.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await gone
    if visit.ticket.failed:
        raise _failed(visit)
    return reply.completion()


def _failed(visit: Visit) -> ApiError:
    return ApiError(500, "the request failed on the device; it may be sent again", "device_error")


async def _hangs_up(request: Request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refuse(request: Request, error: ApiError):
    return JSONResponse(error.body, error.status, error.headers)


async def _refuse_http(request: Request, error: HTTPException):
    told = ApiError(error.status_code, f"{request.url.path[:100]}: {error.detail}", "http_error")
    return JSONResponse(told.body, error.status_code, error.headers)


async def _fail(request: Request, error: Exception):
    return JSONResponse(ApiError(500, "an error of the server", "internal_error").body, 500)


class Server(uvicorn.Server):
    """uvicorn's, which tells where it listens; SIGTERM drains it, a second one ends it at once."""

    def __init__(self, app: App, host: str, port: int, grace: float):
        config = uvicorn.Config(
            app.starlette,
            host,
            port,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=math.ceil(grace),
            timeout_keep_alive=30,
            backlog=512,
            server_header=False,
        )
        super().__init__(config)
        self.app, self.cut_off = app, False

    async def startup(self, sockets=None):
        await super().startup(sockets)
        for listening in self.servers:
            host, port = listening.sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"r4b_jax: {self.app.options.name} at http://{host}:{port}", flush=True)

    async def shutdown(self, sockets=None):
        start = time.monotonic()
        await super().shutdown(sockets)
        self.cut_off = time.monotonic() - start >= self.config.timeout_graceful_shutdown

    def handle_exit(self, sig, frame):
        if self.should_exit:
            os._exit(128 + sig)
        name = signal.Signals(sig).name
        print(f"r4b_jax: {name}: {self.app.inside} requests are finished first", flush=True)
        self.should_exit = True


def serve(engine: Engine, options: Options, host: str, port: int, grace: float) -> int:
    """Serve until a signal. The exit code: 0 = what was taken is answered, 1 = the time of grace
    was over before, or the port is taken."""
    server = Server(App(engine, options), host, port, grace)
    engine.start()
    try:
        server.run()
    except SystemExit:  # uvicorn's: the port is taken, as it has told
        pass
    drained = engine.stop(0 if server.cut_off else 5.0)
    return 0 if server.started and drained and not server.cut_off else 1
