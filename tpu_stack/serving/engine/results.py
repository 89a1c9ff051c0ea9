"""Steps that the device still runs, and their tokens, read in the order of dispatch.

Example:
    results.push(programs.decode(params, tables, active), batch)
    waited_s = results.pop()
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tpu_stack.serving.engine.sequence import Sequence
from tpu_stack.serving.engine.shapes import Shapes
from tpu_stack.serving.engine.state import StepOutput
from tpu_stack.serving.requests import FinishReason, Scored, Token

Rows = list[tuple[int, Sequence]]
"""Rows of a step's output, and whose they are."""


class Results:
    """Hands out tokens, and ends the sequences that they complete.

    Args:
      counters: `Stats` counters, which are updated. finish: ends a sequence. on_token: called with
        a sequence for every token of it.
    """

    def __init__(
        self,
        shapes: Shapes,
        counters: Counter[str],
        finish: Callable[[Sequence, FinishReason], None],
        on_token: Callable[[Sequence], None],
    ):
        self._shapes, self._counters = shapes, counters
        self._finish, self._on_token = finish, on_token
        self._sent: deque[tuple[StepOutput, Rows] | Sequence] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    def push(self, output: StepOutput, rows: Rows) -> None:
        """Notes a step whose output is still to come."""
        self._sent.append((output, rows))

    def push_scores(self, sequence: Sequence) -> None:
        """Notes a prompt whose chunks have been scored."""
        self._sent.append(sequence)

    def pop(self) -> float:
        """Hands out one step's tokens; the seconds waited for them."""
        oldest = self._sent.popleft()
        started = time.perf_counter()
        if isinstance(oldest, Sequence):
            self._hand_out_scores(oldest)
            return time.perf_counter() - started
        output, batch = oldest
        tokens, counts = np.asarray(output.tokens), np.asarray(output.counts)
        guessed = np.asarray(output.guessed)
        waited = time.perf_counter() - started
        details = None
        if any(s.request.sampling.logprobs is not None for _, s in batch):
            details = _Details.of(output, any(s.request.sampling.logprobs for _, s in batch))
        for row, sequence in batch:
            sequence.pending -= tokens.shape[1]
            self._counters["drafted"] += int(guessed[row])
            self._counters["accepted"] += max(0, int(counts[row]) - 1)
            for t in range(int(counts[row])):
                if sequence.done:
                    break
                self._hand_out(sequence, int(tokens[row, t]), details, row, t)
        return waited

    def _hand_out(
        self, sequence: Sequence, token: int, details: "_Details | None", row: int, t: int
    ) -> None:
        request = sequence.request
        stops = token in request.stop_tokens
        if stops and not request.include_stop:
            return self._finish(sequence, "stop")
        sequence.tokens.append(token)
        self._counters["new_tokens"] += 1
        self._on_token(sequence)
        wanted, generation = sequence.request.sampling.logprobs, self._counters["generation"]
        if wanted is None or details is None:
            sequence.listener(Token(token, generation=generation))
        else:
            sequence.listener(details.token(token, wanted, row, t, generation))
        if stops:
            self._finish(sequence, "stop")
        elif len(sequence.tokens) >= self._shapes.limit_of(request):
            self._finish(sequence, "length")
        return None

    def _hand_out_scores(self, sequence: Sequence) -> None:
        request, pieces = sequence.request, sequence.scores
        if sequence.done or request.score_from is None:
            return
        found = np.concatenate([np.asarray(array)[row, :size] for array, row, size in pieces])
        first = sequence.cached + 1  # the prompt token that the first score is of
        scores = found[request.score_from - first : len(request.prompt) - first]
        sequence.listener(Scored(scores, self._counters["generation"]))
        if not request.max_tokens:
            self._finish(sequence, "length")


@dataclass(frozen=True)
class _Details:
    """Log-probabilities of a step on the host, [B, T] and [B, T, n]."""

    logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None

    @classmethod
    def of(cls, output: StepOutput, top: bool) -> "_Details":
        names = ("logprobs", "sampling_logprobs", *(("top_ids", "top_logprobs") if top else ()))
        return cls(*(np.asarray(getattr(output, name)) for name in names))

    def token(self, token: int, wanted: int, row: int, t: int, generation: int) -> Token:
        """With the log-probabilities of the `wanted` likeliest tokens."""
        top: tuple[tuple[int, float], ...] = ()
        if wanted and self.top_ids is not None and self.top_logprobs is not None:
            ids, values = self.top_ids[row, t, :wanted], self.top_logprobs[row, t, :wanted]
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        own, sampling = float(self.logprobs[row, t]), float(self.sampling_logprobs[row, t])
        return Token(token, own, top, sampling, generation)
