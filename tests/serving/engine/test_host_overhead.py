"""The engine's steps beside its program's: measuring changes nobody's tokens, and counts right."""

import pytest
from engine_model import REQUESTS, alone, ask, engine, finish, tokens_of

from tpu_stack.serving.bench import host_overhead
from tpu_stack.serving.bench.host_overhead import PROBE, WINDOW, program_alone
from tpu_stack.serving.engine.thread import EngineThread


def test_the_program_alone_changes_no_token():
    """Between any two steps, amid prompts, decoding rows and rows at their end."""
    target = engine()
    asked = [ask(target, request)[1] for request in REQUESTS]
    steps = 0
    while target.step():
        steps += 1
        if steps % 5 == 0:
            assert program_alone(target) > 0
    finish(target)
    for number, events in enumerate(asked):
        assert tuple(tokens_of(events)) == alone(number), number


def test_without_pages_for_its_steps_nothing_is_measured(monkeypatch):
    target = engine()
    _, events = ask(target, REQUESTS[0])
    target.step()
    with monkeypatch.context() as patch:
        patch.setattr(target.blocks, "grow", lambda *_: False)
        with pytest.raises(RuntimeError, match=f"no pages for {PROBE} more"):
            program_alone(target)
    finish(target)
    assert tuple(tokens_of(events)) == alone(0)


@pytest.mark.parametrize("slower", [0.0, 0.05])
def test_the_share_is_what_a_step_takes_longer_than_its_program(monkeypatch, slower):
    """By a clock that only programs and a slow host move: a step takes 0.15 s, the host more."""
    now = [0.0]
    monkeypatch.setattr(host_overhead.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(host_overhead, "program_alone", lambda _: 0.15)
    target = engine()
    step = target.step

    def stepped() -> bool:
        now[0] += 0.15 + slower
        return step()

    monkeypatch.setattr(target, "step", stepped)
    service = EngineThread(target, 64, {})
    try:
        found = host_overhead.host_overhead(service, rounds=1)
    finally:
        service.close(0.0)
    assert found.windows == (240 // WINDOW) - 1
    assert found.rows == 8
    assert found.step_ms == pytest.approx(1e3 * (0.15 + slower))
    assert found.program_ms == pytest.approx(150)
    assert found.share == pytest.approx(slower / (0.15 + slower))
