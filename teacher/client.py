"""Asking a teacher: one durable reply per request, from the journal if it is there, else from the endpoint.

Any OpenAI-compatible endpoint will do. Retries, admission and the meaning of each failure are ours and not the openai
package's, because a run of days must tell a restarting server from a wrong model name and a bad row from both
(`teacher.failures` holds the table, `teacher.group` acts on it). Left out on purpose: streaming.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from operator import attrgetter
from types import TracebackType

from schemas.config import EndpointConfig
from schemas.errors import BimodeError, StorageError
from schemas.requests import CallFailure, ModelIdentity, Reply, RequestKeys, TeacherRequest
from schemas.usage import Usage
from teacher.endpoints import Revive
from teacher.group import Answer, EndpointGroup
from teacher.images import ImagePath, ReadImage
from teacher.journal import Journal

Outcome = Reply | CallFailure


def reply_key(request: TeacherRequest, endpoint: EndpointConfig) -> str:
    """Returns the journal key of one request to an endpoint, see `ReplyKeys`."""
    return ReplyKeys(endpoint).key(request)


class ReplyKeys:
    """The journal keys of requests to one endpoint.

    How far images are reduced shapes the reply of a request that has some, so it is part of the key; how they travel
    does not, and is not.
    """

    def __init__(self, endpoint: EndpointConfig) -> None:
        seen = {**endpoint.extra_body, "bimode:max_image_pixels": endpoint.max_image_pixels}
        self._of_texts = RequestKeys(ModelIdentity(endpoint.model, endpoint.revision, endpoint.extra_body))
        self._of_images = RequestKeys(ModelIdentity(endpoint.model, endpoint.revision, seen))

    def key(self, request: TeacherRequest) -> str:
        """Returns the key of a request."""
        has_images = any(message.images for message in request.messages)
        return (self._of_images if has_images else self._of_texts).key(request)


class Teacher:
    """The replies of one endpoint that one journal holds, and those still to be asked for.

    Used as an async context manager in one event loop. group: the calls to the endpoint, shared with others that ask
    it; without one the teacher has its own, made of the further arguments, which see `EndpointGroup`.

    Raises TeacherMisconfigured: if address or key cannot be used at all.
    """

    def __init__(
        self,
        endpoint: EndpointConfig,
        journal: Journal,
        read_image: ReadImage,
        image_path: ImagePath | None = None,
        *,
        first_backoff_seconds: float = 0.5,
        revive: Revive | None = None,
        group: EndpointGroup | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.journal = journal
        self.keys = ReplyKeys(endpoint)
        self._owns_group = group is None
        self.group = group or EndpointGroup(
            endpoint, read_image, image_path, revive=revive, first_backoff_seconds=first_backoff_seconds
        )
        self._under_way: dict[str, list[asyncio.Future[Outcome]]] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._usage: dict[str, Usage] = {}
        self._fatal: BimodeError | None = None

    async def __aenter__(self) -> Teacher:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A call outlives an asker that was cancelled (its reply is paid for), but not the teacher.
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        if self._owns_group:
            await self.group.close()

    @property
    def usage(self) -> dict[str, Usage]:
        """A snapshot of what asking has cost so far, by purpose."""
        return dict(self._usage)

    async def check(self) -> None:
        """Asks what the endpoint serves, before any row is asked. See `EndpointGroup.check`."""
        await self.group.check()

    async def ask(self, request: TeacherRequest) -> Outcome:
        """Returns the reply, durably stored, or why this request got none. See `ask_samples`."""
        return (await self.ask_samples([request]))[0]

    async def ask_samples(self, requests: Sequence[TeacherRequest]) -> list[Outcome]:
        """Returns the replies to several samples of one question, in order; each is durably stored by itself.

        requests: made by `TeacherRequest.sample` from one. Samples that follow one another and are not stored yet are
        asked for by one call with as many choices, if the endpoint knows such calls. Equal requests share one call,
        also while it is under way.

        Raises TeacherUnreachable, TeacherMisconfigured: if asking further would be useless, now and at every later
        call. Raises StorageError: if the journal cannot be written.
        """
        found: list[Outcome | asyncio.Future[Outcome]] = []
        missing: list[tuple[str, TeacherRequest]] = []
        loop = asyncio.get_running_loop()
        for request in requests:
            key = self.keys.key(request)
            known = self.journal.lookup(key)
            if known is not None:
                found.append(known)
                continue
            if key not in self._under_way:
                self._under_way[key] = []
                missing.append((key, request))
            # Each asker has a future of its own: who gives up waiting does not take the outcome from the others.
            waiter: asyncio.Future[Outcome] = loop.create_future()
            self._under_way[key].append(waiter)
            found.append(waiter)
        if len(missing) < len(requests):
            self._count(requests[0], Usage(num_reused=len(requests) - len(missing)))
        for run in _runs(missing, together=self.group.takes_several_choices):
            self._begin(run)
        return [await item if isinstance(item, asyncio.Future) else item for item in found]

    def _begin(self, run: list[tuple[str, TeacherRequest]]) -> None:
        call = asyncio.create_task(self._ask_run(run))
        self._calls.add(call)
        call.add_done_callback(partial(self._ended, run))

    async def _ask_run(self, run: list[tuple[str, TeacherRequest]]) -> None:
        """Asks for samples that follow one another until each has its outcome."""
        left = run
        while left:
            self._raise_if_fatal()
            answer = await self.group.call(left[0][1], len(left))
            if isinstance(answer.outcome, CallFailure):
                self._note(left[0][1], answer)
                for key, _ in left:
                    self._settle(key, answer.outcome)
                return
            answered, left = left[: len(answer.outcome)], left[len(answer.outcome) :]
            replies = await self._store(
                [(key, request, reply) for (key, request), reply in zip(answered, answer.outcome, strict=True)]
            )
            self._note(answered[0][1], answer)
            for (key, _), reply in zip(answered, replies, strict=True):
                self._settle(key, reply)
            if left and not self.group.takes_several_choices:
                for item in left:
                    self._begin([item])
                return

    async def _store(self, records: list[tuple[str, TeacherRequest, Reply]]) -> list[Reply]:
        """Returns what is stored: the first reply under a key stays its reply."""
        try:
            return await self.journal.append_many_durably(records)
        except StorageError as error:
            self._fatal = error
            raise

    def _note(self, request: TeacherRequest, answer: Answer) -> None:
        num_retries = answer.num_attempts - 1
        if isinstance(answer.outcome, CallFailure):
            self._count(request, Usage(num_calls=1, num_retries=num_retries, num_failures=1))
        else:
            self._count(request, Usage.of_replies(answer.outcome, num_calls=1, num_retries=num_retries))

    def _settle(self, key: str, outcome: Outcome) -> None:
        for waiter in self._under_way.pop(key):
            if not waiter.done():
                waiter.set_result(outcome)

    def _ended(self, run: list[tuple[str, TeacherRequest]], call: asyncio.Task[None]) -> None:
        """Hands what ended a call to all that wait for its samples."""
        self._calls.discard(call)
        error = None if call.cancelled() else call.exception()
        if not call.cancelled() and error is None:
            return
        for key, _ in run:
            for waiter in self._under_way.pop(key, ()):
                if waiter.done():
                    continue
                if error is None:
                    waiter.cancel()
                    continue
                # A new exception for each asker: one raised in many tasks collects all their tracebacks.
                waiter.set_exception(type(error)(str(error)) if isinstance(error, BimodeError) else error)
                # Whoever waits for several samples looks at the first alone; looking here keeps asyncio content.
                waiter.exception()

    def _raise_if_fatal(self) -> None:
        if self._fatal is not None:
            raise type(self._fatal)(str(self._fatal))

    def _count(self, request: TeacherRequest, usage: Usage) -> None:
        self._usage[request.purpose] = self._usage.get(request.purpose, Usage()) + usage


def _runs(missing: Sequence[tuple[str, TeacherRequest]], *, together: bool) -> list[list[tuple[str, TeacherRequest]]]:
    """Returns the requests in runs that one call can answer: choice j has index and seed of the first plus j."""
    runs: list[list[tuple[str, TeacherRequest]]] = []
    for key, request in missing:
        if together and runs and _follows(runs[-1][-1][1], request):
            runs[-1].append((key, request))
        else:
            runs.append([(key, request)])
    return runs


def _follows(last: TeacherRequest, request: TeacherRequest) -> bool:
    # Engines do not wrap seeds around.
    is_next = request.index == last.index + 1 and request.seed == last.seed + 1
    return is_next and _question(request) == _question(last)


_question = attrgetter(*(field.name for field in fields(TeacherRequest) if field.name not in {"index", "seed"}))
