"""Sampling against NumPy: which tokens survive truncation, how often each comes, and from what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_stack.errors import UserError
from tpu_stack.serving.generate import Request
from tpu_stack.serving.sampler import Sampling, _truncated, sample

draw = jax.jit(sample)
truncated = jax.jit(_truncated)


def many(logits: np.ndarray, count: int, **options) -> np.ndarray:
    """`count` draws from one row of logits, every one with a seed of its own."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.asarray(draw(rows, Sampling.of(count, **options), jnp.zeros(count, jnp.int32)))


def test_temperature_zero_is_argmax():
    logits = np.random.default_rng(0).standard_normal((16, 40)).astype(np.float32)
    logits[3, [5, 9]] = 10.0  # a tie goes to the first
    logits[4] = 0.0
    found = draw(jnp.asarray(logits), Sampling.of(16), jnp.arange(16))
    np.testing.assert_array_equal(found, logits.argmax(axis=-1))
    assert found.dtype == jnp.int32
    assert (int(found[3]), int(found[4])) == (5, 0)


def test_rows_have_their_own_parameters():
    """A greedy row, one that keeps a single token, and a free one, in one batch."""
    logits = jnp.asarray(np.tile(np.linspace(0, 1, 50), (3, 1)), jnp.float32)
    sampling = Sampling(
        jnp.array([0.0, 5.0, 5.0]),
        jnp.array([0, 1, 0]),
        jnp.array([1.0, 1.0, 1.0]),
        jnp.array([1, 2, 3], jnp.uint32),
    )
    seen = np.stack([draw(logits, sampling, jnp.full(3, step)) for step in range(60)])
    assert set(seen[:, 0]) == set(seen[:, 1]) == {49}
    assert len(set(seen[:, 2])) > 20  # 60 nearly uniform draws of 50 hit 35 on average


def test_draws_are_those_of_the_seed_and_the_position():
    logits = np.zeros(1000)
    first = many(logits, 64, temperature=1.0, seed=7)
    np.testing.assert_array_equal(many(logits, 64, temperature=1.0, seed=7), first)
    assert (many(logits, 64, temperature=1.0, seed=1007) != first).mean() > 0.9
    # Row b is seeded with seed + b, so a shifted seed shifts the rows: rows do not interact.
    np.testing.assert_array_equal(many(logits, 64, temperature=1.0, seed=17)[:-10], first[10:])
    np.testing.assert_array_equal(many(logits, 8, temperature=1.0, seed=7), first[:8])
    rows = jnp.zeros((64, 1000))
    later = draw(rows, Sampling.of(64, temperature=1.0, seed=7), jnp.ones(64, jnp.int32))
    assert (np.asarray(later) != first).mean() > 0.9


def kept_by_numpy(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Tokens that survive: the first `top_k` by rank whose predecessors' mass is under `top_p`."""
    order = np.argsort(-logits)
    mass = np.exp(logits - logits.max())
    mass = (mass / mass.sum())[order]
    before = np.concatenate([[0.0], np.cumsum(mass)[:-1]])
    count = top_k or len(logits)
    return {int(t) for rank, t in enumerate(order) if rank < count and before[rank] < top_p}


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 10**6), top_k=st.integers(0, 12), top_p=st.floats(0.01, 1.0))
def test_truncation_keeps_what_numpy_keeps(seed, top_k, top_p):
    logits = np.random.default_rng(seed).permutation(np.linspace(-3, 3, 12)).astype(np.float32)
    mass = np.sort(np.exp(logits - logits.max()).astype(np.float64))[::-1]
    edges = np.cumsum(mass / mass.sum())
    if np.abs(edges - top_p).min() < 1e-5:  # float32 and float64 may disagree at an edge
        return
    found = np.asarray(truncated(jnp.asarray(logits), top_k, top_p))
    kept = set(np.flatnonzero(found > -1e29).tolist())
    assert kept == kept_by_numpy(logits.astype(np.float64), top_k, top_p)
    np.testing.assert_array_equal(found[list(kept)], logits[list(kept)])


def test_the_likeliest_token_always_survives():
    logits = jnp.asarray([0.0, 3.0, 1.0])
    found = truncated(logits, 0, 1e-9)
    assert np.flatnonzero(np.asarray(found) > -1e29).tolist() == [1]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.8)]
)
def test_frequencies_are_the_softmax(temperature, top_k, top_p):
    """Chi-square of 20,000 draws over the surviving tokens; others must never come.

    The statistic has mean df and variance 2 df: five standard deviations above the mean is a one
    in a million event for the right distribution, and the seeds are fixed.
    """
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5])
    count = 20_000
    drawn = many(logits, count, temperature=temperature, top_k=top_k, top_p=top_p, seed=5)
    kept = sorted(kept_by_numpy(logits / temperature, top_k, top_p))
    mass = np.exp(logits[kept] / temperature)
    wanted = count * mass / mass.sum()
    seen = np.bincount(drawn, minlength=len(logits))
    assert seen.sum() == seen[kept].sum() == count
    freedom = len(kept) - 1
    statistic = ((seen[kept] - wanted) ** 2 / wanted).sum()
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"temperature": -0.1}, "--temperature is -0.1"),
        ({"top_k": -1}, "--top-k is -1"),
        ({"top_k": 2**31}, "--top-k is 2147483648"),
        ({"top_p": 0.0}, "--top-p is 0.0"),
        ({"top_p": 1.5}, "--top-p is 1.5"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**32}, "--seed is 4294967296"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"temperature": float("inf")}, "--temperature is inf"),
        ({"top_p": float("nan")}, "--top-p is nan"),
    ],
)
def test_requests_out_of_range(options, said):
    with pytest.raises(UserError, match=said):
        Request(**options)
