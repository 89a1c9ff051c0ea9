"""Sends requests to a service and times the answers.

Example:
    outcome = closed_loop(service, requests, streams=8)
    outcome = open_loop(service, requests, arrival_times(count=100, rate=4.0, seed=0))
    outcome.report()["ttft_ms"]["p95"]
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tpu_stack.serving.requests import Event, Finished, GenerationRequest, QueueFull, Token
from tpu_stack.serving.service import Service, Stats

PERCENTILES = (50, 95, 99)


@dataclass
class Timing:
    """One request, by the clock of `time.perf_counter`. TTFT counts from `asked`, which is when it
    arrived, however long it then had to wait."""

    request: GenerationRequest
    asked: float = 0.0
    tokens: list[float] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.asked

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first; of two tokens or more."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1)


@dataclass(frozen=True)
class Outcome:
    """All timings of a run, its seconds, and the engine's figures before and after."""

    timings: list[Timing]
    seconds: float
    refused: int
    before: Stats
    after: Stats

    def report(self) -> dict[str, Any]:
        """Throughput and latency, JSON-ready; times in milliseconds, rates per second."""
        done = [t for t in self.timings if t.finished is not None and t.finished.reason == "length"]
        new = sum(len(timing.tokens) for timing in done)
        prompt = sum(len(timing.request.prompt) for timing in done)
        steps = self.after.decode_steps - self.before.decode_steps
        rows = self.after.decode_rows - self.before.decode_rows
        return {
            "requests": len(self.timings),
            "completed": len(done),
            "refused": self.refused,
            "seconds": self.seconds,
            "requests_per_s": len(done) / self.seconds,
            "new_tokens_per_s": new / self.seconds,
            "tokens_per_s": (new + prompt) / self.seconds,
            "ttft_ms": percentiles([timing.ttft for timing in done]),
            "tpot_ms": percentiles([t.tpot for t in done if len(t.tokens) > 1]),
            "latency_ms": percentiles([t.tokens[-1] - t.asked for t in done]),
            "decode_steps": steps,
            "rows_per_decode_step": rows / steps if steps else 0.0,
            "accepted": self.after.accepted - self.before.accepted,
            "drafted": self.after.drafted - self.before.drafted,
            "preempted": self.after.preempted - self.before.preempted,
            "recompilations": self.after.recompilations,
        }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds, by linear interpolation; nothing of nothing."""
    if not seconds:
        return {}
    cuts = np.percentile(np.asarray(seconds), PERCENTILES)
    return {f"p{p}": float(1e3 * cut) for p, cut in zip(PERCENTILES, cuts, strict=True)}


class _Run:
    """The requests of one run, sent from the calling thread, answered on the engine's."""

    def __init__(self, service: Service):
        self.service, self.before = service, service.stats()
        self.timings: list[Timing] = []
        self.refused = 0
        self._open = 0
        self._change = threading.Condition()

    def send(self, request: GenerationRequest, asked: float) -> None:
        timing = Timing(request, asked)
        self.timings.append(timing)

        def listener(event: Event) -> None:
            now = time.perf_counter()
            if isinstance(event, Token):
                timing.tokens.append(now)
            elif isinstance(event, Finished):
                timing.finished = event
                with self._change:
                    self._open -= 1
                    self._change.notify()

        with self._change:
            self._open += 1
        try:
            self.service.submit(request, listener)
        except QueueFull:
            self.refused += 1
            with self._change:
                self._open -= 1

    def wait(self, until_open: int) -> None:
        """Until at most so many requests are open."""
        with self._change:
            self._change.wait_for(lambda: self._open <= until_open)

    def outcome(self, started: float) -> Outcome:
        self.wait(0)
        ends = [timing.tokens[-1] for timing in self.timings if timing.tokens]
        seconds = max(ends, default=time.perf_counter()) - started
        return Outcome(self.timings, seconds, self.refused, self.before, self._settled())

    def _settled(self) -> Stats:
        """The figures after the engine's last round, which ends just after its last answer."""
        for _ in range(100):
            stats = self.service.stats()
            if not stats.running and not stats.waiting:
                break
            time.sleep(0.01)
        return stats


def closed_loop(service: Service, requests: Sequence[GenerationRequest], streams: int) -> Outcome:
    """Keeps `streams` requests open: each answer lets the next one in."""
    run, started = _Run(service), time.perf_counter()
    for request in requests:
        run.wait(streams - 1)
        run.send(request, time.perf_counter())
    return run.outcome(started)


def open_loop(
    service: Service, requests: Sequence[GenerationRequest], arrivals: Sequence[float]
) -> Outcome:
    """Sends request i `arrivals[i]` seconds after the start, whatever became of the others."""
    run, started = _Run(service), time.perf_counter()
    for request, at in zip(requests, arrivals, strict=True):
        time.sleep(max(0.0, started + at - time.perf_counter()))
        run.send(request, started + at)
    return run.outcome(started)
