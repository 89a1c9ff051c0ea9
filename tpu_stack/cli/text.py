"""The options that say which text is used, shared by train, eval and demo.

>>> data_config((Path("plays.txt"),), TextOptions(), seq_len=64, batch_size=12).paths
('plays.txt',)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tpu_stack.data.pipeline import DataConfig


@dataclass(frozen=True)
class TextOptions:
    """How the text is split and tokenized."""

    tokenizer: str = "bpe:2048"
    """chars, bpe:N (byte-level, trained on the training split), or a tokenizer.json or its
    folder."""
    max_bytes: int | None = None
    """Use only this many bytes of the corpus, documents chosen by seed."""
    val_fraction: float = 0.1
    """Share of the corpus held out for validation."""
    split: Literal["auto", "documents", "contiguous"] = "auto"
    """Hold out whole documents, the end of the text, or whichever suits the corpus."""
    field: str = "text"
    """The field that holds the text in JSON Lines and Parquet files."""
    seed: int = 0
    """Chooses the documents under max_bytes, and the order and offsets of the rows."""


def data_config(
    paths: tuple[Path, ...], text: TextOptions, *, seq_len: int, batch_size: int
) -> "DataConfig":
    """The DataConfig of these options."""
    from tpu_stack.data.pipeline import DataConfig

    return DataConfig(
        paths=tuple(map(str, paths)),
        tokenizer=text.tokenizer,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=text.seed,
        val_fraction=text.val_fraction,
        split=text.split,
        max_bytes=text.max_bytes,
        text_field=text.field,
    )
