"""Documents to one stream of tokens, and the stream to rows that a model trains on.

Rows are cut from the concatenated documents ("concatenate and split"), so no position is wasted on
padding; segment ids keep attention, and the loss mask keeps the loss, inside a document.

>>> stream = tokenize(tokenizer, documents)
>>> batch = pack_rows(stream, np.arange(12) * 64, seq_len=64)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt

from tpu_stack.data.sources import Document
from tpu_stack.data.tokenizer import Tokenizer

_DOCUMENTS_AT_ONCE = 1024  # bounds the memory of the tokenizer library's encodings


class Batch(TypedDict):
    """Rows for one step; see `pack_rows` for the invariants. All arrays are [B, T]."""

    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]
    segment_ids: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]
    loss_mask: Bool[np.ndarray, "B T"]


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The tokens of one split: documents in order, an end-of-document token between them.

    Invariants: `tokens` (uint16 where the vocabulary allows, else uint32) and `is_start` have one
    entry per token; `is_start` marks the first token of each document, so a non-empty stream starts
    with True. The end-of-document token belongs to the document it ends; the last document has
    none, because a contiguous split may have cut it. `text_bytes` counts the UTF-8 bytes of all the
    text, `first_bytes` those of the documents' first tokens.
    """

    tokens: UInt[np.ndarray, " N"]
    is_start: Bool[np.ndarray, " N"]
    text_bytes: int
    first_bytes: int

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def documents(self) -> int:
        """How many documents have tokens here."""
        return int(self.is_start.sum())

    @property
    def predicted_tokens(self) -> int:
        """Tokens with a loss: all but the first of each document; end-of-document tokens count."""
        return len(self) - self.documents

    @property
    def predicted_bytes(self) -> int:
        """UTF-8 bytes of text that the predicted tokens stand for.

        That is all bytes of the text less those of the first tokens, which nothing predicts. The
        loss of an end-of-document token counts, but it stands for no bytes. Exact for byte-level
        and character tokenizers; for others `Tokenizer.byte_length` says how the first tokens are
        counted. Bits per byte are the summed loss in nats / ln 2 / predicted_bytes.
        """
        return self.text_bytes - self.first_bytes


def tokenize(tokenizer: Tokenizer, documents: Sequence[Document]) -> TokenStream:
    """Encodes `documents` into one stream. Documents without a token are left out."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    separator = np.array([tokenizer.eod_id], dtype)
    pieces: list[np.ndarray] = []
    starts: list[int] = []
    length = text_bytes = first_bytes = 0
    for begin in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        texts = [document.text for document in documents[begin : begin + _DOCUMENTS_AT_ONCE]]
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            if not ids:
                continue
            if pieces:
                pieces.append(separator)
                length += 1
            pieces.append(np.array(ids, dtype))
            starts.append(length)
            length += len(ids)
            text_bytes += len(text.encode("utf-8"))
            first_bytes += tokenizer.byte_length(ids[0])
    is_start = np.zeros(length, bool)
    is_start[starts] = True
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
    return TokenStream(tokens, is_start, text_bytes, first_bytes)


def row_count(stream: TokenStream, seq_len: int) -> int:
    """Returns how many rows, the last one perhaps partial, predict every token from offset 0."""
    return max(0, -(-(len(stream) - 1) // seq_len))


def pack_rows(stream: TokenStream, starts: Int[np.ndarray, " B"], seq_len: int) -> Batch:
    """Cuts one row of `seq_len` inputs and their targets out of the stream at each start.

    Row b reads the T + 1 tokens from `starts[b]`: the first T are `tokens`, the last T `targets`.
    Rows that start T apart overlap by one token, so each token is a target exactly once.

    Invariants, for rows at 0, T, 2T, ...:
      - `loss_mask` is True for exactly one position per non-first token of every document;
      - two positions of a row have equal non-zero `segment_ids` exactly when they lie in the same
        document; ids count 1, 2, ... from the left and begin anew in every row;
      - `positions` count from 0 at the start of the row and at each document in it;
      - past the last target (a start near or beyond the stream's end) everything is 0 and masked.

    Args:
      stream: at least one token, unless there are no starts.
      starts: offsets into the stream, int64 [B], each at least 0.
    Returns: int32 arrays and the bool `loss_mask`, all [B, T] and C-contiguous.
    """
    column = np.arange(seq_len + 1, dtype=np.int64)
    where = starts.astype(np.int64)[:, None] + column
    inside = where < len(stream)
    partial = not inside.all()
    if partial:
        where = np.minimum(where, len(stream) - 1)
    window = stream.tokens[where].astype(np.int32)
    begins = stream.is_start[where]
    begins[:, 0] = True
    segment = np.cumsum(begins, axis=1, dtype=np.int32)
    offset = column.astype(np.int32)
    position = offset - np.maximum.accumulate(np.where(begins, offset, 0), axis=1)
    batch: Batch = {
        "tokens": window[:, :-1].copy(),
        "targets": window[:, 1:].copy(),
        "segment_ids": segment[:, :-1].copy(),
        "positions": position[:, :-1].copy(),
        "loss_mask": segment[:, :-1] == segment[:, 1:],
    }
    if partial:
        for array in batch.values():
            array[~inside[:, 1:]] = 0  # pyright: ignore[reportIndexIssue]
    return batch
