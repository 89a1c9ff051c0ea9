"""Steps that are on their way, and their tokens, read in the order in which they were sent.

>>> results.send(programs.decode(params, tables, active), batch)
>>> waited_s = results.read_oldest()
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from tpu_stack.serving.engine.sequence import Sequence
from tpu_stack.serving.engine.shapes import Shapes
from tpu_stack.serving.engine.state import StepOutput
from tpu_stack.serving.requests import FinishReason, Token

Rows = list[tuple[int, Sequence]]
"""Rows of a step's output, and whose they are."""


class Results:
    """Hands out tokens, and ends the sequences that they complete.

    Args:
      counters: `Stats` counters, which are kept up. finish: ends a sequence. heard: told of every
        token's sequence once it has it.
    """

    def __init__(
        self,
        shapes: Shapes,
        counters: Counter[str],
        finish: Callable[[Sequence, FinishReason], None],
        heard: Callable[[Sequence], None],
    ):
        self._shapes, self._counters = shapes, counters
        self._finish, self._heard = finish, heard
        self._sent: deque[tuple[StepOutput, Rows]] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, output: StepOutput, rows: Rows) -> None:
        """Notes a step whose output is still to come."""
        self._sent.append((output, rows))

    def read_oldest(self) -> float:
        """Hands out one step's tokens; the seconds waited for them."""
        output, batch = self._sent.popleft()
        started = time.perf_counter()
        tokens, counts = np.asarray(output.tokens), np.asarray(output.counts)
        guessed = np.asarray(output.guessed)
        waited = time.perf_counter() - started
        details = None
        if any(s.request.sampling.logprobs is not None for _, s in batch):
            arrays = (output.logprobs, output.top_ids, output.top_logprobs)
            details = tuple(map(np.asarray, arrays))
        for row, sequence in batch:
            sequence.pending -= tokens.shape[1]
            self._counters["drafted"] += int(guessed[row])
            self._counters["accepted"] += max(0, int(counts[row]) - 1)
            for t in range(int(counts[row])):
                if sequence.done:
                    break
                self._hand_out(sequence, int(tokens[row, t]), details, row, t)
        return waited

    def _hand_out(self, sequence: Sequence, token: int, details: Any, row: int, t: int) -> None:
        if token in sequence.request.stop_tokens:
            return self._finish(sequence, "stop")
        sequence.tokens.append(token)
        self._counters["new_tokens"] += 1
        self._heard(sequence)
        sequence.listener(_event(token, sequence.request.sampling.logprobs, details, row, t))
        if len(sequence.tokens) >= self._shapes.limit_of(sequence.request):
            self._finish(sequence, "length")
        return None


def _event(token: int, wanted: int | None, details: Any, row: int, t: int) -> Token:
    """With log-probabilities of the `wanted` likeliest tokens, where that is no None."""
    if wanted is None or details is None:
        return Token(token)
    logprobs, ids, tops = (array[row, t] for array in details)
    top = tuple((int(i), float(p)) for i, p in zip(ids[:wanted], tops[:wanted], strict=True))
    return Token(token, float(logprobs), top)
