"""One HTTP call's sequences: from the engine's thread to the event loop, and never left behind.

Whatever way a call ends (answered, refused, client gone, reader too slow, server going down),
leaving the `async with` cancels what still runs.

    async with Call.submit(host, requests) as call:
        async for update in call: ...
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

from tpu_stack.errors import UserError
from tpu_stack.serving.http.errors import ApiError, draining, full
from tpu_stack.serving.http.host import Host
from tpu_stack.serving.requests import (
    Event,
    Finished,
    GenerationRequest,
    QueueFull,
    Restarted,
    Token,
)
from tpu_stack.serving.service import Listener, Ticket
from tpu_stack.serving.text_stream import Increment, Placed, TextStream

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Update:
    """What is new of choice `index`; `finish` with its last one.

    `restarted` says that all before this update is void: the model's weights were replaced.
    """

    index: int
    text: str = ""
    tokens: tuple[Placed, ...] = ()
    finish: Finish | None = None
    restarted: bool = False

    def then(self, later: "Update") -> "Update":
        """This update and the next one of the same choice, as one."""
        if later.restarted:
            return later
        text, tokens = self.text + later.text, self.tokens + later.tokens
        return Update(self.index, text, tokens, later.finish, self.restarted)


@dataclass(frozen=True)
class Usage:
    """Tokens of a call. A prompt counts once, however many choices continue it."""

    prompt: int
    new: int
    cached: int


@dataclass
class _Sequence:
    """One choice on the loop's side."""

    index: int
    request: GenerationRequest
    stream: TextStream
    ticket: Ticket | None = None
    finish: Finish | None = None
    closed: bool = False  # the engine has sent its last event
    new_tokens: int = 0
    cached_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0


class Inbox:
    """Events in order of arrival; bounded, so that a reader who never reads costs no memory."""

    def __init__(self, limit: int, on_overflow: Callable[[int], None]):
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[float, int, Event]] = deque()
        self._ready = asyncio.Event()
        self._limit, self._on_overflow = limit, on_overflow
        self.failure: ApiError | None = None

    def listener(self, index: int) -> Listener:
        """What the engine calls from its thread for choice `index`."""

        def listen(event: Event) -> None:
            self._events.append((time.perf_counter(), index, event))
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the loop has closed, and with it the connection
                self._events.clear()

        return listen

    def fail(self, error: ApiError) -> None:
        """Makes the next `get` raise."""
        self.failure = self.failure or error
        self._events.clear()
        self._ready.set()

    def _wake(self) -> None:
        if len(self._events) > self._limit and not self.failure:
            self._on_overflow(len(self._events))
        if self.failure:
            self._events.clear()
        self._ready.set()

    async def get(self) -> list[tuple[float, int, Event]]:
        """Waits for events and takes all there are. Raises what `fail` was given."""
        await self._ready.wait()
        if self.failure:
            raise self.failure
        self._ready.clear()
        taken = []
        while self._events:
            taken.append(self._events.popleft())
        return taken


