"""The batching engine: one thread owns the device, and requests of strangers share it.

Between two boundaries, a few tokens apart, every slot decodes. At a boundary whoever has ended or
hung up leaves, and who waits enters, first come first served. A prompt of a shape that no one has
asked before waits for its program, which another thread compiles; the others go on meanwhile.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from r4b_jax.data.examples import Example
from r4b_jax.decoding.chat import Model
from r4b_jax.decoding.generate import p_think
from r4b_jax.decoding.prompts import Prompts, pad_prompts
from r4b_jax.models.layers import cast_kernels
from r4b_jax.serving import slots as device
from r4b_jax.serving.slots import NO_LIMIT, Settings

PREFILL_TOKENS = 8192  # prompts that enter at one boundary, padded: the others wait for them
NARROW = 8  # while few are at work, an eighth of the slots is computed alone
FAILURES = 3  # boundaries in a row that fail before the engine gives up

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked, checked and encoded."""

    prompt: Example
    forced: list[int]  # what the reply begins with; [] = the model decides
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    think_bias: float = 0.0
    max_think_tokens: int | None = None
    seed: int = 0


class Ticket:
    """A request under way. The engine's thread writes, and then calls `deliver`.

    Attributes:
      ids: what came after `<think>`; only grows.
      p_think: P(thinking) against P(direct), before any bias; None before the first tokens.
      done: nothing more will come.
      failed: it is done, and not by itself.
    """

    def __init__(self, request: Request, prompts: Prompts, deliver: Callable[["Ticket"], None]):
        self.request, self.prompts, self.deliver = request, prompts, deliver
        self.ids: list[int] = []
        self.p_think: float | None = None
        self.done = self.failed = self.cancelled = False


