"""Sampling against NumPy: which tokens survive truncation, how often each comes, and from what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_stack.errors import UserError
from tpu_stack.serving.engine.sampling import SamplingRows, choose, truncate
from tpu_stack.serving.requests import GenerationRequest, SamplingParams

VOCAB = 40
cut, draw = jax.jit(truncate), jax.jit(choose)
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


def test_the_likeliest_token_always_survives():
    one = jnp.asarray([1e-9])
    found = cut(jnp.asarray([[0.0, 3.0, 1.0]]), jnp.asarray([0]), one, jnp.asarray([0.0]))
    assert np.flatnonzero(np.asarray(found[0]) > -1e29).tolist() == [1]


def chosen(logits, params: list[SamplingParams], positions) -> np.ndarray:
    """One token of every row, [B], with no output and no prompt so far."""
    logits = jnp.asarray(logits, jnp.float32)
    none = jnp.zeros(logits.shape, jnp.int32)
    rows = SamplingRows.of(params, logits.shape[1])
    every = jnp.ones(len(params), bool)
    return np.asarray(draw(logits, rows, none, none > 0, jnp.asarray(positions), every).tokens)


def many(logits, count: int, *, seed: int = 0, position: int = 0, **options) -> np.ndarray:
    """`count` draws from one row of logits; row b is seeded with `seed + b`."""
    params = [SamplingParams(seed=seed + row, **options) for row in range(count)]
    return chosen(np.tile(logits, (count, 1)), params, np.full(count, position, np.int32))


def test_temperature_zero_is_argmax():
    logits = np.random.default_rng(0).standard_normal((16, 40)).astype(np.float32)
    logits[3, [5, 9]] = 10.0  # a tie goes to the first
    logits[4] = 0.0
    found = chosen(logits, [SamplingParams()] * 16, np.arange(16))
    np.testing.assert_array_equal(found, logits.argmax(axis=-1))
    assert found.dtype == np.int32
    assert (int(found[3]), int(found[4])) == (5, 0)


def test_rows_have_their_own_parameters():
    """A greedy row, one that keeps a single token, and a free one, in one batch."""
    logits = np.tile(np.linspace(0, 1, 50), (3, 1))
    params = [
        SamplingParams(seed=1),
        SamplingParams(temperature=5.0, top_k=1, seed=2),
        SamplingParams(temperature=5.0, seed=3),
    ]
    seen = np.stack([chosen(logits, params, np.full(3, step, np.int32)) for step in range(60)])
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
    later = many(logits, 64, temperature=1.0, seed=7, position=1)
    assert (later != first).mean() > 0.9


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
    found, _ = kept_by_numpy(logits / temperature, top_k, top_p, 0.0)
    kept = sorted(found)
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
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2**31}, "top_k is 2147483648"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_parameters_out_of_range(options, said):
    with pytest.raises(UserError, match=said):
        SamplingParams(**options)


def test_requests_without_tokens():
    with pytest.raises(UserError, match="max_tokens is 0"):
        GenerationRequest((1,), max_tokens=0)
    with pytest.raises(UserError, match="prompt"):
        GenerationRequest(())
    with pytest.raises(UserError, match=r"max_tokens is 2\.5; it must be a whole number"):
        GenerationRequest((1,), max_tokens=2.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="temperature is hot; it must be a number"):
        SamplingParams(temperature="hot")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a token of the prompt is 2\.5"):
        GenerationRequest((1, 2.5))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="sequence to score is 1; it must be at least two"):
        GenerationRequest((1,), max_tokens=0, score_from=1)
