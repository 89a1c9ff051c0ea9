"""Text from a model one token at a time, without ever showing half a character.

>>> decoder = StreamDecoder(tokenizer)
>>> "".join(decoder.feed(token) for token in tokenizer.encode("is short")) + decoder.flush()
'is short'
"""

import codecs

from tpu_stack.data.tokenizer import UNKNOWN, Tokenizer

# A UTF-8 character has at most four bytes, so one that is incomplete after four tokens stays so.
_LONGEST_WAIT = 4


class StreamDecoder:
    """Turns ids into text increments; use one decoder per generated sequence.

    Invariant: the increments so far, with `flush()`, are `tokenizer.decode` of the ids so far.
    Exact for byte-level and character tokenizers, broken UTF-8 included. For others a window of
    tokens is decoded again (the method of Hugging Face's text-generation-inference), which is exact
    for text that the tokenizer itself produced.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._table = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []  # ids emitted last, then ids still held back
        self._emitted = 0  # how many ids of the window were emitted

    def feed(self, token: int) -> str:
        """Takes the next id; returns the text that is now certain, "" while a character is open."""
        if self._table is not None:
            known = 0 <= token < len(self._table)  # a padded vocabulary may yield unknown ids
            return self._utf8.decode(self._table[token] if known else b"")
        self._window.append(token)
        return self._advance(may_wait=len(self._window) - self._emitted < _LONGEST_WAIT)

    def flush(self) -> str:
        """Ends the text; returns what was held back, an unfinished character as U+FFFD."""
        if self._table is not None:
            return self._utf8.decode(b"", final=True)
        return self._advance(may_wait=False)

    def _advance(self, may_wait: bool) -> str:
        before = self._tokenizer.decode(self._window[: self._emitted])
        text = self._tokenizer.decode(self._window)
        if len(text) <= len(before) or (may_wait and text.endswith(UNKNOWN)):
            return ""
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        return text[len(before) :]
