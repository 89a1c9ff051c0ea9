"""The pipeline: resumable, the same for any number of processes, and clear about tiny corpora."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest

from tpu_stack.data.packing import tokenize
from tpu_stack.data.pipeline import (
    Corpus,
    DataConfig,
    eval_batch_count,
    eval_batches,
    load_corpus,
    train_iterator,
)
from tpu_stack.data.sources import Document
from tpu_stack.errors import UserError

CONFIG = DataConfig(tokenizer="bpe:400", seq_len=16, batch_size=8, max_bytes=60_000, seed=7)


@cache
def corpus() -> Corpus:
    return load_corpus(CONFIG)


def take(batches: Any, count: int) -> list[dict[str, np.ndarray]]:
    return [next(batches) for _ in range(count)]


def assert_same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)


def test_resuming_equals_going_on_bit_for_bit_across_epochs():
    rows_per_epoch = len(corpus().train) // CONFIG.seq_len
    steps = rows_per_epoch // CONFIG.batch_size
    batches = train_iterator(corpus(), CONFIG)
    take(batches, steps - 3)
    state = json.loads(json.dumps(batches.get_state()))
    uninterrupted = take(batches, 10)
    resumed = train_iterator(load_corpus(CONFIG), CONFIG)
    take(resumed, 2)  # whatever it did before does not matter
    resumed.set_state(state)
    assert_same(take(resumed, 10), uninterrupted)
    assert resumed.get_state() == batches.get_state()


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_together_read_the_batch_of_one(processes):
    whole = take(train_iterator(corpus(), CONFIG), 5)
    parts = [
        take(train_iterator(corpus(), CONFIG, index, processes), 5) for index in range(processes)
    ]
    joined = [
        {name: np.concatenate([part[step][name] for part in parts]) for name in whole[step]}
        for step in range(5)
    ]
    assert_same(joined, whole)


def test_the_seed_decides():
    one, same = (take(train_iterator(corpus(), CONFIG), 3) for _ in range(2))
    other = take(train_iterator(corpus(), replace(CONFIG, seed=8)), 3)
    assert_same(one, same)
    assert not np.array_equal(one[0]["tokens"], other[0]["tokens"])


def test_training_batches_are_full_and_decode_to_the_corpus():
    batch = take(train_iterator(corpus(), CONFIG), 1)[0]
    assert batch["tokens"].shape == (8, 16)
    assert (batch["segment_ids"] > 0).all()
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    train = corpus().train.tokens.astype(np.int32)
    windows = {row.tobytes() for row in np.lib.stride_tricks.sliding_window_view(train, 16)}
    assert all(row.tobytes() in windows for row in batch["tokens"])


def test_evaluation_predicts_everything_once_in_full_batches():
    splits: tuple[Literal["val", "train"], ...] = ("val", "train")
    for split in splits:
        stream = corpus().val if split == "val" else corpus().train
        batches = list(eval_batches(corpus(), CONFIG, split))
        assert len(batches) == eval_batch_count(corpus(), CONFIG, split)
        assert all(batch["tokens"].shape == (8, 16) for batch in batches)
        targets = np.concatenate([batch["targets"][batch["loss_mask"]] for batch in batches])
        np.testing.assert_array_equal(targets, stream.tokens[~stream.is_start])
        assert len(targets) == stream.predicted_tokens


def test_evaluation_over_processes_is_the_same_evaluation():
    whole = list(eval_batches(corpus(), CONFIG))
    halves = [list(eval_batches(corpus(), CONFIG, "val", index, 2)) for index in range(2)]
    joined = [
        {name: np.concatenate([left[name], right[name]]) for name in left}
        for left, right in zip(*halves, strict=True)
    ]
    assert_same(joined, whole)  # pyright: ignore[reportArgumentType]


def test_the_splits_hold_the_whole_corpus_and_share_nothing(tmp_path):
    text = "".join(chr(ord("a") + i % 26) for i in range(1000)) + "é"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    config = DataConfig((str(tmp_path),), tokenizer="chars", seq_len=8, batch_size=2)
    loaded = load_corpus(config)
    assert loaded.split_mode == "contiguous"
    assert loaded.tokenizer.decode(loaded.train.tokens.tolist()) == text[:900]
    assert loaded.tokenizer.decode(loaded.val.tokens.tolist()) == text[900:-1] + "\ufffd"
    assert loaded.train.predicted_bytes == 899
    assert loaded.val.predicted_bytes == 101  # "é" is unknown here, and still two bytes


def test_a_given_tokenizer_is_used():
    tokenizer = corpus().tokenizer
    loaded = load_corpus(replace(CONFIG, tokenizer="chars", val_fraction=1.0), tokenizer)
    assert loaded.tokenizer is tokenizer
    assert len(loaded.train) == 0
    assert loaded.val.text_bytes == 60_000


def test_tiny_corpora_are_refused_with_their_sizes(tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text("abcdefghij" * 2)
    config = DataConfig((str(path),), tokenizer="chars", seq_len=18, batch_size=1)
    with pytest.raises(UserError, match=r"18 tokens \(18 bytes\); a row of seq_len 18 needs 19"):
        load_corpus(config)
    with pytest.raises(UserError, match="validation split has nothing to predict: 1 tokens in 1"):
        load_corpus(replace(config, seq_len=4, val_fraction=0.05))
    with pytest.raises(UserError, match="the validation split is empty"):
        load_corpus(replace(config, seq_len=4, val_fraction=0.001, split="documents"))
    nothing_held_out = load_corpus(replace(config, seq_len=19, val_fraction=0.0))
    with pytest.raises(UserError, match="validation split has nothing to predict: 0 tokens in 0"):
        eval_batches(nothing_held_out, config)
    all_held_out = load_corpus(replace(config, val_fraction=1.0), nothing_held_out.tokenizer)
    with pytest.raises(UserError, match="training split has 0 tokens"):
        train_iterator(all_held_out, config)


def test_a_corpus_of_one_row_trains():
    stream = tokenize(corpus().tokenizer, [Document("héllo " * 40, "a")])
    row = replace(stream, tokens=stream.tokens[:17], is_start=stream.is_start[:17])
    batch = next(train_iterator(replace(corpus(), train=row), CONFIG))
    assert (batch["tokens"] == row.tokens[:16]).all()
    assert (batch["targets"] == row.tokens[1:]).all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seq_len", 0, "data.seq_len is 0; it must be at least 1"),
        ("batch_size", -1, "data.batch_size is -1"),
        ("seed", -1, "data.seed is -1"),
        ("max_bytes", 0, "data.max_bytes is 0"),
        ("val_fraction", 1.1, "data.val_fraction is 1.1; it must lie in 0 to 1"),
        ("val_fraction", float("nan"), "data.val_fraction is nan"),
    ],
)
def test_bad_configs(field, value, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **{field: value})


def test_bad_process_counts():
    with pytest.raises(UserError, match="batch_size 8 is not a multiple of 3 processes"):
        train_iterator(corpus(), CONFIG, 0, 3)
    with pytest.raises(UserError, match="process 2 is not one of 2 processes"):
        eval_batches(corpus(), CONFIG, "val", 2, 2)


def test_generating_text_needs_neither_grain_nor_pyarrow():
    code = (
        "import sys, tpu_stack.data.pipeline, tpu_stack.data.stream_decoder;"
        "sys.exit(bool({'grain', 'pyarrow', 'jax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
