"""Batches of packed text as a trainer takes them: endless, resumable, with a fingerprint.

>>> batches = TokenBatches(corpus, DataConfig(seq_len=64, batch_size=16))
>>> batches.element_spec["tokens"].shape
(16, 64)
"""

from dataclasses import asdict
from typing import Any

import jax
import numpy as np

from tpu_stack.data.packing import Batch
from tpu_stack.data.pipeline import Corpus, DataConfig, train_iterator


class TokenBatches:
    """This process's rows of the training split, in the order that the config's seed decides.

    Raises UserError as `pipeline.train_iterator` does.
    """

    def __init__(
        self, corpus: Corpus, config: DataConfig, process_index: int = 0, process_count: int = 1
    ):
        self._corpus, self._config = corpus, config
        self._rows = train_iterator(corpus, config, process_index, process_count)

    @property
    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the global batch."""
        return token_spec(self._config.batch_size, self._config.seq_len)

    def __next__(self) -> Batch:
        return next(self._rows)

    def get_state(self) -> dict[str, int]:
        """`{"next_index": s}`: the same for any number of processes."""
        return self._rows.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """Continues with batch `next_index`."""
        self._rows.set_state(state)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the sequence of batches, JSON-ready and flat; a resumed run must have it.

        The config, the tokenizer's digest and the number of training tokens.
        """
        config = {f"data.{name}": value for name, value in asdict(self._config).items()}
        return {
            **{name: list(v) if isinstance(v, tuple) else v for name, v in config.items()},
            "corpus.tokenizer": self._corpus.tokenizer.digest(),
            "corpus.train_tokens": len(self._corpus.train),
        }


def token_spec(batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A `packing.Batch` of this size: int32 [B, T] fields and the bool loss mask."""
    names = ("tokens", "targets", "positions", "segment_ids")
    shape = (batch_size, seq_len)
    return {
        **{name: jax.ShapeDtypeStruct(shape, np.int32) for name in names},
        "loss_mask": jax.ShapeDtypeStruct(shape, np.bool_),
    }
