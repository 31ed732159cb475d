"""The addresses of one model: which of them takes the next call, and which may take none for now.

A call goes to the address that has seen its image, as prefix and media caches lie there, unless that one has no room
and another has (rendezvous hashing, so that an address more or less moves few images). Calls wait in one queue, first
come first served but for a look ahead for one that belongs where room has come free. An address that does not answer
takes no calls until a probe is answered; one that was set up wrongly takes none for the rest of the run; one that
appears in `urls_file` joins.

Everything here runs in one event loop. Not here: what a failure means (`teacher.failures`) and what is done about it
(`teacher.group`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from itertools import islice
from pathlib import Path

from schemas.config import EndpointConfig
from schemas.context import outside_shards
from schemas.errors import BimodeError, TeacherMisconfigured, TeacherUnreachable
from teacher.admission import Window
from teacher.engine_load import EngineLoad, parse_load
from teacher.failures import BAD_REPLY, NETWORK_ERRORS, TIMED_OUT, Trouble, trouble_of_exception
from teacher.transport import ReplyTooLong, Transport
from teacher.wire import served_models

_log = logging.getLogger(__name__)

PROBE_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.05
MAX_PAUSE_SECONDS = 2.0
"""Between two probes of an address that does not answer: the first pause doubles up to the last."""
LOAD_SECONDS = 0.5
"""Between two looks at an engine's load."""
WATCH_SECONDS = 5.0
"""Between two looks at `urls_file`."""
LOOK_AHEAD = 64
"""As many waiting calls are looked through for one whose image belongs to the address with room."""

Revive = Callable[[str], Awaitable[None]]
"""Called with an address that does not answer any more, to start its server again if it is ours. Raises BimodeError."""


class State(StrEnum):
    """UP: takes calls. DOWN: does not answer and is probed. OUT: set up wrongly, or gone from the file."""

    UP = "up"
    DOWN = "down"
    OUT = "out"


@dataclass(eq=False, slots=True)
class Address:
    """One address. num_in_flight: sequences there now. generation: how often it has died, as far as was seen."""

    transport: Transport
    window: Window
    state: State = State.UP
    num_in_flight: int = 0
    generation: int = 0
    paused_until: float = -math.inf
    started: float | None = None
    kept_for: _Waiter | None = None
    """The call that shall be here alone: the address is drained for it."""
    probe: asyncio.Task[Trouble | None] | None = None
    tells_load: bool | None = None
    """Whether it speaks of its load as vLLM does; None before it was asked."""
    load: EngineLoad | None = None

    @property
    def url(self) -> str:
        return self.transport.url

    def has_room(self, num_sequences: int, now: float) -> bool:
        if self.state is not State.UP or now < self.paused_until or self.kept_for is not None:
            return False
        # A call of more sequences than the window would otherwise wait for ever.
        return self.num_in_flight == 0 or self.num_in_flight + num_sequences <= self.window.limit

    @property
    def fullness(self) -> float:
        return self.num_in_flight / self.window.size


@dataclass(slots=True)
class Wish:
    """What a call wants. affinity: what it shares with others that should go to the same address. avoid: addresses that
    just failed it, used only where there is no other. is_alone: no other call of ours beside it.
    """

    affinity: str
    num_sequences: int = 1
    avoid: set[Address] = field(default_factory=set)
    is_alone: bool = False


@dataclass(eq=False, slots=True)
class _Waiter:
    wish: Wish
    granted: asyncio.Future[Address]
    num_passed_over: int = 0


