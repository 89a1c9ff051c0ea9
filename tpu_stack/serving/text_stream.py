"""Tokens of one answer to text that may be shown: no half characters, no half stop strings.

>>> stream = TextStream(tokenizer, stops=(".",))
>>> tokens = [Token(id) for id in tokenizer.encode("is short. is")]
>>> "".join(stream.feed(token).text for token in tokens) + stream.flush().text
'is short'
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tpu_stack.data.stream_decoder import StreamDecoder
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.serving.requests import Token


@dataclass(frozen=True)
class Placed:
    """A token and where its text begins: characters after the start of the answer."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Increment:
    """What is now certain.

    Attributes:
      text: to be appended to the answer.
      tokens: those whose text has begun to be shown, in order. None that lies after a stop.
      stopped: a stop string was met; the text ends before it, and nothing may follow.
    """

    text: str = ""
    tokens: tuple[Placed, ...] = ()
    stopped: bool = False


class TextStream:
    """The text of one sequence as it grows.

    Invariant: the increments' texts joined are the decoded tokens, cut before the first stop
    string. Text that may yet turn out to begin a stop string is held back until it is decided.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._shown = 0  # characters
        self._waiting: list[Placed] = []
        self._stopped = False

    def feed(self, token: Token) -> Increment:
        """Takes the next token; returns the text that is now certain."""
        if self._stopped:
            return Increment(stopped=True)
        self._waiting.append(Placed(token, self._shown + len(self._held)))
        self._held += self._decoder.feed(token.token)
        return self._advance(len(self._held) - self._open_stop(self._held))

    def flush(self) -> Increment:
        """Ends the text; what was held back is shown, unless it completes a stop string."""
        if self._stopped:
            return Increment(stopped=True)
        self._held += self._decoder.flush()
        return self._advance(len(self._held), last=True)

    def _advance(self, certain: int, last: bool = False) -> Increment:
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self._stopped = True
            certain = min(found)
        text, self._held = self._held[:certain], self._held[certain:]
        self._shown += len(text)
        begun = [placed for placed in self._waiting if last or placed.offset < self._shown]
        if self._stopped:
            begun = [placed for placed in begun if placed.offset < self._shown]
        self._waiting = self._waiting[len(begun) :]
        return Increment(text, tuple(begun), self._stopped)

    def _open_stop(self, text: str) -> int:
        """How many characters at the end of `text` may begin a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def renewed(self) -> "TextStream":
        """An empty stream with the same stop strings."""
        return TextStream(self._tokenizer, self._stops)
