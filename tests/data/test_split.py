"""Held-out text: stable by name, exact by position, and never silently empty."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_stack.data.sources import Document
from tpu_stack.data.split import limit_bytes, split_documents
from tpu_stack.errors import UserError


def make_documents(count: int) -> list[Document]:
    return [Document(f"text {i} é" * (1 + i % 3), f"d{i}.txt") for i in range(count)]


def test_documents_keep_their_side_when_others_are_added():
    few, many = make_documents(200), make_documents(400)
    small = split_documents(few, 0.2, "documents")
    large = split_documents(many, 0.2, "documents")
    assert set(small.val) == set(large.val) & set(few)
    assert set(small.train) | set(small.val) == set(few)
    assert 0.12 < len(large.val) / 400 < 0.28  # four standard deviations of a binomial


def test_the_split_is_the_same_on_every_machine():
    held_out = split_documents(make_documents(30), 0.1, "documents").val
    assert [document.name for document in held_out] == ["d0.txt", "d2.txt", "d16.txt", "d17.txt"]


@given(st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=8), st.floats(0.0, 1.0))
def test_contiguous_cuts_the_concatenated_text(texts, fraction):
    documents = [Document(text, f"{i}") for i, text in enumerate(texts)]
    whole = "".join(texts)
    cut = int(len(whole) * (1.0 - fraction))
    try:
        parts = split_documents(documents, fraction, "contiguous")
    except UserError:
        assert 0.0 < fraction < 1.0
        assert cut in (0, len(whole))
        return
    assert "".join(d.text for d in parts.train) == whole[:cut]
    assert "".join(d.text for d in parts.val) == whole[cut:]
    assert all(d.text for d in parts.train + parts.val)


def test_auto_cuts_a_single_file_and_separates_many():
    assert split_documents([Document("a" * 100, "a.txt")], 0.1, "auto").mode == "contiguous"
    assert split_documents(make_documents(19), 0.2, "auto").mode == "contiguous"
    assert split_documents(make_documents(100), 0.2, "auto").mode == "documents"


def test_all_or_nothing_may_be_held_out():
    documents = make_documents(30)
    for mode in ("auto", "documents", "contiguous"):
        assert split_documents(documents, 0.0, mode).val == ()
        assert split_documents(documents, 1.0, mode).train == ()


def test_bad_splits():
    with pytest.raises(UserError, match=r"fraction is 1\.5; it must lie in 0 to 1"):
        split_documents(make_documents(3), 1.5)
    with pytest.raises(UserError, match="unknown split 'random'"):
        split_documents(make_documents(3), 0.5, "random")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"validation split is empty: a documents split .* 1 doc"):
        split_documents(make_documents(1), 0.01, "documents")
    with pytest.raises(UserError, match="training split is empty"):
        split_documents([Document("a", "a")], 0.5, "contiguous")


@given(st.integers(1, 400), st.integers(0, 3))
def test_limit_fills_the_budget_in_corpus_order(budget, seed):
    documents = make_documents(12)
    chosen = limit_bytes(documents, budget, seed)
    names = [d.name for d in documents]
    order = [names.index(d.name) for d in chosen]
    assert order == sorted(set(order))
    assert all(documents[names.index(d.name)].text.startswith(d.text) for d in chosen)
    total = sum(len(d.text.encode()) for d in documents)
    used = sum(len(d.text.encode()) for d in chosen)
    assert min(budget, total) - 1 <= used <= budget  # one byte short where "é" would be halved


def test_limit_depends_on_the_seed_alone():
    documents = make_documents(50)
    assert limit_bytes(documents, 200, 1) == limit_bytes(documents, 200, 1)
    assert limit_bytes(documents, 200, 1) != limit_bytes(documents, 200, 2)
    assert limit_bytes(documents, 10**9, 1) == documents
    with pytest.raises(UserError, match="max_bytes is 0; it must be positive"):
        limit_bytes(documents, 0, 1)
