"""Text from prompts, streamed as an engine decodes it.

Example:
    for row, piece in stream_text(service, tokenizer, ["def "], max_tokens=32): ...
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.errors import UserError
from tpu_stack.serving.feed import Feed
from tpu_stack.serving.requests import Event, Finished, GenerationRequest, SamplingParams, Token
from tpu_stack.serving.service import Service
from tpu_stack.serving.text_stream import TextStream

GREEDY = SamplingParams()


@dataclass
class GenerationStats:
    """Filled in while streaming. Times are wall clock.

    Attributes:
      prefill_s: until every row has its first token. decode_s: from there to the last token. Both
        include compilation where the engine has not run the program before.
      finished: why each row ended.
      tokens_per_s: of all rows, once each has had a decode step, so that no compilation is in it;
        None where nothing came after that.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finished: list[str] = field(default_factory=list)
    tokens_per_s: float | None = None


class _Clock:
    """Times of tokens by row, as `GenerationStats` sums them up."""

    def __init__(self, rows: int):
        self.started = time.perf_counter()
        self._times: list[list[float]] = [[] for _ in range(rows)]

    def note(self, row: int) -> None:
        self._times[row].append(time.perf_counter())

    def write(self, stats: GenerationStats) -> None:
        every = sorted(at for row in self._times for at in row)
        if not every:
            return
        first = max(row[0] for row in self._times if row)
        stats.prefill_s, stats.decode_s = first - self.started, every[-1] - first
        second = max((row[1] for row in self._times if len(row) > 1), default=every[-1])
        after = sum(at > second for at in every)
        stats.tokens_per_s = after / (every[-1] - second) if after else None


def stream_text(
    service: Service,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingParams = GREEDY,
    *,
    max_tokens: int = 64,
    chat: ChatFormat | None = None,
    stats: GenerationStats | None = None,
) -> Iterator[tuple[int, str]]:
    """Yields (row, text) as rows grow; row b is seeded with `sampling.seed + b`. A row ends at the
    end of a document, at one of `chat`'s stop tokens, at `max_tokens` or at the window's end.
    Prompts begin as `chat` says.

    Any number of prompts: those that the engine's queue has no room for wait their turn.

    Raises UserError when a prompt is empty or the engine cannot serve it, and RuntimeError when the
    engine fails or is closed. Rows are cancelled when the iterator is closed.
    """
    stats = stats if stats is not None else GenerationStats()
    requests = _requests(tokenizer, prompts, sampling, max_tokens, chat or ChatFormat())
    stats.prompt_tokens = sum(len(request.prompt) for request in requests)
    stats.finished = [""] * len(requests)
    streams = [TextStream(tokenizer) for _ in requests]
    events: SimpleQueue[tuple[int, Event]] = SimpleQueue()
    clock = _Clock(len(requests))

    def listen(row: int, event: Event) -> None:
        if isinstance(event, Token):
            clock.note(row)
        events.put((row, event))

    try:
        with Feed(service, requests, listen) as feed:
            while feed.open:
                row, event = events.get()
                if isinstance(event, Token):
                    stats.new_tokens += 1
                    text = streams[row].feed(event).text
                elif isinstance(event, Finished):
                    feed.ended(event)
                    stats.finished[row] = event.reason
                    text = streams[row].flush().text
                else:
                    raise RuntimeError("the engine's weights were replaced while text was streamed")
                if text:
                    yield row, text
    finally:
        clock.write(stats)


def _requests(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingParams,
    max_tokens: int,
    chat: ChatFormat,
) -> list[GenerationRequest]:
    begin, ends = chat.begin(tokenizer), frozenset(chat.ends(tokenizer))
    requests = []
    for row, prompt in enumerate(prompts):
        ids = (*begin, *tokenizer.encode(prompt))
        if not ids:
            raise UserError(f"prompt number {row + 1} is empty; it needs at least one token")
        seeded = dataclasses.replace(sampling, seed=(sampling.seed + row) % 2**32)
        requests.append(GenerationRequest(ids, max_tokens, seeded, ends))
    return requests