class Engine:
    """Answers requests together.

    Args:
      slots: requests at work at once.
      prompt_len, reply_len: the longest prompt and reply, in tokens; memory grows with
        slots * (prompt_len + reply_len).
      narrow: 1 = all slots are always computed: half as many programs, and few requests alone take
        as long as many together.
    Attributes:
      entered: how many requests had a slot; `finished`: how many left it, ended or given up.
      alive: False once the device has failed for good.
    """

    def __init__(
        self, model: Model, slots: int, prompt_len: int, reply_len: int, narrow: int = NARROW
    ):
        self.model, self.slots = model, slots
        self.prompt_len, self.reply_len = prompt_len, reply_len
        self.widths = sorted({-(-slots // narrow), slots})
        self.entered = self.finished = 0
        self.alive = True
        cast = jax.jit(cast_kernels, static_argnames="dtype")
        self._params = cast(model.params, dtype=model.config.compute_dtype)
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._running: dict[int, Ticket] = {}
        self._settings, self._state = Settings.empty(slots), self._nobody()
        self._shapes: set[tuple[int, int]] = set()  # (tokens, tiles) whose program is compiled
        self._compiling: dict[tuple[int, int], concurrent.futures.Future] = {}
        self._compiler = concurrent.futures.ThreadPoolExecutor(1, "compiler")
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def warm_up(self, *examples: Example):
        """Compile the programs of decoding, and those of prompts shaped like `examples`. Before
        `start`; what is not compiled here is when it is first needed."""
        for example in examples:
            request = Request(example, [], 1)
            self._enter(Ticket(request, self._padded(example), lambda _: None), 0)
            self._settings.alive[:] = False
            self._running.clear()
        for width in self.widths:
            for truncated in (False, True):
                self._advance(width, truncated)
        self.entered = 0

    def start(self):
        self._thread.start()

    def submit(
        self, request: Request, deliver: Callable[["Ticket"], None] = lambda _: None
    ) -> Ticket:
        """Queue a request; `deliver` is called in the engine's thread whenever something came.

        Raises:
          ValueError: the prompt is longer than `prompt_len`.
          RuntimeError: the engine is stopping, or its device has failed.
        """
        ticket = Ticket(request, self._padded(request.prompt), deliver)
        with self._changed:
            if self._stopping or not self.alive:
                raise RuntimeError("the engine takes no requests any more")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket):
        """Nobody waits for it any more: its slot is free at the next boundary."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify()

    @property
    def cache_bytes(self) -> int:
        """Memory of the keys and values of all slots."""
        caches = (self._state.prefix, self._state.suffix)
        return sum(x.nbytes for x in jax.tree.leaves(caches))

    @property
    def load(self) -> tuple[int, int]:
        """(requests at work, requests that wait)."""
        return len(self._running), len(self._waiting)

    def stop(self, timeout: float | None = None) -> bool:
        """Finish what was taken, then end the thread: whether all was finished in time."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        drained = not self._thread.is_alive()
        if not drained:
            with self._changed:
                for ticket in (*self._waiting, *self._running.values()):
                    ticket.cancelled = True
            self._thread.join()
        self._compiler.shutdown(wait=False, cancel_futures=True)
        return drained

    # The engine's thread

    def _run(self):
        failures = 0
        while self.alive:
            entering = self._who_enters()
            if entering is None:
                return
            try:
                for ticket, slot in entering:
                    self._enter(ticket, slot)
                self._boundary()
                failures = 0
            except Exception:
                failures += 1
                log.exception("the device failed; its requests are given up")
                self._give_up([*self._running.values()])
                self._running.clear()
                self._settings = Settings.empty(self.slots)
                self._recover(failures)
        self._give_up([*self._waiting])

    def _recover(self, failures: int):
        """New slots after a failure, as the old ones' memory may be gone."""
        try:
            self._state = None
            self._state = self._nobody()
        except Exception:
            log.exception("no new slots")
            failures = FAILURES
        with self._changed:
            self.alive = failures < FAILURES

    def _give_up(self, tickets: list[Ticket]):
        for ticket in tickets:
            ticket.done = ticket.failed = True
            self._tell(ticket)

    def _who_enters(self) -> list[tuple[Ticket, int]] | None:
        """Who waits and finds a slot, and which; sleeps while there is nothing to do. None = the
        end."""
        with self._changed:
            while True:
                given_up = [ticket for ticket in self._waiting if ticket.cancelled]
                for ticket in given_up:
                    self._waiting.remove(ticket)
                self._give_up(given_up)
                entering = self._first_in_line()
                if entering or self._running:
                    return entering
                if self._stopping and not self._waiting:
                    return None
                self._changed.wait()

    def _first_in_line(self) -> list[tuple[Ticket, int]]:
        free = [slot for slot in range(self.slots) if slot not in self._running]
        entering, tokens = [], 0
        for ticket in list(self._waiting):
            tokens += ticket.prompts.tokens.shape[1]
            if len(entering) == len(free) or (entering and tokens > PREFILL_TOKENS):
                break
            if not self._compiled(ticket.prompts):
                tokens -= ticket.prompts.tokens.shape[1]
                continue
            self._waiting.remove(ticket)
            entering.append((ticket, free[len(entering)]))
        return entering

    def _compiled(self, prompts: Prompts) -> bool:
        """Whether a prompt's program is there; if not, it is being compiled from now on."""
        shape = _shape(prompts)
        if shape in self._shapes:
            return True
        if shape not in self._compiling:
            log.info("compiling the prefill of %d tokens and %d tiles", *shape)

            def compile():
                try:  # one that cannot be compiled fails its requests when they enter
                    jax.block_until_ready(self._prefill(prompts))
                except Exception:
                    log.exception("the prefill of %d tokens and %d tiles failed", *shape)
                with self._changed:
                    self._shapes.add(shape)
                    del self._compiling[shape]
                    self._changed.notify()

            self._compiling[shape] = self._compiler.submit(compile)
        return False

    def _enter(self, ticket: Ticket, slot: int):
        request = ticket.request
        try:
            filled = jax.block_until_ready(self._prefill(ticket.prompts))
        except Exception:
            log.exception("a prefill failed; its request is given up")
            self._give_up([ticket])
            return
        self._shapes.add(_shape(ticket.prompts))
        self._running[slot] = ticket
        self._state = device.enter(self._state, filled, np.array([slot], np.int32))
        self.entered += 1
        greedy, settings = request.temperature == 0, self._settings
        limit = request.max_think_tokens
        settings.alive[slot] = True
        settings.forced[slot] = [*request.forced, -1, -1][: settings.forced.shape[1]]
        settings.seed[slot] = request.seed
        settings.temperature[slot] = request.temperature
        settings.top_p[slot] = 2 if greedy or request.top_p == 1 else request.top_p
        settings.top_k[slot] = 0 if greedy else request.top_k
        settings.think_bias[slot] = request.think_bias
        settings.max_think_tokens[slot] = NO_LIMIT if limit is None else limit
        settings.max_new_tokens[slot] = request.max_new_tokens

    def _boundary(self):
        """A few tokens for everyone at work; who is done leaves."""
        for slot, ticket in [*self._running.items()]:
            if ticket.cancelled:
                self._leave(slot)
        if not self._running:
            return
        used = [*self._running]
        width = next(w for w in self.widths if w > max(used))
        truncated = (self._settings.top_p[used] < 1) | (self._settings.top_k[used] > 0)
        news = self._advance(width, bool(truncated.any()))
        for slot, ticket in [*self._running.items()]:
            fresh = news.fresh[slot, : news.lengths[slot] - len(ticket.ids)]
            if ticket.p_think is None:
                ticket.p_think = float(p_think(news.mode_logps[slot].astype(np.float64)))
            room = ticket.request.max_new_tokens - len(ticket.ids)
            ticket.ids += fresh[:room].tolist()
            if self.model.ids.end in ticket.ids[-device.STEPS :] or len(fresh) >= room:
                self._leave(slot)
            else:
                self._tell(ticket)

    def _leave(self, slot: int):
        ticket = self._running.pop(slot)
        self._settings.alive[slot] = False
        ticket.done, ticket.failed = True, ticket.cancelled
        self.finished += 1
        self._tell(ticket)

    def _tell(self, ticket: Ticket):
        try:
            ticket.deliver(ticket)
        except Exception:  # the listener is gone
            ticket.cancelled = True

    def _nobody(self):
        return device.nobody(
            self.model.config,
            self._params,
            self.model.ids,
            slots=self.slots,
            prompt_len=self.prompt_len,
            reply_len=self.reply_len,
        )

    def _prefill(self, prompts: Prompts):
        return device.prefill(self.model.config, self._params, self.model.ids, prompts)

    def _advance(self, width: int, truncated: bool):
        settings = Settings(*(x.copy() for x in self._settings))  # the device may read it later
        self._state, news = device.advance(
            self.model.config,
            self._params,
            self.model.ids,
            settings,
            self._state,
            width=width,
            truncated=truncated,
        )
        return jax.device_get(news)

    def _padded(self, prompt: Example) -> Prompts:
        patches = self.model.config.vision.num_patches
        return pad_prompts([prompt], self.prompt_len, self.model.ids.pad, patches)


def _shape(prompts: Prompts) -> tuple[int, int]:
    return prompts.tokens.shape[1], prompts.tiles.shape[1]


def until_done(engine: Engine, request: Request, timeout: float = 600.0) -> Ticket:
    """Submit and wait, for those without an event loop.

    Raises:
      TimeoutError: it took longer.
    """
    came = threading.Event()
    ticket = engine.submit(request, lambda _: came.set())
    end = time.monotonic() + timeout
    while not ticket.done:
        if not came.wait(end - time.monotonic()):
            engine.cancel(ticket)
            raise TimeoutError("no answer in time")
        came.clear()
    return ticket
