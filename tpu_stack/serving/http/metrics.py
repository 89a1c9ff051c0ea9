"""What a server has done and how fast, for Prometheus at `/metrics` and for the page at `/stats`.

Latencies are measured in the server, from a request's submission; counts and gauges are the
engine's own snapshot, read at each scrape. Every server has a registry of its own.

    Metrics(service).exposition()[:6]  # b'# HELP'
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tpu_stack.serving.service import Service, Stats

RECENT_S = 60.0
"""The window of the percentiles in `/stats`."""
_RECENT = 4096
_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
_E2E_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_GAUGES = {
    "waiting": ("queue_requests", "Requests that wait for a slot, preempted ones too."),
    "running": ("running_requests", "Requests in slots."),
    "slots": ("slots", "Requests that can decode at once."),
    "programs": ("compiled_programs", "Compiled programs."),
}
_COUNTERS = {
    "submitted": ("requests_submitted", "Sequences the engine took."),
    "preempted": ("preemptions", "Sequences put back into the queue to free pages."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens, cached ones too."),
    "cached_prompt_tokens": ("cached_prompt_tokens", "Prompt tokens found in the prefix cache."),
    "new_tokens": ("generated_tokens", "Tokens generated."),
    "decode_steps": ("decode_steps", "Decode steps run."),
    "prefill_steps": ("prefill_steps", "Prefill steps run."),
    "drafted": ("drafted_tokens", "Tokens proposed by speculation."),
    "accepted": ("accepted_tokens", "Proposed tokens that were kept."),
    "recompilations": ("recompilations", "Programs compiled after warm-up; zero when all is well."),
    "generation": ("weight_replacements", "Times the weights were replaced."),
    "step_s": ("decode_step_seconds", "Seconds in steps."),
    "host_s": ("decode_host_seconds", "Seconds of steps in which the host was not waiting."),
}


class _EngineCollector(Collector):
    """Reads the engine's snapshot at each scrape."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        stats = self._service.stats()
        for field, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"tpu_stack_{name}", text, getattr(stats, field))
        for field, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"tpu_stack_{name}", text, getattr(stats, field))
        occupancy = stats.running / stats.slots if stats.slots else 0.0
        yield GaugeMetricFamily(
            "tpu_stack_batch_occupancy_ratio", "Share of the slots that run, 0 to 1.", occupancy
        )
        pages = GaugeMetricFamily(
            "tpu_stack_cache_pages",
            "Pages of the key/value cache by state; cached ones hold prefixes that nothing uses.",
            labels=["state"],
        )
        for state, count in pages_by_state(stats).items():
            pages.add_metric([state], count)
        yield pages
        ended = CounterMetricFamily(
            "tpu_stack_engine_sequences",
            "Sequences the engine ended, by its reason.",
            labels=["reason"],
        )
        for reason, count in stats.finished.items():
            ended.add_metric([reason], count)
        yield ended


def pages_by_state(stats: Stats) -> dict[str, int]:
    """Pages in use, free, and cached for their prefixes; they add up to all pages.

    Free ones are those that hold nothing: an engine may count cached pages as free or apart.
    """
    used = stats.pages - stats.pages_free - stats.pages_cached
    return {"used": max(used, 0), "cached": stats.pages_cached, "free": stats.pages_free}


class Metrics:
    """The counters of one server."""

    def __init__(self, service: Service):
        self._service = service
        self._began = time.monotonic()
        self._recent: dict[str, deque[tuple[float, float]]] = {
            "ttft_s": deque(maxlen=_RECENT),
            "tpot_s": deque(maxlen=_RECENT),
        }
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_EngineCollector(service))
        self._responses = Counter(
            "tpu_stack_http_responses",
            "HTTP responses by route and status; 499 is a client that left first.",
            ["route", "status"],
            registry=self.registry,
        )
        self._sequences = Counter(
            "tpu_stack_sequences",
            "Sequences by how they ended for the client; a stop string is a stop here.",
            ["reason"],
            registry=self.registry,
        )
        self._ttft = self._histogram("time_to_first_token", "From submission to token one", _TTFT_S)
        self._tpot = self._histogram(
            "time_per_output_token", "Mean of a sequence, token one left out", _TPOT_S
        )
        self._e2e = self._histogram(
            "sequence_duration", "From submission to the last token", _E2E_S
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"tpu_stack_{name}_seconds", f"{text}, in seconds.", buckets=buckets,
            registry=self.registry,
        )  # fmt: skip

    def response(self, route: str, status: int) -> None:
        """Counts an HTTP response."""
        self._responses.labels(route, str(status)).inc()

    def sequence(self, reason: str) -> None:
        """Counts a sequence's end."""
        self._sequences.labels(reason).inc()

    def timing(self, started: float, first: float | None, last: float, tokens: int) -> None:
        """Notes a finished sequence's latencies, all in seconds of `time.perf_counter`."""
        if first is None:
            return
        now = time.monotonic()
        self._ttft.observe(first - started)
        self._recent["ttft_s"].append((now, first - started))
        self._e2e.observe(last - started)
        if tokens > 1:
            per_token = (last - first) / (tokens - 1)
            self._tpot.observe(per_token)
            self._recent["tpot_s"].append((now, per_token))

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def snapshot(self) -> dict[str, Any]:
        """The engine's snapshot and recent latencies, JSON-ready."""
        stats = self._service.stats()
        now = time.monotonic()
        recent = {}
        for name, values in self._recent.items():
            late = sorted(value for at, value in values if now - at <= RECENT_S)
            recent[name] = {
                f"p{percent}": late[min(len(late) - 1, len(late) * percent // 100)]
                for percent in (50, 95, 99)
            } if late else None  # fmt: skip
        pages = pages_by_state(stats)
        return {"time_s": now - self._began, **asdict(stats), "cache_pages": pages, **recent}
