"""Text from prompts, one batch at a time, streamed as it is decoded.

>>> for row, piece in stream_text(engine, tokenizer, ["def "], Request(max_tokens=32)): ...
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.data.stream_decoder import StreamDecoder
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.errors import UserError
from tpu_stack.serving.engine import Engine
from tpu_stack.serving.sampler import Sampling


@dataclass(frozen=True)
class Request:
    """How to continue prompts. `temperature` 0 is greedy; row b is seeded with `seed + b`."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"--temperature is {self.temperature}; it must be at least 0 and finite"
            )
        if not 0 <= self.top_k < 2**31:
            raise UserError(
                f"--top-k is {self.top_k}; it must lie in 0 to 2147483647 (0 keeps all)"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; it must lie in (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}; it must lie in 0 to 4294967295")


@dataclass
class GenerationStats:
    """Filled in while streaming. Times are wall clock and include compilation on first use."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0
    finished: list[str] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens of the prompts' rows per second, the first of each row left out."""
        rows = len(self.finished)
        return (self.new_tokens - rows) / self.decode_s if self.decode_s else None


def stream_text(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    request: Request,
    stats: GenerationStats | None = None,
    chat: ChatFormat | None = None,
) -> Iterator[tuple[int, str]]:
    """Yields (row, text) as rows grow; a row ends at the end of a document, at one of `chat`'s stop
    tokens, or at max_tokens. Prompts begin as `chat` says.

    Raises UserError when a prompt is empty or too long for the engine.
    """
    stats = stats if stats is not None else GenerationStats()
    chat = chat or ChatFormat()
    begin, ends = chat.begin(tokenizer), chat.ends(tokenizer)
    ids = [[*begin, *tokenizer.encode(prompt)] for prompt in prompts]
    stats.prompt_tokens = sum(map(len, ids))
    stats.finished = [""] * len(ids)
    decoders = [StreamDecoder(tokenizer) for _ in ids]
    counts = [0] * len(ids)
    started = time.perf_counter()
    sampling = Sampling.of(
        engine.batch, request.temperature, request.top_k, request.top_p, request.seed
    )
    state = engine.prefill(ids, sampling)
    tokens = np.asarray(state.tokens)
    stats.prefill_s = time.perf_counter() - started
    while True:
        for row, decoder in enumerate(decoders):
            if stats.finished[row]:
                continue
            token = int(tokens[row])
            counts[row] += 1
            stats.new_tokens += 1
            if token in ends:
                stats.finished[row] = "stop"
            elif counts[row] == request.max_tokens or len(ids[row]) + counts[row] >= engine.length:
                stats.finished[row] = "length"
            piece = "" if stats.finished[row] == "stop" else decoder.feed(token)
            piece += decoder.flush() if stats.finished[row] else ""
            if piece:
                yield row, piece
        if all(stats.finished):
            return
        started = time.perf_counter()
        state = engine.decode(state)
        tokens = np.asarray(state.tokens)
        stats.decode_s += time.perf_counter() - started
        stats.decode_steps += 1
