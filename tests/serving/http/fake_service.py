"""A service without a model, so that the server's tests take milliseconds.

Its "model" says the prompt over and over, from token number `seed` on when it samples and from the
first when it is greedy. It runs on a thread of its own, as an engine does, keeps slots and a queue,
and obeys cancellation, deadlines and stop tokens.
"""

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.serving.requests import (
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    QueueFull,
    Restarted,
    Token,
)
from tpu_stack.serving.service import InFlight, Listener, Stats, Ticket

PAGE = 16


@dataclass
class _Job:
    ticket: Ticket
    listener: Listener
    submitted: float
    said: int = 0
    cancelled: bool = False


@dataclass
class FakeService:
    """`gate` cleared stops the model between two tokens; `script` replaces what it says."""

    vocab_size: int = 512
    max_length: int = 256
    slots: int = 8
    queue: int = 16
    step_s: float = 0.0
    script: tuple[int, ...] | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    restart_after: int | None = None
    fail_with: str = ""
    requests: list[GenerationRequest] = field(default_factory=list)
    closed_with: list[float | None] = field(default_factory=list)
    loaded: list[tuple[Any, InFlight]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()
        self._lock = threading.Condition()
        self._jobs: list[_Job] = []
        self._numbers = count()
        self._ended: dict[str, int] = {}
        self._new = self._prompt = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fake engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, listener: Listener) -> Ticket:
        request.check(self.vocab_size, self.max_length)
        with self._lock:
            if self._closing:
                raise UserError("the engine is closed")
            if len(self._jobs) >= self.slots + self.queue:
                raise QueueFull(len(self._jobs) - self.slots, 1.5)
            ticket = Ticket(next(self._numbers), request)
            self._jobs.append(_Job(ticket, listener, time.monotonic()))
            self.requests.append(request)
            self._prompt += len(request.prompt)
            self._lock.notify()
        return ticket

    def load(self, params: Any, in_flight: InFlight = "finish") -> Future[int]:
        self.loaded.append((params, in_flight))
        live: Future[int] = Future()
        live.set_result(len(self.loaded))
        return live

    def cancel(self, ticket: Ticket) -> None:
        with self._lock:
            for job in self._jobs:
                job.cancelled = job.cancelled or job.ticket.number == ticket.number
            self._lock.notify()

    def stats(self) -> Stats:
        with self._lock:
            running = min(self.slots, len(self._jobs))
            return Stats(
                waiting=len(self._jobs) - running,
                running=running,
                slots=self.slots,
                pages=100,
                pages_free=90 - running,
                pages_cached=10,
                prompt_tokens=self._prompt,
                new_tokens=self._new,
                submitted=len(self.requests),
                finished=dict(self._ended),
            )

    def describe(self) -> dict[str, Any]:
        return {"profile": "8i", "mesh": {"data": 1}, "format": "fake", "page_size": PAGE}

    def close(self, drain_s: float | None = None) -> None:
        with self._lock:
            self.closed_with.append(drain_s)
            self._closing = True
            self._lock.notify()
        self.gate.set()
        self._thread.join(timeout=5)

    @property
    def busy(self) -> int:
        """Requests that have not ended."""
        with self._lock:
            return len(self._jobs)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._jobs or self._closing, timeout=0.05)
                if self._closing:
                    return
                jobs = list(self._jobs[: self.slots])
            held = not self.gate.is_set()
            for job in jobs:
                self._step(job, held)
            time.sleep(0.002 if held else self.step_s)

    def _step(self, job: _Job, held: bool) -> None:
        request = job.ticket.request
        limit = request.deadline_s
        if job.cancelled:
            self._end(job, "cancelled")
        elif limit is not None and time.monotonic() - job.submitted > limit:
            self._end(job, "deadline")
        elif held:
            return
        elif self.fail_with:
            self._end(job, "error", self.fail_with)
        else:
            self._say(job)

    def _say(self, job: _Job) -> None:
        request = job.ticket.request
        sampling = request.sampling
        words = self.script or request.prompt
        shift = sampling.seed if sampling.temperature > 0 else 0
        token = words[(job.said + shift) % len(words)]
        if self.script and job.said >= len(words):
            self._end(job, "stop")
            return
        if token in request.stop_tokens:
            self._end(job, "stop")
            return
        if job.said == self.restart_after:
            self.restart_after = None
            job.said = 0
            job.listener(Restarted())
            return
        top = tuple((candidate, -1.0 - candidate) for candidate in range(sampling.logprobs or 0))
        event: Event = Token(token)
        if sampling.logprobs is not None:
            event = Token(token, -0.5, top)
        job.said += 1
        with self._lock:
            self._new += 1
        job.listener(event)
        full = len(request.prompt) + job.said >= self.max_length
        if job.said >= request.max_tokens or full:
            self._end(job, "length")

    def _end(self, job: _Job, reason: FinishReason, detail: str = "") -> None:
        with self._lock:
            self._jobs.remove(job)
            self._ended[reason] = self._ended.get(reason, 0) + 1
        prompt = len(job.ticket.request.prompt)
        cached = prompt // PAGE * PAGE
        job.listener(Finished(reason, prompt, job.said, cached, detail))
