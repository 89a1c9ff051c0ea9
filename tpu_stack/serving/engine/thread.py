"""The thread that runs an engine, and its thread-safe interface.

Example:
    service = EngineThread(Engine(programs, params), queue_limit=256, facts={})
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import jax

from tpu_stack.errors import UserError
from tpu_stack.serving.engine.engine import Engine
from tpu_stack.serving.engine.sequence import Sequence
from tpu_stack.serving.requests import Finished, GenerationRequest, QueueFull
from tpu_stack.serving.service import InFlight, Listener, Stats, Ticket


class EngineThread:
    """`Service`: a thread that steps an engine while it has work."""

    def __init__(self, engine: Engine, queue_limit: int, facts: dict[str, Any]):
        self._engine, self._limit, self._facts = engine, queue_limit, facts
        self._numbers = itertools.count(1)
        self._commands: deque[Callable[[], None]] = deque()
        self._sequences: dict[int, Sequence] = {}
        self._wake = threading.Condition()
        self._closing = self._stopped = False
        self._idle = True
        self._arriving = 0
        self._stats = engine.stats()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def max_length(self) -> int:
        """Prompt and output tokens of one request, at most."""
        return self._engine.shapes.length

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size)."""
        return self._engine.programs.config.vocab_size

    def submit(self, request: GenerationRequest, listener: Listener) -> Ticket:
        """Queues a request. Raises QueueFull, or UserError for a request it cannot serve."""
        request.check(self.vocab_size, self.max_length)
        ticket = Ticket(next(self._numbers), request)

        def begin() -> None:
            with self._wake:
                self._arriving -= 1
            self._sequences[ticket.number] = self._engine.submit(ticket, listener)

        with self._wake:
            if self._closing:
                raise UserError("the engine is shutting down and takes no more requests")
            waiting = self._stats.waiting + self._arriving
            if waiting >= self._limit:
                raise QueueFull(waiting, self._retry_after())
            self._arriving += 1
            self._idle = False
            self._commands.append(begin)
            self._wake.notify()
        return ticket

    def _retry_after(self) -> float:
        """Seconds in which about one slot's worth of work gets done."""
        stats = self._stats
        done = max(1, sum(stats.finished.values()))
        return max(1.0, round(stats.step_s / done, 1))

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request with reason "cancelled"; nothing happens when it has finished."""

        def end() -> None:
            sequence = self._sequences.get(ticket.number)
            if sequence is not None:
                self._engine.cancel(sequence)

        self._command(end)

    def load(self, params: Any, in_flight: InFlight = "finish") -> Future[int]:
        """Replaces the weights between two steps; does not wait for it.

        While others finish on the old ones, new requests wait. Raises UserError where shapes or
        dtypes differ, for the programs are compiled for one model, and when the engine is closing.

        Returns: a future of their generation, done when they are live. It raises UserError where
          later weights overtook these or the engine closed.
        """
        params = self._engine.programs.prepared(params)
        check_same_shapes(self._engine.params, params)
        live: Future[int] = Future()
        live.set_running_or_notify_cancel()  # cannot be cancelled
        with self._wake:
            if self._closing:
                raise UserError("the engine is shutting down and takes no weights")
            self._commands.append(lambda: self._engine.load(params, in_flight, live))
            self._wake.notify()
        return live

    def between_steps[T](self, call: Callable[[Engine], T]) -> Future[T]:
        """Calls on the engine's thread, between two steps: to measure, not to change the engine.

        Raises UserError when the engine is closing or has failed.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call(self._engine))
            except Exception as error:
                future.set_exception(error)

        with self._wake:
            if self._closing:
                raise UserError("the engine is shutting down and takes no calls")
            self._commands.append(run)
            self._wake.notify()
        return future

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def stats(self) -> Stats:
        """How things stand; cheap, from any thread."""
        return replace(self._stats, waiting=self._stats.waiting + self._arriving)

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts that do not change."""
        return dict(self._facts)

    def close(self, drain_s: float | None = None) -> None:
        """Takes no more requests, waits up to `drain_s` for those it has, cancels the rest."""
        with self._wake:
            self._closing = True
        deadline = time.monotonic() + (drain_s or 0.0)
        while time.monotonic() < deadline and not self._idle:
            time.sleep(0.01)

        def stop() -> None:
            for sequence in [*self._engine.queue, *self._engine.running]:
                self._engine.cancel(sequence)
            self._engine.drop_load("the engine was closed")
            self._stopped = True

        self._command(stop)
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._run_commands()
                worked = self._engine.step()
            except Exception as error:
                logging.getLogger(__name__).exception("the engine's step failed")
                self._fail(error)
                return
            self._stats = self._engine.stats()
            if len(self._sequences) > 4 * self._limit:
                self._forget_finished()
            with self._wake:
                if not worked and not self._commands and not self._stopped:
                    self._idle = not self._stats.waiting
                    self._wake.wait(timeout=0.05 if self._stats.waiting else None)

    def _run_commands(self) -> None:
        while self._commands:  # one by one: those behind one that raises are not lost
            self._commands.popleft()()

    def _forget_finished(self) -> None:
        self._sequences = {n: s for n, s in self._sequences.items() if not s.done}

    def _fail(self, error: Exception) -> None:
        """The device's state is unknown after an error: every request ends, the engine stops."""
        with self._wake:
            self._closing = self._stopped = self._idle = True
        while self._commands:  # requests that came meanwhile fail too
            try:
                self._run_commands()
            except Exception:  # or those who listen would never hear of the first
                logging.getLogger(__name__).exception("a command of a failed engine failed too")
        self._engine.drop_load(f"the engine failed: {error}")
        for sequence in self._sequences.values():
            if not sequence.done:
                sequence.done = True
                prompt, new = len(sequence.request.prompt), sequence.new_tokens
                sequence.listener(Finished("error", prompt, new, sequence.cached, str(error)))


def check_same_shapes(old: Any, new: Any) -> None:
    """Raises UserError naming a weight of `new` that is not of `old`'s shape and dtype."""

    def described(params: Any) -> dict[str, str]:
        leaves = jax.tree.leaves_with_path(params)
        return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}

    have, want = described(new), described(old)
    for name in (*want, *have):
        if have.get(name) != want.get(name):
            raise UserError(
                f"the new weights do not fit the running model: {name} is"
                f" {have.get(name, 'missing')} where it has {want.get(name, 'nothing')}"
            )
