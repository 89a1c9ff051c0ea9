"""Requests to an engine, and the events that it answers with: token ids in, token ids out.

Text, stop strings and chat templates live above (`text_stream.py`, `http/`); the engine knows ids
only.

    request = GenerationRequest(prompt=(1, 2, 3), max_tokens=16)
    ticket = service.submit(request, listener)  # listener(Event) runs on the engine's thread
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np

from tpu_stack.errors import UserError

MAX_LOGPROBS = 20
"""Alternatives per token that one request may ask for, as OpenAI's API allows."""
MAX_BIASES = 300
"""Tokens that one request may bias, as OpenAI's API allows."""

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
_ids = itertools.count(1)


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value}; it must {wanted}")


def _number(name: str, value: object, kind: type[int] | type[float]) -> None:
    wanted = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    word = "a whole number" if kind is int else "a number"
    _require(isinstance(value, wanted), name, value, f"be {word}")


_NUMBERS = (
    *("temperature", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The order is: logit bias, penalties, temperature, truncation.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k likeliest tokens; 0 keeps all. top_p: keep the smallest set of this total
        probability. min_p: drop tokens less likely than this share of the likeliest (Nguyen et al.
        2024, arXiv:2407.01082).
      repetition_penalty: logits of tokens seen in prompt or output are divided by it when positive,
        multiplied when negative (Keskar et al. 2019, arXiv:1909.05858); 1 does nothing.
      presence_penalty, frequency_penalty: subtracted from logits of tokens in the output, once and
        per occurrence, as in OpenAI's API.
      logit_bias: token id -> added to its logit.
      seed: token number i of a sequence is drawn with a key of (seed, i) alone, so a request's
        output does not depend on its neighbours.
      logprobs: None for none; n for each token's log-probability and those of the n likeliest,
        under the model's own distribution, before bias, penalties and temperature; and the
        token's under the distribution that it was drawn from.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        finite = math.isfinite
        for name in _NUMBERS:
            _number(name, getattr(self, name), float)
        for name in ("top_k", "seed"):
            _number(name, getattr(self, name), int)
        t, r = self.temperature, self.repetition_penalty
        _require(finite(t) and t >= 0, "temperature", t, "be at least 0 and finite")
        _require(0 <= self.top_k < 2**31, "top_k", self.top_k, "lie in 0 to 2147483647")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "lie in (0, 1]")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "lie in [0, 1]")
        _require(finite(r) and r > 0, "repetition_penalty", r, "be positive and finite")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2 <= value <= 2, name, value, "lie in -2 to 2")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "lie in 0 to 4294967295")
        count = len(self.logit_bias)
        _require(count <= MAX_BIASES, "logit_bias's size", count, f"be at most {MAX_BIASES}")
        for token, bias in self.logit_bias.items():
            _require(token >= 0, "logit_bias's token", token, "be a token id")
            _require(-100 <= bias <= 100, f"the bias of token {token}", bias, "lie in -100 to 100")
        n = self.logprobs
        _require(n is None or 0 <= n <= MAX_LOGPROBS, "logprobs", n, f"lie in 0 to {MAX_LOGPROBS}")


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to continue.

    Attributes:
      prompt: token ids, at least one.
      max_tokens: new tokens at most.
      stop_tokens: ids that end the output. include_stop: whether such a token is part of it.
      score_from: also compute the log-probabilities of the prompt's tokens from this one on, as
        `Scored`; at least 1, for nothing precedes the first. max_tokens may then be 0.
      priority: lower goes first, and is preempted last.
      client: whose request it is; clients of one priority share the engine fairly.
      deadline_s: seconds after submission at which it is given up, waiting or running; None: never.
      id: names it in errors and logs.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 16
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_tokens: frozenset[int] = frozenset()
    include_stop: bool = False
    score_from: int | None = None
    priority: int = 0
    client: str = ""
    deadline_s: float | None = None
    id: str = field(default_factory=lambda: f"request-{next(_ids)}")

    def __post_init__(self) -> None:
        _require(len(self.prompt) > 0, "the prompt's length", 0, "be at least one token")
        _number("max_tokens", self.max_tokens, int)
        least, size, start = int(self.score_from is None), len(self.prompt), self.score_from
        _require(self.max_tokens >= least, "max_tokens", self.max_tokens, f"be at least {least}")
        if start is not None:
            _require(size > 1, "the length of a sequence to score", size, "be at least two tokens")
            last = f"lie in 1 to {size - 1}, the prompt's last token"
            _require(1 <= start < size, "score_from", start, last)
        bad = next((x for x in self.prompt if not isinstance(x, int | np.integer)), None)
        _require(bad is None, "a token of the prompt", bad, "be a whole number")
        d = self.deadline_s
        _require(d is None or (math.isfinite(d) and d > 0), "deadline_s", d, "be positive")

    def check(self, vocab_size: int, max_length: int) -> None:
        """Raises UserError when the prompt does not fit the model's vocabulary or window."""
        size = len(self.prompt)
        _require(
            size + min(self.max_tokens, 1) <= max_length,
            "the prompt's length",
            f"{size} tokens",
            f"be under {max_length}, the window, to leave room for one more"
            if self.max_tokens
            else f"be at most {max_length}, the window",
        )
        for what, ids in (("prompt", self.prompt), ("logit_bias", self.sampling.logit_bias)):
            bad = next((token for token in ids if not 0 <= token < vocab_size), None)
            _require(bad is None, f"a token of the {what}", bad, f"lie in 0 to {vocab_size - 1}")


@dataclass(frozen=True)
class Token:
    """A new token.

    Attributes:
      logprob: under the model's own distribution, and `top`: (id, log-probability), likeliest
        first; where asked for. sampling_logprob: under the distribution that it was drawn from,
        after bias, penalties, temperature and truncation; 0 for a greedy token.
      generation: of the weights that computed it, as `Stats.generation` counts.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    sampling_logprob: float | None = None
    generation: int = 0


@dataclass(frozen=True)
class Scored:
    """Log-probabilities, float32, of the prompt's tokens from `score_from` on, under the model's
    own distribution; `generation` is that of the weights."""

    logprobs: np.ndarray
    generation: int


@dataclass(frozen=True)
class Finished:
    """The last event of a request.

    Attributes:
      reason: "stop" for a stop token, "length" for max_tokens or the window's end.
      prompt_tokens, new_tokens: counts; a stop token is not counted.
      cached_tokens: prompt tokens whose keys and values another request had computed.
      detail: what went wrong, for "error".
    """

    reason: FinishReason
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int = 0
    detail: str = ""


@dataclass(frozen=True)
class Restarted:
    """All events so far are void: the weights changed, and generation begins anew."""


Event = Token | Scored | Finished | Restarted


class QueueFull(UserError):
    """No more requests are taken now; `retry_after_s` says when to try again."""

    def __init__(self, waiting: int, retry_after_s: float):
        super().__init__(
            f"the queue is full: {waiting} requests wait; retry in {retry_after_s:g} s"
        )
        self.retry_after_s = retry_after_s
