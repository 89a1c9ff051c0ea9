"""What the clock says of a service whose times are known, and of one that refuses."""

import time

import pytest
from fake_service import FakeService  # pyright: ignore[reportMissingImports]

from tpu_stack.serving.bench.measure import closed_loop, open_loop, percentiles
from tpu_stack.serving.requests import GenerationRequest


def requests(count: int, new: int = 4) -> list[GenerationRequest]:
    return [GenerationRequest((1, 2, 3), new) for _ in range(count)]


class Watched(FakeService):
    """Counts how many requests are open at once."""

    most = 0

    def submit(self, request, listener):
        ticket = super().submit(request, listener)
        stats = self.stats()
        self.most = max(self.most, stats.running + stats.waiting)
        return ticket


def test_a_closed_loop_keeps_so_many_open_and_answers_all():
    service = Watched(step_s=0.002)
    try:
        outcome = closed_loop(service, requests(20), streams=3)
    finally:
        service.close(0.0)
    report = outcome.report()
    assert report["completed"] == report["requests"] == 20
    assert report["refused"] == 0
    assert service.most <= 3
    assert report["new_tokens_per_s"] == pytest.approx(80 / outcome.seconds)
    assert report["tokens_per_s"] == pytest.approx((80 + 60) / outcome.seconds)
    for timing in outcome.timings:
        assert timing.asked <= timing.tokens[0] <= timing.tokens[-1]
        assert timing.tpot >= 0.002  # a step takes that long at least


def test_an_open_loop_counts_from_the_arrival_and_not_from_the_slot():
    service = FakeService(slots=1, step_s=0.01)
    try:
        outcome = open_loop(service, requests(4), [0.0, 0.0, 0.0, 0.05])
    finally:
        service.close(0.0)
    waited = [timing.ttft for timing in outcome.timings[:3]]
    assert waited[1] >= waited[0] + 0.03  # the first has four tokens to say before it
    assert waited[2] >= waited[1] + 0.03
    started = outcome.timings[0].asked
    assert outcome.timings[3].asked == pytest.approx(started + 0.05)


def test_refused_requests_are_counted_and_the_rest_answered():
    service = FakeService(slots=1, queue=2)
    service.gate.clear()
    try:
        import threading

        threading.Timer(0.2, service.gate.set).start()
        outcome = open_loop(service, requests(10), [0.0] * 10)
    finally:
        service.close(0.0)
    report = outcome.report()
    assert report["refused"] >= 6
    assert report["completed"] == 10 - report["refused"]


def test_percentiles_are_those_of_numpy_in_milliseconds():
    cuts = percentiles([i / 1000 for i in range(101)])
    assert cuts == pytest.approx({"p50": 50.0, "p95": 95.0, "p99": 99.0})
    assert percentiles([]) == {}


def test_the_run_ends_with_its_last_token():
    service = FakeService(step_s=0.001)
    try:
        started = time.perf_counter()
        outcome = closed_loop(service, requests(5), streams=5)
        assert 0 < outcome.seconds <= time.perf_counter() - started
    finally:
        service.close(0.0)
