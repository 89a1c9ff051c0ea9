"""Thousands of completions, or of scored sequences, from an engine in the same process, as arrays.

What reinforcement learning, evaluation and distillation ask of an engine: tokens with their
log-probabilities under the distribution that they were drawn from and under the model's own, and
the generation of the weights that computed them. No HTTP, no text.

    group = rollout(service, [GenerationRequest(prompt, 64, sampling)], samples=8)
    group.logprobs.sum(axis=1)
    reference = score(other, [(*prompt, *tokens) for tokens in group.rows()], start=len(prompt))
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
from jaxtyping import Bool, Float, Int

from tpu_stack.errors import UserError
from tpu_stack.serving.feed import Feed
from tpu_stack.serving.requests import (
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Restarted,
    Scored,
    Token,
)
from tpu_stack.serving.service import Service


@dataclass(frozen=True)
class Completions:
    """N completions, padded to the longest, T.

    Attributes:
      tokens: int32; 0 beyond a row's length. A stop token is part of its completion: it was drawn.
      lengths: int32. finish_reasons: why each ended.
      logprobs: float32, under the distribution that each token was drawn from, after bias,
        penalties, temperature and truncation; 0 for greedy rows, which draw nothing.
      model_logprobs: float32, under the model's own distribution.
      generations: int32, of the weights that computed each token (`Stats.generation`); -1 beyond.
    """

    tokens: Int[np.ndarray, "N T"]
    lengths: Int[np.ndarray, " N"]
    finish_reasons: tuple[FinishReason, ...]
    logprobs: Float[np.ndarray, "N T"]
    model_logprobs: Float[np.ndarray, "N T"]
    generations: Int[np.ndarray, "N T"]

    @property
    def mask(self) -> Bool[np.ndarray, "N T"]:
        """Where there is a token."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def rows(self) -> Iterator[tuple[int, ...]]:
        """Each row's tokens."""
        for row, length in zip(self.tokens, self.lengths, strict=True):
            yield tuple(row[:length].tolist())


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of N sequences' tokens from their starts on, padded to the longest, T.

    Attributes:
      logprobs: float32, under the model's own distribution; 0 beyond a row's length.
      lengths: int32. generations: int32, of the weights that scored each sequence.
    """

    logprobs: Float[np.ndarray, "N T"]
    lengths: Int[np.ndarray, " N"]
    generations: Int[np.ndarray, " N"]


def rollout(
    service: Service, requests: Sequence[GenerationRequest], *, samples: int = 1
) -> Completions:
    """Completes every request `samples` times; row i * samples + j is sample j of request i.

    Row r is seeded with its request's seed + r, so rows differ and a batch can be repeated. Samples
    share the blocks of their prompt. As many requests are open as the engine's queue takes.

    Raises UserError for a request that the engine cannot serve, and RuntimeError when the engine
    fails or is closed; the other requests are then cancelled.
    """
    if not isinstance(samples, int) or samples < 1:
        raise UserError(f"samples is {samples}; it must be a whole number, at least 1")
    rows = [
        _row(request, i * samples + j) for i, request in enumerate(requests) for j in range(samples)
    ]
    tokens: list[list[Token]] = [[] for _ in rows]
    reasons: dict[int, FinishReason] = {}

    def listen(row: int, event: Event) -> None:
        if isinstance(event, Token):
            tokens[row].append(event)
        elif isinstance(event, Restarted):
            tokens[row].clear()
        elif isinstance(event, Finished):
            reasons[row] = event.reason

    _run(service, rows, listen)
    lengths = np.array([len(each) for each in tokens], np.int32)

    def column(name: str, dtype: type, padding: int = 0) -> np.ndarray:
        return _padded([[getattr(t, name) for t in row] for row in tokens], dtype, padding)

    return Completions(
        column("token", np.int32),
        lengths,
        tuple(reasons[row] for row in range(len(rows))),
        column("sampling_logprob", np.float32),
        column("logprob", np.float32),
        column("generation", np.int32, -1),
    )


def _row(request: GenerationRequest, row: int) -> GenerationRequest:
    seed, logprobs = (request.sampling.seed + row) % 2**32, request.sampling.logprobs or 0
    sampling = dataclasses.replace(request.sampling, seed=seed, logprobs=logprobs)
    return dataclasses.replace(
        request, sampling=sampling, include_stop=True, id=f"{request.id}-{row}"
    )


def score(
    service: Service, sequences: Sequence[Sequence[int]], *, start: int | Sequence[int] = 1
) -> Scores:
    """The log-probability of each sequence's tokens from `start` on, given those before.

    Sequences with a prefix in common share its blocks, up to where the scoring starts.

    Args:
      start: for all sequences, or one for each; at least 1, for nothing precedes the first token.

    Raises as `rollout` does.
    """
    starts = [start] * len(sequences) if isinstance(start, int) else list(start)
    requests = [
        GenerationRequest(tuple(sequence), max_tokens=0, score_from=first)
        for sequence, first in zip(sequences, starts, strict=True)
    ]
    found: dict[int, Scored] = {}

    def listen(row: int, event: Event) -> None:
        if isinstance(event, Scored):
            found[row] = event

    _run(service, requests, listen)
    scored = [found[row] for row in range(len(requests))]
    return Scores(
        _padded([each.logprobs for each in scored], np.float32),
        np.array([len(each.logprobs) for each in scored], np.int32),
        np.array([each.generation for each in scored], np.int32),
    )


def _padded(
    rows: Sequence[Sequence[float] | np.ndarray], dtype: type, padding: int = 0
) -> np.ndarray:
    """[N, T] of rows of unequal lengths."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), padding, dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def _run(
    service: Service,
    requests: Sequence[GenerationRequest],
    listen: Callable[[int, Event], None],
) -> None:
    """Has every request served; `listen` gets the events of each row on the engine's thread."""
    ended: SimpleQueue[Finished] = SimpleQueue()

    def on_event(row: int, event: Event) -> None:
        listen(row, event)
        if isinstance(event, Finished):
            ended.put(event)

    with Feed(service, requests, on_event) as feed:
        while feed.open:
            feed.ended(ended.get())
