"""What a benchmark asks of an engine: lengths from a mix, arrivals in a closed or open loop.

>>> mix = LengthMix.parse("64:24x3,512-1024:64")
>>> requests = make_requests(mix, count=100, vocab_size=32000, max_length=2048, seed=0)
>>> arrival_times(count=100, rate=4.0, seed=0)[:2]
[0.617..., 0.838...]
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tpu_stack.errors import UserError
from tpu_stack.serving.requests import GenerationRequest

_RANGE = r"(\d+)(?:-(\d+))?"
_ENTRY = re.compile(rf"{_RANGE}:{_RANGE}(?:x(\d+))?")


@dataclass(frozen=True)
class Lengths:
    """One kind of request: least and most prompt tokens, new tokens, and its weight in the mix."""

    prompt: tuple[int, int]
    new: tuple[int, int]
    weight: int = 1


@dataclass(frozen=True)
class LengthMix:
    """Kinds of requests, drawn by weight; lengths within a kind are uniform."""

    kinds: tuple[Lengths, ...]

    @classmethod
    def parse(cls, text: str) -> "LengthMix":
        """From `PROMPT:NEW[xWEIGHT],...`, each length a number or LEAST-MOST.

        Raises UserError naming the part that does not parse.
        """
        return cls(tuple(_kind(part.strip()) for part in text.split(",")))

    @property
    def longest(self) -> int:
        """Prompt and new tokens of the longest request."""
        return max(kind.prompt[1] + kind.new[1] for kind in self.kinds)


def _kind(part: str) -> Lengths:
    match = _ENTRY.fullmatch(part)
    if match is None:
        raise UserError(
            f"--lengths has {part!r}; write PROMPT:NEW or PROMPT:NEWxWEIGHT, such as 64:24x3 or"
            " 16-128:8-64"
        )
    low, high, fewest, most, weight = match.groups()
    kind = Lengths((int(low), int(high or low)), (int(fewest), int(most or fewest)),
                   int(weight or 1))  # fmt: skip
    for least, greatest in (kind.prompt, kind.new):
        if not 1 <= least <= greatest:
            raise UserError(f"--lengths has {part!r}; lengths are at least 1, the lesser one first")
    if kind.weight < 1:
        raise UserError(f"--lengths has {part!r}; a weight is at least 1")
    return kind


def make_requests(
    mix: LengthMix,
    *,
    count: int,
    vocab_size: int,
    max_length: int,
    seed: int,
    text: Sequence[int] | None = None,
    run: int = 0,
) -> list[GenerationRequest]:
    """Greedy requests whose prompts are random tokens, or pieces of `text` where it is given.

    Another `run` has the same lengths and other prompts, which no prefix cache has seen.

    Raises UserError where the mix does not fit the window of `max_length` tokens, or the text is
    shorter than the longest prompt.
    """
    if mix.longest > max_length:
        raise UserError(
            f"--lengths asks for {mix.longest} tokens in one request; the window is {max_length}"
        )
    longest = max(kind.prompt[1] for kind in mix.kinds)
    if text is not None and len(text) < longest:
        raise UserError(f"--text has {len(text)} tokens; the longest prompt needs {longest}")
    rng, contents = np.random.default_rng(seed), np.random.default_rng([seed, 2, run])
    weights = np.array([kind.weight for kind in mix.kinds], float)
    drawn = rng.choice(len(mix.kinds), count, p=weights / weights.sum())
    requests = []
    for kind in (mix.kinds[i] for i in drawn):
        size = int(rng.integers(kind.prompt[0], kind.prompt[1] + 1))
        new = int(rng.integers(kind.new[0], kind.new[1] + 1))
        if text is None:
            prompt = contents.integers(0, vocab_size, size).tolist()
        else:
            first = int(contents.integers(0, len(text) - size + 1))
            prompt = text[first : first + size]
        requests.append(GenerationRequest(tuple(prompt), new))
    return requests


def arrival_times(*, count: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start at which requests arrive: a Poisson process of `rate` per second.

    Raises UserError for a rate that is not positive.
    """
    if not (rate > 0 and math.isfinite(rate)):
        raise UserError(f"--rate is {rate}; it must be positive, in requests per second")
    gaps = np.random.default_rng([seed, 1]).exponential(1 / rate, count)
    return np.cumsum(gaps).tolist()
