"""What the tasks of one process share: the image store, the verifier processes, and the gate before the endpoints.

A `Runtime` is made from the configuration alone, so a task on another process or machine makes its own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property
from pathlib import Path

from flows.labelling import Desk
from flows.workspace import UsageCount, Workspace
from judges.answers import VerifierPool
from schemas.config import EndpointConfig, RunConfig
from schemas.requests import CallFailure, Reply, TeacherRequest
from sources import ImageStore
from teacher import serving
from teacher.client import Teacher, reply_key
from teacher.journal import Journal

_log = logging.getLogger(__name__)


class Runtime:
    """Shared by the tasks of one process; threads may use it at once.

    num_new_calls: calls that were really made so far; replies from the journal do not count.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.workspace = Workspace(config.workdir)
        self._lock = threading.Lock()
        self._server: serving.ServerHandle | None = None
        self._opened: set[str] = set()
        self.num_new_calls = 0

    def __reduce__(self) -> tuple[type[Runtime], tuple[RunConfig]]:
        return (Runtime, (self.config,))

    @cached_property
    def images(self) -> ImageStore:
        return ImageStore(self.workspace.images, self.config.images)

    @cached_property
    def verifiers(self) -> VerifierPool:
        return VerifierPool(self.config.verification)

    def count_calls(self, num_calls: int) -> None:
        with self._lock:
            self.num_new_calls += num_calls

    def close(self) -> None:
        """Stops the verifier processes and the vLLM server, if this runtime started one."""
        if "verifiers" in self.__dict__:
            self.verifiers.close()
        if self._server is not None:
            _log.info("stopping the teacher's vLLM server")
            self._server.stop()
            self._server = None

    def open_endpoint(self, endpoint: EndpointConfig) -> None:
        """Starts vLLM for the teacher where the configuration says so and nothing answers at its address.

        Called before the first real call of a stage, never when every reply is in the journal. Raises ServingError.
        """
        with self._lock:
            if endpoint.url in self._opened:
                return
            serve = self.config.serve
            is_served = serve is not None and endpoint.url == self.config.teacher.url
            if serve is not None and is_served and not serving.is_answering(endpoint):
                logs = self.workspace.root / "logs"
                _log.info("starting vLLM for %s; its log is %s", endpoint.model, logs / "vllm.log")
                self._server = serving.start_server(
                    endpoint, serve, log_path=logs / "vllm.log", pid_path=logs / "vllm.pid", detached=False
                )
            self._opened.add(endpoint.url)


class Asker:
    """One endpoint within one shard: answers from the journal, opens the endpoint at the first miss, counts usage.

    usage: what the replies cost, by purpose, whoever paid for them: a function of the replies alone.
    """

    def __init__(self, teacher: Teacher, runtime: Runtime) -> None:
        self._teacher = teacher
        self._runtime = runtime
        self._opening = asyncio.Lock()
        self._is_open = False
        self.usage: dict[str, UsageCount] = {}

    async def ask(self, request: TeacherRequest) -> Reply | CallFailure:
        """Returns the reply to a request. Raises TeacherError, ServingError or StorageError: the stage cannot go on."""
        if not self._is_open and self._teacher.journal.lookup(reply_key(request, self._teacher.endpoint)) is None:
            async with self._opening:
                if not self._is_open:
                    await asyncio.to_thread(self._runtime.open_endpoint, self._teacher.endpoint)
                    await self._teacher.check()
                    self._is_open = True
        reply = await self._teacher.ask(request)
        if isinstance(reply, Reply):
            cost = UsageCount(1, reply.prompt_tokens, reply.completion_tokens)
            self.usage[request.purpose] = self.usage.get(request.purpose, UsageCount()) + cost
        return reply

    @property
    def num_new_calls(self) -> int:
        return sum(usage.num_calls for usage in self._teacher.usage.values())


@asynccontextmanager
async def open_desk(runtime: Runtime, journal: Journal) -> AsyncIterator[tuple[Desk, list[Asker]]]:
    """Yields the desk for the rows of one shard, with the askers behind it.

    The calls in flight of an endpoint are shared out evenly between the shards in work at once.
    """
    config = runtime.config
    async with _asker(runtime, config.teacher, journal) as teacher:
        if config.reasoner is None:
            yield Desk(config, teacher.ask, teacher.ask, runtime.verifiers), [teacher]
            return
        async with _asker(runtime, config.reasoner, journal) as reasoner:
            yield Desk(config, teacher.ask, reasoner.ask, runtime.verifiers), [teacher, reasoner]


@asynccontextmanager
async def _asker(runtime: Runtime, endpoint: EndpointConfig, journal: Journal) -> AsyncIterator[Asker]:
    share = max(1, endpoint.concurrency // runtime.config.parallel_shards)
    shared_out = endpoint.model_copy(update={"concurrency": share})
    images = runtime.images
    async with Teacher(shared_out, journal, images.resized_bytes, images.path) as teacher:
        yield Asker(teacher, runtime)


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Yields the journal of one shard, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Journal(path) as journal:
        yield journal
