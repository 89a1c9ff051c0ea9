"""From a `DataConfig` to batches: the corpus, the endless training iterator, the validation pass.

>>> _ = Path("plays.txt").write_text("To be, or not to be. " * 500)
>>> config = DataConfig(paths=("plays.txt",), tokenizer="chars", seq_len=64, batch_size=12)
>>> corpus = load_corpus(config)
>>> batches = train_iterator(corpus, config)
>>> batch = next(batches)            # dict of [12, 64] arrays, see packing.Batch
>>> state = batches.get_state()      # small, JSON; set_state resumes bit for bit
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tpu_stack.data.order import RowOrder
from tpu_stack.data.packing import Batch, TokenStream, pack_rows, row_count, tokenize
from tpu_stack.data.sources import default_corpus, read_documents
from tpu_stack.data.split import SplitMode, limit_bytes, split_documents
from tpu_stack.data.tokenizer import Tokenizer, build_tokenizer
from tpu_stack.errors import UserError

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True)
class DataConfig:
    """What text to use and how to cut it. Raises UserError for a value out of range."""

    paths: tuple[str, ...] = ()
    """Files and folders of text; empty means the running Python's standard library."""
    tokenizer: str = "bpe:4096"
    """`chars`, `bpe:N`, or the path of a tokenizer.json or of a folder that holds one."""
    seq_len: int = 256
    """Tokens in a row."""
    batch_size: int = 16
    """Rows in a step, over all processes."""
    seed: int = 0
    """Chooses the documents under max_bytes, and the order and offsets of the rows."""
    val_fraction: float = 0.1
    """Share of the corpus held out: 0 holds out nothing, 1 everything."""
    split: SplitMode = "auto"
    """Hold out whole documents, the end of the text, or whichever suits the corpus."""
    max_bytes: int | None = None
    """Take only this many bytes of the corpus, documents chosen by seed."""
    text_field: str = "text"
    """The field that holds the text in JSON Lines and Parquet."""

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 1), ("batch_size", 1), ("seed", 0), ("max_bytes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"data.{name} is {value}; it must be at least {least}")
        if not 0.0 <= self.val_fraction <= 1.0:
            raise UserError(f"data.val_fraction is {self.val_fraction}; it must lie in 0 to 1")


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenizer and the two splits, encoded; `split_mode` is "documents" or "contiguous"."""

    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    split_mode: SplitMode


def load_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads, splits and encodes the corpus that `config` describes.

    Args:
      tokenizer: replaces `config.tokenizer`, as the evaluation of a checkpoint requires. None:
        `config.tokenizer`, which `chars` and `bpe:N` build from the training split alone.
    Raises UserError for bad input, for a training split shorter than one row (unless
    `val_fraction` is 1), and for a validation split without a token to predict (unless it is 0).
    """
    if config.paths:
        documents = read_documents(config.paths, config.text_field)
    else:
        documents = default_corpus()
    if config.max_bytes is not None:
        documents = limit_bytes(documents, config.max_bytes, config.seed)
    parts = split_documents(documents, config.val_fraction, config.split)
    if tokenizer is None:
        tokenizer = build_tokenizer(config.tokenizer, parts.train)
    corpus = Corpus(
        tokenizer, tokenize(tokenizer, parts.train), tokenize(tokenizer, parts.val), parts.mode
    )
    if config.val_fraction < 1.0:
        _require_row(corpus.train, config.seq_len)
    if config.val_fraction > 0.0:
        _require_prediction(corpus.val, "validation")
    return corpus


def _require_row(stream: TokenStream, seq_len: int) -> None:
    if len(stream) <= seq_len:
        raise UserError(
            f"the training split has {len(stream)} tokens ({stream.text_bytes} bytes); a row of "
            f"seq_len {seq_len} needs {seq_len + 1}: use more text or a smaller data.seq_len"
        )


def _require_prediction(stream: TokenStream, split: str) -> None:
    if stream.predicted_tokens <= 0:
        raise UserError(
            f"the {split} split has nothing to predict: {len(stream)} tokens in "
            f"{stream.documents} documents ({stream.text_bytes} bytes)"
        )


def _rows_per_process(config: DataConfig, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise UserError(f"process {process_index} is not one of {process_count} processes")
    if config.batch_size % process_count:
        raise UserError(
            f"data.batch_size {config.batch_size} is not a multiple of {process_count} processes"
        )
    return config.batch_size // process_count


@dataclass(frozen=True, eq=False)
class _TrainingBatches:
    """The random-access source of one process: item s is its rows of global batch s."""

    stream: TokenStream
    order: RowOrder
    batch_size: int
    first_row: int
    rows: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        first = index * self.batch_size + self.first_row
        return pack_rows(self.stream, self.order.starts(first, self.rows), self.order.seq_len)


def train_iterator(
    corpus: Corpus, config: DataConfig, process_index: int = 0, process_count: int = 1
) -> "grain.DatasetIterator[Batch]":
    """Returns an endless grain iterator over this process's rows of each global batch.

    Batch s of process p of P holds rows p*B/P to (p+1)*B/P - 1 of global batch s, which does not
    depend on P; a batch may span two epochs. `get_state()` is `{"next_index": s}` and valid for
    any P; `set_state` continues bit for bit for the same corpus, seed, seq_len and batch size. No
    thread or process is started: a batch is a gather from memory.

    Raises UserError when the training split is shorter than a row or P does not divide B.
    """
    import grain  # two seconds beyond jax's own import; only training pays

    _require_row(corpus.train, config.seq_len)
    rows = _rows_per_process(config, process_index, process_count)
    source = _TrainingBatches(
        corpus.train,
        RowOrder(len(corpus.train), config.seq_len, config.seed),
        config.batch_size,
        first_row=process_index * rows,
        rows=rows,
    )
    inline = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.source(source).to_iter_dataset(inline))


def eval_batches(
    corpus: Corpus,
    config: DataConfig,
    split: Literal["train", "val"] = "val",
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields every row of a split in order; masked rows fill up the last batch.

    Over all batches and processes `loss_mask` is True exactly `predicted_tokens` times. Every
    process yields `eval_batch_count` batches. Raises UserError, at the call and not at the first
    batch, for a split with nothing to predict or processes that do not divide the batch.
    """
    stream = corpus.train if split == "train" else corpus.val
    _require_prediction(stream, "training" if split == "train" else "validation")
    rows = _rows_per_process(config, process_index, process_count)
    first_rows = range(
        process_index * rows,
        process_index * rows + eval_batch_count(corpus, config, split) * config.batch_size,
        config.batch_size,
    )
    return (
        pack_rows(stream, np.arange(first, first + rows) * config.seq_len, config.seq_len)
        for first in first_rows
    )


def eval_batch_count(
    corpus: Corpus, config: DataConfig, split: Literal["train", "val"] = "val"
) -> int:
    """Returns how many batches `eval_batches` yields to each process."""
    stream = corpus.train if split == "train" else corpus.val
    return -(-row_count(stream, config.seq_len) // config.batch_size)
