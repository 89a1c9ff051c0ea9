"""Rows: every token predicted once, nothing crosses a document, padding is inert."""

from functools import cache

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tpu_stack.data.order import RowOrder
from tpu_stack.data.packing import TokenStream, pack_rows, row_count, tokenize
from tpu_stack.data.sources import Document
from tpu_stack.data.tokenizer import Tokenizer, build_tokenizer


@cache
def chars() -> Tokenizer:
    return build_tokenizer("chars", [Document("abcdefgh é", "a")])


def stream_of(lengths: list[int]) -> TokenStream:
    """A stream of documents of the given lengths whose tokens are their own offsets."""
    total = sum(lengths)
    is_start = np.zeros(total, bool)
    is_start[np.cumsum([0, *lengths[:-1]])] = True
    return TokenStream(np.arange(total, dtype=np.uint16), is_start, total, len(lengths))


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 3))
def test_each_token_but_a_documents_first_is_predicted_once(lengths, seq_len, extra_rows):
    stream = stream_of(lengths)
    rows = row_count(stream, seq_len) + extra_rows
    batch = pack_rows(stream, np.arange(rows) * seq_len, seq_len)
    mask = batch["loss_mask"]
    predicted = batch["targets"][mask]
    assert predicted.tolist() == np.flatnonzero(~stream.is_start).tolist()
    assert (batch["tokens"][mask] == predicted - 1).all()
    assert mask.sum() == stream.predicted_tokens


@given(LENGTHS, st.integers(1, 20), st.integers(0, 70))
def test_segments_positions_and_padding(lengths, seq_len, start):
    stream = stream_of(lengths)
    batch = pack_rows(stream, np.array([start]), seq_len)
    document = np.repeat(np.arange(len(lengths)), lengths)
    tokens, segments = batch["tokens"][0], batch["segment_ids"][0]
    real = max(0, min(seq_len, len(stream) - 1 - start))
    assert (segments > 0).tolist() == [True] * real + [False] * (seq_len - real)
    same_segment = segments[:real, None] == segments[None, :real]
    owner = document[tokens[:real]]
    assert (same_segment == (owner[:, None] == owner[None, :])).all()
    begin = np.array([max(start, np.flatnonzero(document == d)[0]) for d in owner], int)
    assert (batch["positions"][0, :real] == tokens[:real] - begin).all()
    assert segments[:real].tolist() == (owner - (owner[0] if real else 0) + 1).tolist()
    for array in batch.values():
        assert not array[0, real:].any()  # pyright: ignore[reportIndexIssue]


def test_batches_have_the_promised_types():
    batch = pack_rows(stream_of([5, 7]), np.array([0, 4]), 4)
    for name, array in batch.items():
        assert isinstance(array, np.ndarray)
        assert array.shape == (2, 4)
        assert array.dtype == (bool if name == "loss_mask" else np.int32)
        assert array.flags.c_contiguous
    assert pack_rows(stream_of([5]), np.zeros(0, np.int64), 4)["tokens"].shape == (0, 4)


def test_a_worked_example():
    documents = [Document("abc", "1"), Document("de", "2")]
    stream = tokenize(chars(), documents)
    a, b, c, d, e = chars().encode("abcde")
    eod = chars().eod_id
    assert stream.tokens.tolist() == [a, b, c, eod, d, e]
    assert stream.tokens.dtype == np.uint16
    assert stream.is_start.tolist() == [True, False, False, False, True, False]
    batch = pack_rows(stream, np.array([0, 3]), 3)
    assert batch["tokens"].tolist() == [[a, b, c], [eod, d, 0]]
    assert batch["targets"].tolist() == [[b, c, eod], [d, e, 0]]
    assert batch["loss_mask"].tolist() == [[True, True, True], [False, True, False]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1], [1, 2, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2], [0, 0, 0]]


@given(st.lists(st.text(alphabet="abé 🙂", min_size=1), min_size=1, max_size=5))
def test_predicted_bytes_are_those_of_all_but_the_first_tokens(texts):
    documents = [Document(text, str(i)) for i, text in enumerate(texts)]
    known = build_tokenizer("chars", documents)
    for tokenizer in (known, chars()):  # the second lacks the emoji: bytes come from the text
        stream = tokenize(tokenizer, documents)
        assert stream.text_bytes == sum(len(text.encode()) for text in texts)
        assert stream.documents == len(texts)
        assert stream.predicted_tokens == sum(map(len, texts)) - 1
    expected = sum(len(text[1:].encode()) for text in texts)
    assert tokenize(known, documents).predicted_bytes == expected


def test_predicted_bytes_sum_over_the_targets_of_an_evaluation():
    documents = [Document("def f(x):\n    return 'é🙂'\n" * 9, "1"), Document("é", "2")]
    tokenizer = build_tokenizer("bpe:300", documents)
    stream = tokenize(tokenizer, documents)
    batch = pack_rows(stream, np.arange(row_count(stream, 8)) * 8, 8)
    targets = batch["targets"][batch["loss_mask"]]
    assert sum(tokenizer.byte_length(int(t)) for t in targets) == stream.predicted_bytes


def test_an_empty_split_has_no_rows():
    stream = tokenize(chars(), [])
    assert (len(stream), stream.predicted_tokens, row_count(stream, 4)) == (0, 0, 0)


@given(st.integers(1, 9), st.integers(1, 60), st.integers(0, 9))
def test_an_epoch_visits_each_row_once_inside_the_stream(seq_len, beyond, seed):
    order = RowOrder(seq_len + beyond, seq_len, seed)
    rows = order.rows_per_epoch
    for epoch in range(3):
        starts = np.sort(order.starts(epoch * rows, rows))
        assert (np.diff(starts) == seq_len).all()
        assert starts[0] == order.offset(epoch) >= 0
        assert starts[-1] + seq_len + 1 <= order.tokens
        unused = order.tokens - 1 - rows * seq_len
        assert unused < 2 * seq_len  # less than a row is lost to the offset, one to the remainder


@given(st.integers(0, 50), st.lists(st.integers(0, 20), max_size=5))
def test_the_order_does_not_depend_on_how_it_is_asked_for(first, counts):
    order = RowOrder(47, 5, seed=3)
    whole = order.starts(first, sum(counts))
    bounds = np.cumsum([first, *counts])
    parts = [order.starts(int(b), c) for b, c in zip(bounds[:-1], counts, strict=True)]
    assert whole.tolist() == [start for part in parts for start in part.tolist()]


def test_epochs_and_seeds_differ_and_the_order_never_changes():
    order = RowOrder(10_000, 64, seed=0)
    rows = order.rows_per_epoch
    first, second = order.starts(0, rows), order.starts(rows, rows)
    assert first.tolist() != second.tolist()
    assert order.offset(0) != order.offset(1)
    assert RowOrder(10_000, 64, seed=1).starts(0, rows).tolist() != first.tolist()
    # Golden: a checkpoint resumes on another machine and another NumPy only while this holds.
    assert first[:6].tolist() == [163, 9443, 7331, 5923, 5347, 5411]
    assert second[:3].tolist() == [6481, 3409, 5585]
