"""What the host adds to a decode step: the engine's steps beside its program's, by turns.

The engine sends off a step while the one before runs, so seconds that the host spends are mostly
not seconds that the device waits. What counts is how much longer a step of the engine takes than
the same program dispatched with nothing to do in between.

    host_overhead(service, rounds=3).share  # 0.021
"""

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from tpu_stack.errors import UserError
from tpu_stack.serving.engine.engine import Engine
from tpu_stack.serving.engine.thread import EngineThread
from tpu_stack.serving.requests import Event, Finished, GenerationRequest, Token
from tpu_stack.serving.service import Service

PROMPT, MOST = 16, 240
"""Tokens of a prompt, and new ones of a request at most."""
WINDOW, SETTLE, PROBE = 24, 4, 8
"""The engine's steps between two probes, and the first of them that do not count, since the engine
starts from an idle device; the program's steps in a probe."""


@dataclass(frozen=True)
class HostOverhead:
    """Medians over windows of the engine's steps, each between two probes of the program.

    Attributes:
      share: 1 - program_ms / step_ms, window by window. low, high: its quartiles.
      step_ms, program_ms: a decode step of the engine, and of the program alone.
      rows: requests in a step.
    """

    share: float
    low: float
    high: float
    step_ms: float
    program_ms: float
    rows: int
    windows: int


@dataclass
class _Round:
    """One request's tokens: every WINDOW of them the engine is asked for a probe."""

    service: EngineThread
    times: list[float] = field(default_factory=list)
    probes: list[Future[float]] = field(default_factory=list)

    def on_token(self) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) % WINDOW == 0:
            self.probes.append(self.service.between_steps(program_alone))

    def windows(self) -> list[tuple[float, float]]:
        """Seconds of the engine's step, and of the program's just before and after it."""
        probes = [probe.result() for probe in self.probes]
        pairs = []
        for i in range(1, len(probes)):
            first, last = i * WINDOW + SETTLE - 1, (i + 1) * WINDOW - 1
            step = (self.times[last] - self.times[first]) / (last - first)
            pairs.append((step, (probes[i - 1] + probes[i]) / 2))
        return pairs


def program_alone(engine: Engine) -> float:
    """Seconds per decode step of the program by itself, for those that decode now.

    No request's tokens change. Raises RuntimeError where pages for PROBE more of each are missing.
    """
    engine.drain()
    active = np.zeros(engine.shapes.slots, bool)
    for sequence in engine.running:
        if not engine.blocks.grow(sequence, len(sequence.tokens) + PROBE + 1):
            raise RuntimeError(f"no pages for {PROBE} more tokens of each sequence")
        active[sequence.slot] = sequence.decoding
    tables = engine.blocks.tables.copy()
    return engine.programs.seconds_per_step(engine.params, tables, active, PROBE)


def check_host_overhead(service: Service) -> EngineThread:
    """Raises UserError for replicas, which have a device step each, for an engine that speculates,
    whose steps bring more tokens than one, and for a window that holds too few steps."""
    if not isinstance(service, EngineThread):
        raise UserError("--host-overhead is of one engine; a mesh with data > 1 has several")
    if service.describe().get("guesses"):
        raise UserError("--host-overhead is of steps that bring one token each; drop the guesses")
    if service.max_length < PROMPT + 3 * WINDOW:
        raise UserError(
            f"--host-overhead decodes {3 * WINDOW} tokens or more after {PROMPT}; the window is"
            f" {service.max_length}: set --max-length to {PROMPT + 3 * WINDOW} or more"
        )
    return service


def host_overhead(service: Service, rounds: int = 3) -> HostOverhead:
    """Fills every slot of an idle engine, and measures while all of them decode.

    Raises UserError as `check_host_overhead` does.
    """
    engine = check_host_overhead(service)
    rows, new = engine.stats().slots, min(MOST, engine.max_length - PROMPT)
    pairs = np.array([pair for i in range(rounds) for pair in _round(engine, rows, new, i)])
    low, share, high = np.percentile(1 - pairs[:, 1] / pairs[:, 0], (25, 50, 75))
    step_s, program_s = np.median(pairs, axis=0)
    return HostOverhead(
        share=float(share),
        low=float(low),
        high=float(high),
        step_ms=float(1e3 * step_s),
        program_ms=float(1e3 * program_s),
        rows=rows,
        windows=len(pairs),
    )


def _round(service: EngineThread, rows: int, new: int, seed: int) -> list[tuple[float, float]]:
    round_, left, over = _Round(service), threading.Semaphore(0), []
    contents = np.random.default_rng([seed, 3])

    def listen(index: int, event: Event) -> None:
        if isinstance(event, Token) and index == rows - 1:  # the last to come: all rows are full
            round_.on_token()
        elif isinstance(event, Finished):
            over.append(event.reason)
            left.release()

    for index in range(rows):
        prompt = contents.integers(0, service.vocab_size, PROMPT).tolist()
        request = GenerationRequest(tuple(prompt), new)
        service.submit(request, lambda event, index=index: listen(index, event))
    for _ in range(rows):
        left.acquire()
    assert set(over) == {"length"}, f"requests ended with {sorted(set(over))}"
    return round_.windows()
