"""The order in which training visits the stream: a pure function of the seed and the row's number.

Nothing is remembered between calls, so a run resumes from one integer, and any number of hosts
agree on every global batch. grain's own `shuffle` gives the same promises one row at a time; this
computes a batch at once.

>>> order = RowOrder(tokens=1_000_000, seq_len=64, seed=0)
>>> order.starts(first=12 * 7, count=12).shape  # step 7 of batches of 12 rows
(12,)
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64


def _key(label: str) -> int:
    return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little")


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014, Fast splittable PRNGs), bijective.

    Written out because NumPy's generators may change their streams between versions (NEP 19), and
    a resumed run must not.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=4)
def _permutation(length: int, key: int) -> np.ndarray:
    """Returns a permutation of range(length), int64, chosen by `key`."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    counters = np.arange(1, length + 1, dtype=np.uint64) * golden + np.array([key], np.uint64)
    return np.argsort(_splitmix64(counters), kind="stable")


@dataclass(frozen=True)
class RowOrder:
    """An endless sequence of row starts in a stream of `tokens` tokens.

    Invariants: each epoch visits `rows_per_epoch` rows of `seq_len` targets, none twice, none
    partial. Epoch e shifts all its rows by one offset and shuffles them, both chosen by
    (seed, e), so the windows differ between epochs. `tokens > seq_len >= 1`.
    """

    tokens: int
    seq_len: int
    seed: int

    @property
    def rows_per_epoch(self) -> int:
        """Rows that fit at every offset; which tokens are left over depends on the offset."""
        return max(1, (self.tokens - self.seq_len) // self.seq_len)

    def offset(self, epoch: int) -> int:
        """Returns the stream position of the epoch's leftmost row, below `seq_len`."""
        choices = min(self.seq_len, self.tokens - self.rows_per_epoch * self.seq_len)
        return _key(f"offset:{self.seed}:{epoch}") % choices

    def starts(self, first: int, count: int) -> Int64[np.ndarray, " count"]:
        """Returns where rows number `first` to `first + count - 1` begin, counted over all epochs.

        A range may cross any number of epochs.
        """
        rows = self.rows_per_epoch
        parts: list[np.ndarray] = []
        while count > 0:
            epoch, begin = divmod(first, rows)
            taken = min(count, rows - begin)
            order = _permutation(rows, _key(f"order:{self.seed}:{epoch}"))
            parts.append(order[begin : begin + taken] * self.seq_len + self.offset(epoch))
            first, count = first + taken, count - taken
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
