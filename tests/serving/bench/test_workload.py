"""Length mixes and arrivals: what is asked, and when."""

import numpy as np
import pytest

from tpu_stack.errors import UserError
from tpu_stack.serving.bench.workload import LengthMix, arrival_times, make_requests


def ask(text: str, count: int = 400, max_length: int = 4096):
    return make_requests(
        LengthMix.parse(text), count=count, vocab_size=100, max_length=max_length, seed=3
    )


def test_a_mix_is_drawn_by_weight_and_within_its_ranges():
    requests = ask("64:24x3, 512-600:8-16")
    short = [r for r in requests if len(r.prompt) == 64 and r.max_tokens == 24]
    long = [r for r in requests if 512 <= len(r.prompt) <= 600 and 8 <= r.max_tokens <= 16]
    assert len(short) + len(long) == 400
    assert 0.68 < len(short) / 400 < 0.82  # three quarters, give or take three deviations
    assert len({len(r.prompt) for r in long}) > 40  # of 89 lengths, about a hundred draws


def test_a_seed_gives_the_same_requests():
    first, again = ask("16-64:4-8"), ask("16-64:4-8")
    assert [(r.prompt, r.max_tokens) for r in first] == [(r.prompt, r.max_tokens) for r in again]


def test_another_run_has_the_same_lengths_and_no_prompt_of_the_first():
    mix = LengthMix.parse("16-64:4-8")
    runs = [
        make_requests(mix, count=50, vocab_size=100, max_length=4096, seed=3, run=run)
        for run in range(2)
    ]
    first, second = runs
    assert [(len(r.prompt), r.max_tokens) for r in first] == [
        (len(r.prompt), r.max_tokens) for r in second
    ]
    assert not {r.prompt[:8] for r in first} & {r.prompt[:8] for r in second}


def test_prompts_may_be_pieces_of_a_text():
    text = list(range(1000, 1090))
    mix = LengthMix.parse("20-30:4")
    asked = make_requests(mix, count=50, vocab_size=9, max_length=64, seed=0, text=text)
    for request in asked:
        first = request.prompt[0]
        assert list(request.prompt) == list(range(first, first + len(request.prompt)))
    assert len({request.prompt[0] for request in asked}) > 20
    with pytest.raises(UserError, match="--text has 20 tokens; the longest prompt needs 30"):
        make_requests(mix, count=1, vocab_size=9, max_length=64, seed=0, text=text[:20])


@pytest.mark.parametrize("text", ["", "64", "64:", "a:3", "64:24x", "0:4", "9-4:2", "4:0", "4:4x0"])
def test_a_mix_that_does_not_parse_is_named(text):
    with pytest.raises(UserError, match="--lengths"):
        LengthMix.parse(text)


def test_a_mix_beyond_the_window_is_refused():
    with pytest.raises(UserError, match="asks for 130 tokens in one request; the window is 128"):
        ask("100:30", max_length=128)


def test_arrivals_are_a_poisson_process():
    gaps = np.diff([0.0, *arrival_times(count=4000, rate=8.0, seed=0)])
    assert gaps.min() > 0
    # An exponential's mean and deviation are both 1 / rate; 4,000 draws know them to a few percent.
    np.testing.assert_allclose([gaps.mean(), gaps.std()], 1 / 8, rtol=0.08)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_is_not_positive_is_named(rate):
    with pytest.raises(UserError, match="--rate"):
        arrival_times(count=1, rate=rate, seed=0)
