"""The interface between an engine and its clients: submit, cancel, load weights, read statistics.

The HTTP server, the benchmark and the client in process use this protocol, never an engine's parts.

    ticket = service.submit(GenerationRequest(prompt), listener)
    service.cancel(ticket)
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tpu_stack.serving.requests import Event, GenerationRequest

Listener = Callable[[Event], None]
"""Called on the engine's thread, in order; it must be quick and must not raise."""
InFlight = Literal["finish", "restart"]
"""What becomes of requests in flight when the weights are replaced: they finish on those they began
with, or start anew on the new ones."""


@dataclass(frozen=True)
class Ticket:
    """A submitted request."""

    number: int
    request: GenerationRequest


@dataclass(frozen=True)
class Stats:
    """A snapshot of an engine. Counters only grow; gauges say how things stand.

    Attributes:
      waiting, running: requests in the queue (preempted ones too) and in slots.
      slots: requests that decode at once.
      pages, pages_free, pages_cached: of the key/value cache; cached ones hold prefixes that
        no sequence uses now, and are evicted when pages run out.
      prompt_tokens, cached_prompt_tokens, new_tokens: counters. Prompt tokens computed are the
        first less the second.
      submitted, preempted: counters. finished: counter per reason.
      decode_steps, prefill_steps: programs run. decode_rows: the rows of all decode steps that
        held a request.
      drafted, accepted: tokens proposed by speculation, and those kept.
      programs: compiled programs. recompilations: those compiled after warm-up.
      step_s, host_s: seconds in steps, and those of them in which the engine's thread did not wait
        for the device. Most of those it works while a step runs: `serve bench --host-overhead`
        measures what it costs.
      generation: how often weights were replaced.
    """

    waiting: int = 0
    running: int = 0
    slots: int = 0
    pages: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    new_tokens: int = 0
    submitted: int = 0
    preempted: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    decode_steps: int = 0
    decode_rows: int = 0
    prefill_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    programs: int = 0
    recompilations: int = 0
    step_s: float = 0.0
    host_s: float = 0.0
    generation: int = 0


class Service(Protocol):
    """An engine behind its thread."""

    @property
    def max_length(self) -> int:
        """Prompt and output tokens of one request, at most."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size)."""
        ...

    def submit(self, request: GenerationRequest, listener: Listener) -> Ticket:
        """Queues a request. Raises QueueFull, or UserError for a request it cannot serve."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request with reason "cancelled"; nothing happens when it has finished."""
        ...

    def load(self, params: Any, in_flight: InFlight = "finish") -> Future[int]:
        """Replaces the weights between two steps; does not wait for it. While others finish on the
        old ones, new requests wait. Returns a future of their generation, done when they are live;
        it raises UserError where they never will be. Raises UserError where shapes or dtypes
        differ, or the engine is closing."""
        ...

    def stats(self) -> Stats:
        """How things stand; cheap, from any thread."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts that do not change: profile, mesh, format, page size and so on."""
        ...

    def close(self, drain_s: float | None = None) -> None:
        """Takes no more requests, waits up to `drain_s` for those it has, cancels the rest."""
        ...
