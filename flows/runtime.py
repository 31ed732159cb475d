"""What the tasks of one process share: the image store, the verifier processes, the endpoints and their event loop.

A `Runtime` is made from the configuration alone, so a task on another process or machine makes its own. All calls of a
process are made in one event loop, whichever shard they are for: so many sequences fit an endpoint, not a shard.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

from flows.accounting import Accounts, AskedUsage, Load, stage_total
from flows.gpu_devices import GpuHost
from flows.gpu_lease import Leases
from flows.gpu_priority import current_priority
from flows.labelling import Desk
from flows.runtime_view import CountedVerifiers, EndpointView, RuntimeView
from flows.stack import project_folder
from flows.teacher_lease import Asker as TeacherAsker
from flows.teacher_lease import Seat, open_seat
from flows.workspace import Workspace
from judges.sampling_plan import SamplingPlans
from schemas.config import EndpointConfig, RunConfig
from schemas.context import outside_shards
from schemas.requests import CallFailure, Reply, TeacherRequest
from schemas.usage import Usage
from sources import ImageStore
from teacher import serving
from teacher.client import Teacher
from teacher.group import EndpointGroup
from teacher.journal import Journal

_log = logging.getLogger(__name__)
_VIEW_SECONDS = 2.0
"""Longest wait of those that only look for a busy event loop."""
_Result = TypeVar("_Result")


class Runtime:
    """Shared by the tasks of one process; threads may use it at once. accounts: what was paid so far."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.workspace = Workspace(config.workdir)
        self.accounts = Accounts()
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread: threading.Thread | None = None
        self._seat: Seat | None = None
        self._priority = current_priority()
        self._is_closing = threading.Event()
        self._groups: dict[str, EndpointGroup] = {}
        self._opened: dict[str, asyncio.Task[None]] = {}
        self._starting = asyncio.Lock()
        self._viewed = RuntimeView()
        self._made: dict[Callable[[Runtime], Any], Any] = {}

    def __reduce__(self) -> tuple[type[Runtime], tuple[RunConfig]]:
        return (Runtime, (self.config,))

    @cached_property
    def images(self) -> ImageStore:
        return ImageStore(self.workspace.images, self.config.images)

    @cached_property
    def verifiers(self) -> CountedVerifiers:
        return CountedVerifiers(self.config.verification)

    @cached_property
    def plans(self) -> SamplingPlans:
        return SamplingPlans(self.config.performance)

    def shared(self, make: Callable[[Runtime], _Result]) -> _Result:
        """Returns what a class or function makes of this runtime; made once, whoever asks first."""
        with self._lock:
            if make not in self._made:
                self._made[make] = make(self)
            made: _Result = self._made[make]
            return made

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Runs a coroutine in the process's one event loop and returns its result; called in any other thread."""
        future = asyncio.run_coroutine_threadsafe(work, self._running_loop())
        try:
            return future.result()
        except BaseException:
            # An interrupted thread leaves nothing at work behind it.
            future.cancel()
            raise

    def load(self, stage: str) -> Load:
        """Returns what is going on at the endpoints, and what the stage has paid; called outside the event loop."""
        seen = self.snapshot()
        return Load(stage_total(seen.paid, stage), seen.num_in_flight, sum(seen.num_waiting.values()))

    def snapshot(self) -> RuntimeView:
        """Returns what goes on now, exactly, however long the event loop takes to tell; called outside of it."""
        return self._view() if self._loop is None else self.run(self._shown())

    async def _shown(self) -> RuntimeView:
        return self._view()

    def view(self) -> RuntimeView:
        """Returns what goes on now, for those that only look; called in any thread but the event loop's, at any time.

        A loop that is busy or just ending shows what it showed last.
        """
        loop = self._loop
        if loop is None:
            self._viewed = self._view()
            return self._viewed
        looked: Future[RuntimeView] = Future()
        try:
            loop.call_soon_threadsafe(lambda: looked.set_result(self._view()))
            self._viewed = looked.result(_VIEW_SECONDS)
        except (RuntimeError, TimeoutError):  # it is closed, or has other things to do
            _log.debug("the event loop did not show itself; what it showed last is shown")
        return self._viewed

    def _view(self) -> RuntimeView:
        num_waiting: Counter[str] = Counter()
        endpoints = []
        for group in list(self._groups.values()):
            model = group.endpoint.model
            num_waiting[model] += group.addresses.num_waiting
            endpoints += [
                EndpointView(a.url, model, str(a.state), a.num_in_flight, a.window.limit, a.generation)
                for a in group.addresses.all
            ]
        verifiers = self.__dict__.get("verifiers")
        verdicts = {} if verifiers is None else dict(verifiers.verdicts)
        num_comparing = 0 if verifiers is None else verifiers.num_comparing
        return RuntimeView(self.accounts.paid(), tuple(endpoints), num_waiting, verdicts, num_comparing)

    def close(self) -> None:
        """Ends the calls and the verifier processes, and the vLLM server if this runtime started one."""
        self._is_closing.set()  # whoever still waits for a GPU gives up
        if self._loop is not None and self._loop_thread is not None:
            for group in self._groups.values():
                asyncio.run_coroutine_threadsafe(group.close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join()
            self._loop = self._loop_thread = None
        if "verifiers" in self.__dict__:
            self.verifiers.close()
        if self._seat is not None:
            if self._seat.server is not None:
                _log.info("stopping the teacher's vLLM server")
            self._seat.leave()
            self._seat = None

    def group(self, endpoint: EndpointConfig) -> EndpointGroup:
        """Returns the calls to an endpoint, shared by all shards; called in the event loop."""
        # Teacher and reasoner may be one server, asked in two ways.
        key = endpoint.model_dump_json()
        group = self._groups.get(key)
        if group is None:
            sent = endpoint.model_copy(update={"images_as": self._images_as(endpoint)})
            group = EndpointGroup(
                sent, self.images.resized_bytes, self.images.resized_path, revive=partial(self._revive, endpoint)
            )
            self._groups[key] = group
        return group

    async def open(self, endpoint: EndpointConfig) -> None:
        """Starts vLLM for the teacher where that is configured and nothing answers, and asks what is served, once.

        Called before the first real call, never when every reply is in the journal. Raises TeacherError, ServingError.
        """
        key = endpoint.model_dump_json()
        if key not in self._opened:
            # It is done for all, and must not log in the name of the row that came first.
            self._opened[key] = asyncio.create_task(self._open(endpoint), context=outside_shards())
        await asyncio.shield(self._opened[key])

    async def _open(self, endpoint: EndpointConfig) -> None:
        if self._is_served_here(endpoint):
            # Teachers of a panel may share the address, and are opened at the same time.
            async with self._starting:
                await asyncio.to_thread(self._take_seat)
        await self.group(endpoint).check()

    def _take_seat(self) -> None:
        """Waits until the teacher may be asked, and starts it if nothing answers; once for all who ask there."""
        if self._seat is not None:
            return
        serve, endpoint = self.config.serve, self.config.teacher
        assert serve is not None, "only called where vLLM is to be started"
        logs = self.workspace.root / "logs"
        asker = TeacherAsker(
            Leases(GpuHost.here(project_folder())),
            f"the curation {self.config.name}",
            self._priority,
            _log.info,
            self._is_closing.is_set,
        )
        paths = {"log_path": logs / "vllm.log", "pid_path": logs / "vllm.pid", "media_folder": self.images.root}
        self._seat = open_seat(asker, endpoint, serve, **paths)

    async def _revive(self, endpoint: EndpointConfig, url: str) -> None:
        """Starts our own server again when it has died. Raises ServingError: it dies too often, or does not start."""
        seat = self._seat
        if seat is None or seat.server is None or not self._is_served_here(endpoint):
            return
        if url == self.config.teacher.url.rstrip("/"):
            seat.server = await asyncio.to_thread(serving.revive, seat.server)

    def num_gpus(self, endpoint: EndpointConfig) -> int | None:
        """Returns how many GPUs compute for an endpoint; None where that is unknown, or no GPU does."""
        if self._seat is None or self._seat.server is None or not self._is_served_here(endpoint):
            return None
        return self._seat.server.num_gpus or None

    def _is_served_here(self, endpoint: EndpointConfig) -> bool:
        return self.config.serve is not None and endpoint.url == self.config.teacher.url

    def _images_as(self, endpoint: EndpointConfig) -> str:
        if endpoint.images_as != "auto":
            return endpoint.images_as
        # A server of ours may read the image store; one that was started otherwise says that it may not, in time.
        return "file_url" if self._is_served_here(endpoint) else "data_url"

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = loop = asyncio.new_event_loop()
                self._loop_thread = threading.Thread(target=lambda: _run_for_ever(loop), name="teacher", daemon=True)
                self._loop_thread.start()
            return self._loop


def _run_for_ever(loop: asyncio.AbstractEventLoop) -> None:
    """Runs an event loop until it is stopped, and closes it."""
    try:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


@dataclass(slots=True)
class _Question:
    """A question that was asked. request: one of its samples. indices: of those whose replies are counted."""

    request: TeacherRequest
    indices: set[int] = field(default_factory=set)


class Asker:
    """One endpoint within one shard: answers from the journal, opens the endpoint at the first miss, counts usage."""

    def __init__(self, teacher: Teacher, runtime: Runtime) -> None:
        self._teacher = teacher
        self._runtime = runtime
        self._is_open = False
        self._began_empty = len(teacher.journal) == 0
        self._questions: dict[tuple[object, ...], _Question] = {}
        self._costs: dict[tuple[str, str], Usage] = {}
        self._shares: dict[str, Usage] = {}

    async def ask(self, request: TeacherRequest) -> Reply | CallFailure:
        """Returns the reply to a request. Raises as `ask_samples` does."""
        return (await self.ask_samples([request]))[0]

    async def ask_samples(self, requests: Sequence[TeacherRequest]) -> list[Reply | CallFailure]:
        """Returns the replies to samples of one question. See `Teacher.ask_samples`.

        Raises TeacherError, ServingError or StorageError: the stage cannot go on.
        """
        if not self._is_open and not all(self.is_stored(request) for request in requests):
            await self._runtime.open(self._teacher.endpoint)
            self._is_open = True
        accounts, num = self._runtime.accounts, len(requests)
        wall, served = accounts.clock(""), accounts.clock(self._teacher.endpoint.url)
        wall_began, served_began = wall.begin(num), served.begin(num)
        try:
            replies = await self._teacher.ask_samples(requests)
        finally:
            self._count_time(requests[0].purpose, wall.end(num, wall_began), served.end(num, served_began))
        for request, reply in zip(requests, replies, strict=True):
            if isinstance(reply, Reply):
                self._count(request, reply)
        return replies

    def is_stored(self, request: TeacherRequest) -> bool:
        """Returns whether the reply is in the journal, so that asking costs nothing."""
        return self._teacher.keys.key(request) in self._teacher.journal

    def count_stored(self) -> None:
        """Counts the samples of the questions asked that nobody needed this time, but that were paid for before.

        A wave may bring more samples than settle the label; when the shard is done again, its replies are taken one
        by one.
        """
        if self._began_empty:
            return
        for question in self._questions.values():
            request = question.request.sample(max(question.indices) + 1)
            while reply := self._teacher.journal.lookup(self._teacher.keys.key(request)):
                self._count(request, reply)
                request = request.sample(request.index + 1)

    @property
    def usage(self) -> AskedUsage:
        """A snapshot of what was asked so far."""
        paid = self._teacher.usage
        for purpose, share in self._shares.items():
            paid[purpose] = paid.get(purpose, Usage()) + share
        if self._runtime.num_gpus(self._teacher.endpoint) is not None:
            paid = {purpose: replace(usage, num_gpu_calls=usage.num_calls) for purpose, usage in paid.items()}
        return AskedUsage(self._teacher.endpoint.model, dict(self._costs), paid)

    def _count_time(self, purpose: str, wall_seconds: float, served_seconds: float) -> None:
        """Counts shares of time as the purpose's, waiting for room included; starting a server is no part of them."""
        num_gpus = self._runtime.num_gpus(self._teacher.endpoint) or 0
        share = Usage(wall_seconds=wall_seconds, gpu_seconds=served_seconds * num_gpus)
        self._shares[purpose] = self._shares.get(purpose, Usage()) + share

    def _count(self, request: TeacherRequest, reply: Reply) -> None:
        """Counts a stored reply once, however often it is asked for; who asks is no part of the question."""
        question = self._questions.setdefault(request.question, _Question(request))
        if request.index in question.indices:
            return
        question.indices.add(request.index)
        row, cost = (request.sample_id, request.purpose), Usage.of_stored(reply)
        before = self._costs.get(row)
        self._costs[row] = cost if before is None else before + cost


@asynccontextmanager
async def open_desk(runtime: Runtime, journal: Journal) -> AsyncIterator[tuple[Desk, list[Asker]]]:
    """Yields the desk for the rows of one shard, with the askers behind it; used in the runtime's event loop."""
    config = runtime.config
    async with AsyncExitStack() as opened:

        async def asker(endpoint: EndpointConfig) -> Asker:
            return await opened.enter_async_context(_asker(runtime, endpoint, journal))

        teacher = await asker(config.teacher)
        reasoner = teacher if config.reasoner is None else await asker(config.reasoner)
        panel = [await asker(endpoint) for endpoint in config.difficulty.panel]
        askers = [teacher, *([] if reasoner is teacher else [reasoner]), *panel]
        yield _desk(runtime, teacher, reasoner, panel), askers


def _desk(runtime: Runtime, teacher: Asker, reasoner: Asker, panel: Sequence[Asker]) -> Desk:
    return Desk(
        runtime.config,
        teacher.ask,
        teacher.ask_samples,
        teacher.is_stored,
        reasoner.ask,
        runtime.verifiers,
        runtime.plans,
        [member.ask for member in panel],
    )


@asynccontextmanager
async def _asker(runtime: Runtime, endpoint: EndpointConfig, journal: Journal) -> AsyncIterator[Asker]:
    images = runtime.images
    async with Teacher(endpoint, journal, images.resized_bytes, group=runtime.group(endpoint)) as teacher:
        yield Asker(teacher, runtime)
