"""Attention in chunks of queries, and its masks, against plain formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_stack.models import attention
from tpu_stack.models.attention import Mask, attend


def random_inputs(seed: int, length: int, heads: int = 4, kv_heads: int = 2):
    generator = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(generator.standard_normal((2, length, count, 8)), jnp.float32)
        for count in (heads, kv_heads, kv_heads)
    )
    positions = jnp.broadcast_to(jnp.arange(length), (2, length))
    segments = (positions >= jnp.array([[9], [20]])).astype(jnp.int32)
    return q, k, v, positions, segments


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("spanned", [False, True])
def test_chunks_change_nothing(monkeypatch, window, segmented, spanned):
    """Outputs and gradients of 32 queries in chunks of 8 equal those of all at once."""
    q, k, v, positions, segments = random_inputs(0, 32)
    segments = segments if segmented else None
    spans = (positions % 11 < 4) * (1 + positions // 11) if spanned else None
    mask = Mask(positions, positions, segments, segments, window, spans, spans)

    def loss(q, k, v):
        out = attend(q, k, v, mask, scale=0.3, softcap=6.0)
        return jnp.sum(jnp.sin(out)), out

    whole, whole_grads = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)[::-1]
    monkeypatch.setattr(attention, "CHUNK", 8)
    chunked, chunked_grads = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)[::-1]
    # The same float32 sums; only gradients of keys and values add up in another order.
    chex.assert_trees_all_close(chunked, whole, atol=1e-6)
    chex.assert_trees_all_close(chunked_grads, whole_grads, atol=1e-5)


def test_chunks_are_really_used(monkeypatch):
    """The largest score array of a chunked program holds CHUNK query rows, not T."""
    q, k, v, positions, _ = random_inputs(0, 32)
    monkeypatch.setattr(attention, "CHUNK", 8)
    program = str(
        jax.make_jaxpr(lambda q: attend(q, k, v, Mask(positions, positions), scale=1.0))(q)
    )
    assert "f32[2,2,2,8,32]" in program  # B K G C S
    assert "f32[2,2,2,32,32]" not in program


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_mask_is_the_definition(data):
    """At or before the query and inside the window, or in its span; and in the same document."""
    token = st.tuples(st.integers(0, 12), st.integers(0, 2), st.integers(0, 2))
    queries = data.draw(st.lists(token, min_size=1, max_size=5))
    keys = data.draw(st.lists(token, min_size=1, max_size=5))
    window = data.draw(st.none() | st.integers(1, 6))
    (qp, qs, qb), (kp, ks, kb) = (np.array(rows, np.int32).T[:, None] for rows in (queries, keys))
    with_segments, with_spans = data.draw(st.booleans()), data.draw(st.booleans())
    segments = (qs, ks) if with_segments else (None, None)
    spans = (qb, kb) if with_spans else (None, None)
    mask = Mask(qp, kp, *segments, window, *spans)
    for i, (query, query_segment, query_span) in enumerate(queries):
        for j, (key, key_segment, key_span) in enumerate(keys):
            allowed = key <= query
            allowed &= window is None or query - key < window
            allowed |= with_spans and query_span == key_span and query_span > 0
            allowed &= not with_segments or query_segment == key_segment
            assert bool(mask.dense()[0, i, j]) == allowed


def test_a_query_that_sees_nothing_gets_the_mean():
    q, k, v, positions, _ = random_inputs(3, 6, heads=2, kv_heads=2)
    out = attend(q, k, v, Mask(positions, positions + 100), scale=1.0)
    mean = jnp.broadcast_to(v.mean(axis=1, keepdims=True), out.shape)
    chex.assert_trees_all_close(out, mean, atol=1e-6)
