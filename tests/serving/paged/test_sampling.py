"""What rows' `top_k`, `top_p` and `min_p` keep, beside float64, whatever other rows ask for."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_stack.serving.paged.sampling import truncate

VOCAB = 40
cut = jax.jit(truncate)
ROW = st.tuples(
    st.sampled_from([0, 1, 3, 12, VOCAB, 10**6]),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.0, 0.3]),
)


def kept_by_numpy(logits, top_k, top_p, min_p):
    """Tokens that survive, in float64; no two logits are equal."""
    x = logits.astype(np.float64)
    order = np.argsort(-x)[: top_k or VOCAB]
    mass = np.exp(x[order] - x.max())
    mass /= mass.sum()
    before = np.cumsum(mass) - mass
    found = {int(token) for token, b in zip(order, before, strict=True) if b < top_p}
    return {token for token in found if x[token] >= x.max() + np.log(max(min_p, 1e-300))}, before


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(0, 10**6), st.lists(ROW, min_size=3, max_size=3))
def test_each_row_keeps_what_it_asks_for(seed, rows):
    rng = np.random.default_rng(seed)
    logits = np.stack([rng.permutation(np.linspace(-6, 6, VOCAB)) for _ in rows]).astype(np.float32)
    top_k, top_p, min_p = (np.asarray(each) for each in zip(*rows, strict=True))
    found = np.asarray(
        cut(
            jnp.asarray(logits),
            jnp.asarray(top_k, jnp.int32),
            jnp.asarray(top_p, jnp.float32),
            jnp.asarray(min_p, jnp.float32),
        )
    )
    for row, (k, p, least) in enumerate(rows):
        want, before = kept_by_numpy(logits[row], k, p, least)
        if np.abs(before - p).min() < 1e-5:  # float32 and float64 may disagree at an edge
            continue
        kept = set(np.flatnonzero(found[row] > -1e29).tolist())
        assert kept == want
        np.testing.assert_array_equal(found[row][list(kept)], logits[row][list(kept)])


def test_tokens_tied_with_the_last_are_kept():
    logits = jnp.asarray([[2.0, 1.0, 1.0, 0.0]])
    found = cut(logits, jnp.asarray([2]), jnp.asarray([1.0]), jnp.asarray([0.0]))
    assert (np.asarray(found[0]) > -1e29).tolist() == [True, True, True, False]