class Addresses:
    """All addresses of an endpoint. `start` before the first call, `close` after the last.

    fatal: why no call can be made any more. num_answers: how often any of them spoke.
    """

    def __init__(self, endpoint: EndpointConfig, revive: Revive | None = None) -> None:
        self.endpoint = endpoint
        self.all: list[Address] = []
        self.fatal: BimodeError | None = None
        self.num_answers = 0
        self._revive = revive
        self._waiting: deque[_Waiter] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._outage_since: float | None = None
        self._from_file: set[str] = set()
        self._refused: dict[str, str] = {}
        self._changed = asyncio.Event()
        """Set when an address is up again, or all is over."""
        for url in dict.fromkeys(url.rstrip("/") for url in [endpoint.url, *endpoint.more_urls]):
            transport = Transport(url, api_key_env=endpoint.api_key_env)
            self.all.append(Address(transport, Window(endpoint.concurrency)))

    def start(self) -> None:
        """Begins to watch load and file, if that has not begun."""
        if not self._tasks:
            self._spawn(self._watch_load())
            if self.endpoint.urls_file is not None:
                self._spawn(self._watch_file(Path(self.endpoint.urls_file)))

    async def close(self) -> None:
        probes = [address.probe for address in self.all if address.probe is not None]
        for task in (*self._tasks, *probes):
            task.cancel()
        await asyncio.gather(*self._tasks, *probes, return_exceptions=True)
        for address in self.all:
            await address.transport.close()

    @property
    def up(self) -> list[Address]:
        return [address for address in self.all if address.state is State.UP]

    @property
    def num_waiting(self) -> int:
        """Calls that wait for room."""
        return len(self._waiting)

    def raise_if_fatal(self) -> None:
        if self.fatal is not None:
            # A new exception for each asker: one that is raised in many tasks collects all their tracebacks.
            raise type(self.fatal)(str(self.fatal))

    def fail(self, error: BimodeError) -> None:
        """Ends all waiting, now and from now on."""
        self.fatal = self.fatal or error
        self._changed.set()
        for waiter in self._waiting:
            if not waiter.granted.done():
                waiter.granted.set_exception(type(self.fatal)(str(self.fatal)))
        self._waiting.clear()

    async def acquire(self, wish: Wish) -> Address:
        """Waits for room and returns the address; `release` gives it back. Raises BimodeError: when `fatal` is set."""
        self.raise_if_fatal()
        self.start()
        waiter = _Waiter(wish, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        if len(self._waiting) == 1 or wish.is_alone:
            self._dispatch()
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
                self.release(waiter.granted.result(), wish)
            elif waiter in self._waiting:
                self._waiting.remove(waiter)
                self._let_go(waiter)
            raise

    def release(self, address: Address, wish: Wish) -> None:
        address.num_in_flight -= wish.num_sequences
        if wish.is_alone:
            address.kept_for = None
        self._dispatch()

    def note_answer(self, address: Address) -> None:
        """The address spoke, whatever it said."""
        self.num_answers += 1
        if address.state is State.UP:
            self._outage_since = None

    def note_finished(self, address: Address, num_sequences: int) -> None:
        is_full = address.num_in_flight + num_sequences > address.window.limit or bool(self._waiting)
        address.window.on_finished(num_sequences, time.monotonic(), is_full=is_full)

    def back_off(self, address: Address, seconds: float) -> None:
        """The address has too much to do: it gets a smaller window, and nothing for so many seconds."""
        address.window.on_overload(time.monotonic())
        if seconds > 0:
            address.paused_until = max(address.paused_until, time.monotonic() + seconds)
            asyncio.get_running_loop().call_later(seconds, self._dispatch)

    async def confirm(self, address: Address) -> None:
        """Finds out whether an address that failed a call is there; one that is not takes no calls from now on.

        A server busy with one endless generation answers no call, but it is there. `generation` is raised when it is
        not, or has been restarted meanwhile.
        """
        if address.state is not State.UP:
            return
        if address.probe is None or address.probe.done():
            address.probe = asyncio.create_task(self._probe(address))
        trouble = await asyncio.shield(address.probe)
        if trouble is None:
            self.note_answer(address)
        elif address.state is State.UP:
            self._set_down(address, trouble)

    def take_out(self, address: Address, why: BimodeError) -> None:
        """An address that is set up wrongly takes no calls any more. If it was the last, that is the end of asking."""
        address.state = State.OUT
        if all(other.state is State.OUT for other in self.all):
            self.fail(why)
            return
        _log.warning("%s is left out: %s", address.url, why)
        self._dispatch()

    async def models(self, address: Address) -> bytes | Trouble:
        """Returns the body of GET /models, or why there is none."""
        return await _get(address.transport.get("/models"), "GET /models")

    async def wait_until_one_answers(self) -> None:
        """Asks all addresses what they serve and waits until one gives an answer; those that do not are probed on.

        Raises TeacherUnreachable: after `unreachable_seconds` without any.
        """
        self.start()
        await asyncio.gather(*(self.confirm(address) for address in self.all))
        while not self.up and self.fatal is None and any(a.state is State.DOWN for a in self.all):
            self._changed.clear()
            await self._changed.wait()
        self.raise_if_fatal()

    def _spawn(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await work
            except BimodeError as error:
                self.fail(error)

        # It outlives the row that happens to begin it, and must not log in its name.
        task = asyncio.create_task(run(), context=outside_shards())
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    def _dispatch(self) -> None:
        """Gives room to those that wait for it."""
        now = time.monotonic()
        while self._waiting and self.fatal is None:
            waiter = self._next(now)
            if waiter is None:
                return
            self._waiting.remove(waiter)

    def _next(self, now: float) -> _Waiter | None:
        """Grants one waiting call its address and returns it, or None when nobody can be served."""
        head = self._waiting[0]
        if head.granted.done():
            return head
        open_ = self.up
        if len(open_) > 1 and head.num_passed_over < LOOK_AHEAD:
            for waiter in list(islice(self._waiting, LOOK_AHEAD)):
                home = home_of(waiter.wish, open_)
                if (
                    waiter.wish.is_alone
                    or home in waiter.wish.avoid
                    or not home.has_room(waiter.wish.num_sequences, now)
                ):
                    continue
                head.num_passed_over += waiter is not head
                return self._grant(waiter, home)
        for waiter in list(islice(self._waiting, LOOK_AHEAD if head.wish.is_alone else 1)):
            address = self._choose(waiter, open_, now)
            if address is not None:
                return self._grant(waiter, address)
        return None

    def _choose(self, waiter: _Waiter, open_: list[Address], now: float) -> Address | None:
        wish = waiter.wish
        chosen = [address for address in open_ if address not in wish.avoid] or open_
        if wish.is_alone:
            return self._drained(waiter, chosen)
        roomy = [address for address in chosen if address.has_room(wish.num_sequences, now)]
        return min(roomy, key=lambda address: address.fullness) if roomy else None

    def _drained(self, waiter: _Waiter, open_: list[Address]) -> Address | None:
        """Returns the address that is empty for a call that must be alone, or begins to empty one."""
        kept = next((address for address in open_ if address.kept_for is waiter), None)
        if kept is None:
            free = [address for address in open_ if address.kept_for is None]
            if not free:
                return None
            kept = min(free, key=lambda address: address.num_in_flight)
            kept.kept_for = waiter
        return kept if kept.num_in_flight == 0 else None

    def _grant(self, waiter: _Waiter, address: Address) -> _Waiter:
        address.num_in_flight += waiter.wish.num_sequences
        waiter.granted.set_result(address)
        return waiter

    def _let_go(self, waiter: _Waiter) -> None:
        for address in self.all:
            if address.kept_for is waiter:
                address.kept_for = None
        self._dispatch()

    async def _probe(self, address: Address) -> Trouble | None:
        """Returns None if the address answers, else what came instead."""
        if address.tells_load:
            # vLLM's own word; its list of models outlives a dead engine.
            outcome = await _get(address.transport.get_beside("/health"), "GET /health")
            if isinstance(outcome, Trouble) and outcome.status is not None and outcome.status >= 500:
                return outcome
        else:
            outcome = await self.models(address)
        if isinstance(outcome, Trouble) and not outcome.handling.is_answer:
            return outcome
        if address.tells_load:
            # A server that was restarted in no time is known by the time of its start.
            await self._look_at_load(address)
        return None

    def _set_down(self, address: Address, trouble: Trouble) -> None:
        address.state = State.DOWN
        address.generation += 1
        address.kept_for = None
        if not self.up:
            self._outage_since = time.monotonic()
        _log.warning(
            "the teacher at %s does not answer (%s); trying for %g s",
            address.url, trouble.detail, self.endpoint.unreachable_seconds,
        )  # fmt: skip
        self._spawn(self._bring_back(address, trouble))

    async def _bring_back(self, address: Address, trouble: Trouble) -> None:
        """Probes an address until it answers. Raises TeacherUnreachable: when none has answered for too long."""
        if self._revive is not None:
            await self._revive(address.url)
        pause = FIRST_PAUSE_SECONDS
        while address.state is State.DOWN:
            left = self._seconds_left()
            outcome = await self._probe(address)
            if outcome is None:
                self._set_up(address)
                return
            if left <= 0:
                raise self._unreachable(address, outcome)
            await asyncio.sleep(min(pause, max(left, 0.01)))
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def _set_up(self, address: Address) -> None:
        _log.info("the teacher at %s answers", address.url)
        address.state = State.UP
        address.tells_load = None if address.tells_load is False else address.tells_load
        address.window.on_restart()
        self._outage_since = None
        self._changed.set()
        self._dispatch()

    def _seconds_left(self) -> float:
        """Returns how long may still be waited for any address to answer."""
        if self.up or self._outage_since is None:
            return math.inf
        return self._outage_since + self.endpoint.unreachable_seconds - time.monotonic()

    def _unreachable(self, address: Address, trouble: Trouble) -> TeacherUnreachable:
        waited = time.monotonic() - (self._outage_since or time.monotonic())
        others = f" and {len(self.all) - 1} other addresses have" if len(self.all) > 1 else " has"
        return TeacherUnreachable(
            f"the teacher at {address.url}{others} not answered for {waited:.0f} s ({trouble.detail}). Start it or "
            "correct its address, then run again: stored replies are not asked for twice"
        )

    async def _watch_load(self) -> None:
        while True:
            await asyncio.gather(*(self._look_at_load(a) for a in self.up if a.num_in_flight or self._waiting))
            self._dispatch()
            await asyncio.sleep(LOAD_SECONDS)

    async def _look_at_load(self, address: Address) -> None:
        """Lets the window follow what vLLM says. An address that says nothing is not asked again while it is up."""
        if address.tells_load is False:
            return
        outcome = await _get(address.transport.get_beside("/metrics"), "GET /metrics")
        load = None if isinstance(outcome, Trouble) else parse_load(outcome)
        if load is None:
            # One that has spoken before is only busy, or about to be found dead.
            address.tells_load = address.tells_load or False
            return
        if address.started is not None and load.started is not None and load.started != address.started:
            _log.warning("the teacher at %s has been restarted", address.url)
            address.generation += 1
            address.window.on_restart()
        address.tells_load, address.started, address.load = True, load.started or address.started, load
        address.window.on_load(load, address.num_in_flight)

    async def _watch_file(self, path: Path) -> None:
        """Lets addresses join that appear in the file, and leaves alone those that have gone from it."""
        while True:
            listed = set(await asyncio.to_thread(_read_urls, path))
            for url in sorted(listed - {address.url for address in self.all if address.state is not State.OUT}):
                await self._join(url)
            for address in self.all:
                if address.url in self._from_file - listed and address.state is not State.OUT:
                    self.take_out(address, TeacherUnreachable(f"{address.url} is no longer in {path}"))
            self._from_file |= listed
            await asyncio.sleep(WATCH_SECONDS)

    async def _join(self, url: str) -> None:
        """Adds an address if it serves the model; else it is asked again at the next look."""
        try:
            transport = Transport(url, api_key_env=self.endpoint.api_key_env)
        except TeacherMisconfigured as error:
            self._refuse(url, str(error))
            return
        address = Address(transport, Window(self.endpoint.concurrency))
        outcome = await self.models(address)
        names = None if isinstance(outcome, Trouble) else served_models(outcome)
        if not is_served(self.endpoint.model, names):
            self._refuse(url, outcome.detail if isinstance(outcome, Trouble) else f"it serves {names}")
            await transport.close()
            return
        _log.info("%s joins", url)
        self.all = [known for known in self.all if known.url != url]
        self.all.append(address)
        self._outage_since = None
        self._dispatch()

    def _refuse(self, url: str, why: str) -> None:
        if self._refused.get(url) != why:
            self._refused[url] = why
            _log.warning("%s does not join: %s", url, why)


def is_served(model: str, names: list[str] | None) -> bool:
    """Returns whether a model is among those an endpoint lists. Google's lists "models/NAME" and takes NAME."""
    return names is not None and bool({model, f"models/{model}"} & set(names))


def home_of(wish: Wish, open_: list[Address]) -> Address:
    """Returns the address that a call belongs to: the one with the highest hash of both (rendezvous hashing)."""
    return max(open_, key=lambda address: _score(wish.affinity, address.url))


@lru_cache(maxsize=2**16)
def _score(affinity: str, url: str) -> bytes:
    return hashlib.blake2b(f"{affinity} {url}".encode("utf-8", "replace"), digest_size=8).digest()


def _read_urls(path: Path) -> list[str]:
    """Returns the addresses in a file, one a line; what follows a # is a remark. A missing file has none."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError):
            _log.warning("cannot read the addresses in %s: %s", path, error)
        return []
    urls = (line.partition("#")[0].strip().rstrip("/") for line in lines)
    return [url for url in urls if url]


async def _get(answer: Awaitable[bytes], what: str) -> bytes | Trouble:
    """Returns the body of an answer, or what came instead."""
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            return await answer
    except TimeoutError:
        return Trouble(TIMED_OUT, f"no answer to {what} within {PROBE_SECONDS:g} s")
    except NETWORK_ERRORS as error:
        return trouble_of_exception(error)
    except ReplyTooLong as error:
        return Trouble(BAD_REPLY, str(error))