class Call:
    """The sequences of one HTTP request. Made by `submit`; an async iterator of updates."""

    def __init__(self, host: Host, asks: Sequence[GenerationRequest], stops: Sequence[str]):
        self._host = host
        tokenizer = host.model.tokenizer
        self._sequences = [
            _Sequence(index, ask, TextStream(tokenizer, stops)) for index, ask in enumerate(asks)
        ]
        self._inbox = Inbox(host.limits.pending_tokens * len(asks), self._overflow)
        self._ended_as = "cancelled"

    @classmethod
    def submit(
        cls, host: Host, asks: Sequence[GenerationRequest], stops: Sequence[str] = ()
    ) -> Self:
        """Queues every sequence or none. Raises ApiError: 429 when full, 503 when draining."""
        if host.draining:
            raise draining()
        call = cls(host, asks, stops)
        host.calls.add(call)
        try:
            for sequence in call._sequences:
                listener = call._inbox.listener(sequence.index)
                sequence.ticket = host.model.service.submit(sequence.request, listener)
        except BaseException as error:
            call.close()
            if isinstance(error, QueueFull):
                raise full(error) from error
            if isinstance(error, UserError) and not isinstance(error, ApiError):
                raise ApiError(400, str(error), code="invalid_value") from error
            raise
        return call

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what still runs; may be called again."""
        self._inbox.fail(ApiError(503, "the request was cancelled", code="cancelled"))
        for sequence in self._sequences:
            if not sequence.closed and sequence.ticket is not None:
                self._cancel(sequence)
            if sequence.finish is None:
                self._host.metrics.sequence(self._ended_as)
                sequence.finish = "stop"
        self._host.calls.discard(self)

    def abort(self, error: ApiError) -> None:
        """Ends the call with an error, which its client gets."""
        self._ended_as = error.code or self._ended_as
        self._inbox.fail(error)
        for sequence in self._sequences:
            if not sequence.closed and sequence.ticket is not None:
                self._cancel(sequence)

    def _overflow(self, waiting: int) -> None:
        message = f"the reader is too slow: {waiting} tokens wait for it; the request was cancelled"
        self.abort(ApiError(503, message, code="slow_reader"))

    def _cancel(self, sequence: _Sequence) -> None:
        if sequence.ticket is not None:
            self._host.model.service.cancel(sequence.ticket)

    @property
    def usage(self) -> Usage:
        """Counts so far; final when the iteration has ended."""
        prompts = {id(one.request.prompt): one for one in reversed(self._sequences)}
        return Usage(
            sum(len(sequence.request.prompt) for sequence in prompts.values()),
            sum(sequence.new_tokens for sequence in self._sequences),
            sum(sequence.cached_tokens for sequence in prompts.values()),
        )

    async def __aiter__(self) -> AsyncIterator[Update]:
        """Yields what is new until every choice has finished. Raises ApiError when one failed."""
        while not all(sequence.closed for sequence in self._sequences):
            grown: dict[int, Update] = {}
            for moment, index, event in await self._inbox.get():
                update = self._take(self._sequences[index], moment, event)
                if update is not None:
                    grown[index] = grown[index].then(update) if index in grown else update
            for update in grown.values():
                yield update

    def _take(self, sequence: _Sequence, moment: float, event: Event) -> Update | None:
        if isinstance(event, Token):
            if sequence.finish is not None:
                return None
            sequence.new_tokens += 1
            sequence.first = sequence.first or moment
            sequence.last = moment
            found = sequence.stream.feed(event)
            if found.stopped:
                self._cancel(sequence)
            return self._update(sequence, found, "stop" if found.stopped else None)
        if isinstance(event, Restarted):
            return self._restart(sequence)
        assert isinstance(event, Finished), "the server scores nothing"
        return self._finished(sequence, event)

    def _finished(self, sequence: _Sequence, event: Finished) -> Update | None:
        sequence.closed = True
        sequence.cached_tokens = event.cached_tokens
        if sequence.finish is not None:
            return None
        if event.reason == "stop" or event.reason == "length":
            found = sequence.stream.flush()
            return self._update(sequence, found, "stop" if found.stopped else event.reason)
        self._host.metrics.sequence(event.reason)
        sequence.finish = "stop"
        if event.reason == "deadline":
            headers = {"x-should-retry": "false"}
            message = f"the request's deadline of {sequence.request.deadline_s} s has passed"
            raise ApiError(504, message, code="deadline_exceeded", headers=headers)
        if event.reason == "cancelled":
            raise draining()
        raise ApiError(500, f"the engine failed: {event.detail}", code="engine_error")

    def _restart(self, sequence: _Sequence) -> Update | None:
        if sequence.finish is not None:
            return None
        sequence.stream = sequence.stream.renewed()
        sequence.new_tokens = 0
        return Update(sequence.index, restarted=True)

    def _update(self, sequence: _Sequence, found: Increment, finish: Finish | None) -> Update:
        if finish is not None:
            sequence.finish = finish
            self._host.metrics.sequence(finish)
            self._host.metrics.timing(
                sequence.started, sequence.first, sequence.last, sequence.new_tokens
            )
        return Update(sequence.index, found.text, found.tokens, finish)
