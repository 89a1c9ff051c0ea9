"""Rollouts and scores: log-probabilities beside `models.forward`, generations across a load."""

import dataclasses
import threading
import time
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving_model import MODEL, serving

from tpu_stack.errors import UserError
from tpu_stack.models.decoder import forward, init_params
from tpu_stack.models.per_layer import per_layer
from tpu_stack.serving.bench.random_weights import random_params
from tpu_stack.serving.client import Completions, rollout, score
from tpu_stack.serving.engine.build import start_service
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.serving.requests import GenerationRequest, SamplingParams
from tpu_stack.serving.service import Service
from tpu_stack.sharding.profiles import Precision

PROMPTS = [(5, 9, 33, 2, 41), tuple((3 * i + 1) % 64 for i in range(40)), (7,)]
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=4.0, top_k=12, top_p=0.9, min_p=0.01, seed=3)
ADJUSTED = dataclasses.replace(
    SAMPLED,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    logit_bias={3: 2.0},
)


@cache
def weights(seed: int = 0):
    # Large weights make sharp choices: the outputs of two generations then differ.
    return per_layer(jax.tree.map(lambda x: 3 * x, init_params(MODEL, jax.random.key(seed))))


@cache
def placement(dtype: str = "float32"):
    profile, mesh = serving("data=1")
    return dataclasses.replace(profile, precision=Precision(dtype, dtype, dtype)), mesh


def started(params, dtype: str = "float32", **sizes) -> Service:
    options = EngineOptions(**{"max_length": 128, "page": 16, **sizes})
    return start_service(MODEL, params, *placement(dtype), options, warm_up=False)


@pytest.fixture(scope="module")
def service():
    built = started(weights(), queue=6)
    yield built
    built.close()


def requests(sampling: SamplingParams, max_tokens: int = 12) -> list[GenerationRequest]:
    return [GenerationRequest(prompt, max_tokens, sampling) for prompt in PROMPTS]


@cache
def run_on(dtype: str):
    return jax.jit(partial(forward, MODEL, dtype=dtype))


def logits_of(params, prompt, tokens, dtype: str = "float32") -> np.ndarray:
    """[tokens, V], float64: what the model says before each of `tokens`."""
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
    found = np.asarray(run_on(dtype)(params, jnp.asarray(padded)), np.float64)[0]
    return found[len(prompt) - 1 : len(prompt) + len(tokens) - 1]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def sampling_distribution(logits_V, sampling: SamplingParams, prompt, output) -> np.ndarray:
    """Log-probabilities that a token is drawn with, in float64; -inf for those cut off."""
    x = logits_V.copy()
    for token, bias in sampling.logit_bias.items():
        x[token] += bias
    counts = np.bincount(np.array(output, int), minlength=len(x))
    seen = (counts > 0) | (np.bincount(np.array(prompt, int), minlength=len(x)) > 0)
    r = sampling.repetition_penalty
    x = np.where(seen, np.where(x > 0, x / r, x * r), x)
    x -= sampling.presence_penalty * (counts > 0) + sampling.frequency_penalty * counts
    x /= sampling.temperature
    order = np.argsort(-x)[: sampling.top_k or len(x)]
    mass = np.exp(log_softmax(x[order]))
    kept = order[np.cumsum(mass) - mass < sampling.top_p]
    kept = kept[x[kept] >= x.max() + np.log(max(sampling.min_p, 1e-300))]
    found = np.full(len(x), -np.inf)
    found[kept] = log_softmax(x[kept])
    return found


def rounding(logits: np.ndarray) -> float:
    """What two orders of float32 additions may differ by in these logits: as for any pass through
    pages (tests/models/test_paged_cache.py), some hundred roundings of 2**-24 of the largest."""
    return 2e-5 * float(np.abs(logits).max())


def assert_own_logprobs(params, prompt, tokens, logprobs: np.ndarray) -> None:
    """`logprobs` are those of `forward` for `tokens` after `prompt`."""
    logits = logits_of(params, prompt, tokens)
    want = log_softmax(logits)[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(logprobs[: len(tokens)], want, rtol=0, atol=rounding(logits))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, ADJUSTED], ids=["greedy", "cut", "adjusted"])
def test_log_probabilities_are_those_of_a_full_pass(service, sampling):
    found = rollout(service, requests(sampling))
    assert found.finish_reasons == ("length",) * 3
    assert found.mask.all()
    for row, tokens in enumerate(found.rows()):
        assert_own_logprobs(weights(), PROMPTS[row], tokens, found.model_logprobs[row])
        logits = logits_of(weights(), PROMPTS[row], tokens)
        for t, token in enumerate(tokens):
            if sampling.temperature:
                want = sampling_distribution(logits[t], sampling, PROMPTS[row], tokens[:t])[token]
            else:
                assert token == logits[t].argmax()
                want = 0.0
            close = rounding(logits) * (1 + 1 / (sampling.temperature or 1))
            np.testing.assert_allclose(found.logprobs[row, t], want, rtol=0, atol=close)


@pytest.mark.parametrize("format", ["float32", "bf16", "int8", "int4"])
def test_log_probabilities_in_every_format(format):
    """float32 activations on weights in the format: both passes read the same weights, and only the
    order of float32 additions differs. experiments/rollout.py states the differences."""
    params = random_params(MODEL, format, *placement())
    service = started(params)
    found = rollout(service, requests(SAMPLED))
    service.close()
    for row, tokens in enumerate(found.rows()):
        assert_own_logprobs(params, PROMPTS[row], tokens, found.model_logprobs[row])


def test_samples_of_a_prompt_share_it_and_differ(service):
    prompt = PROMPTS[1]
    before = service.stats()
    group = rollout(service, [GenerationRequest(prompt, 8, SAMPLED)], samples=6)
    after = service.stats()
    assert len(set(group.rows())) > 1
    assert after.prompt_tokens - before.prompt_tokens == 6 * len(prompt)
    shared = len(prompt) // 16 * 16
    assert after.cached_prompt_tokens - before.cached_prompt_tokens >= 5 * shared
    again = rollout(service, [GenerationRequest(prompt, 8, SAMPLED)], samples=6)
    assert list(again.rows()) == list(group.rows())
    fourth = dataclasses.replace(SAMPLED, seed=SAMPLED.seed + 3)
    alone = rollout(service, [GenerationRequest(prompt, 8, fourth)])
    assert next(alone.rows()) == list(group.rows())[3]


def test_more_requests_than_the_queue_takes(service):
    """The engine queues 6; 60 rows come back in order."""
    many = [GenerationRequest((token,), 1 + token % 3) for token in range(60)]
    found = rollout(service, many)
    assert found.tokens.shape == (60, 3)
    np.testing.assert_array_equal(found.lengths, [1 + token % 3 for token in range(60)])
    assert (found.generations[~found.mask] == -1).all()
    assert (found.tokens[~found.mask] == 0).all()


def test_a_stop_token_is_part_of_its_completion(service):
    whole = next(rollout(service, requests(GREEDY)[:1]).rows())
    stop = whole[4]
    request = dataclasses.replace(requests(GREEDY)[0], stop_tokens=frozenset({stop}))
    found = rollout(service, [request])
    assert next(found.rows()) == whole[: whole.index(stop) + 1]
    assert found.finish_reasons == ("stop",)


def test_scores_are_those_of_a_full_pass(service):
    """Sequences longer than a chunk, from the first token, from the middle, and the last alone."""
    rng = np.random.default_rng(0)
    sequences = [tuple(rng.integers(0, 64, size).tolist()) for size in (2, 70, 128, 40)]
    starts = [1, 1, 30, 39]
    found = score(service, sequences, start=starts)
    np.testing.assert_array_equal(found.lengths, [1, 69, 98, 1])
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        tokens = sequence[start:]
        assert_own_logprobs(weights(), sequence[:start], tokens, found.logprobs[row])
        assert not found.logprobs[row, len(tokens) :].any()


def test_a_rollout_scores_as_it_was_drawn(service):
    """The same weights: scoring gives the model's own log-probabilities of the rollout back, and
    computes the prompt that the samples share once."""
    prompt = PROMPTS[1]
    group = rollout(service, [GenerationRequest(prompt, 8, SAMPLED)], samples=4)
    before = service.stats().cached_prompt_tokens
    found = score(service, [(*prompt, *row) for row in group.rows()], start=len(prompt))
    for row, tokens in enumerate(group.rows()):
        assert_own_logprobs(weights(), prompt, tokens, found.logprobs[row])
        assert_own_logprobs(weights(), prompt, tokens, group.model_logprobs[row])
    assert service.stats().cached_prompt_tokens - before == 4 * ((len(prompt) - 1) // 16 * 16)


@pytest.mark.parametrize(
    ("sequence", "start", "said"),
    [
        ((1, 2), 0, "score_from is 0"),
        ((1, 2), 2, "score_from is 2"),
        ((1,) * 129, 1, "at most 128"),
    ],
)
def test_sequences_that_cannot_be_scored_are_named(service, sequence, start, said):
    with pytest.raises(UserError, match=said):
        score(service, [sequence], start=start)


def test_what_an_engine_cannot_serve_cancels_the_rest(service):
    bad = GenerationRequest((64,), 4)
    with pytest.raises(UserError, match="a token of the prompt is 64"):
        rollout(service, [*requests(GREEDY, 80), bad])
    deadline = time.monotonic() + 60
    while service.stats().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.stats().running == 0


@pytest.mark.parametrize("in_flight", ["finish", "restart"])
def test_each_token_has_the_generation_of_its_weights(in_flight):
    """Weights come while half of the rows decode and the others wait: every row's log-probabilities
    are those of the weights that its generation names."""
    service = started(weights(), slots=8, queue=64)
    many = [GenerationRequest(PROMPTS[0], 40, SAMPLED)] * 16
    found: list[Completions] = []
    caller = threading.Thread(target=lambda: found.append(rollout(service, many)))
    caller.start()
    while service.stats().new_tokens < 40:
        time.sleep(0.001)
    live = service.load(weights(1), in_flight)
    assert live.result(timeout=120) == 1
    caller.join()
    assert service.stats().generation == 1
    service.close()
    generations = found[0].generations
    rows = generations[:, 0]
    assert (generations == rows[:, None]).all()
    assert set(rows.tolist()) == ({0, 1} if in_flight == "finish" else {1})
    for row, tokens in enumerate(found[0].rows()):
        own = found[0].model_logprobs[row]
        assert_own_logprobs(weights(int(rows[row])), PROMPTS[0], tokens, own)


def test_weights_that_never_go_live_say_so():
    service = started(weights(), slots=8)
    service.submit(GenerationRequest((1,), 120), lambda event: None)
    first, second = service.load(weights(1)), service.load(weights(1))
    with pytest.raises(UserError, match="other weights were loaded"):
        first.result(timeout=60)
    assert second.result(timeout=120) == 1
    service.submit(GenerationRequest((1,), 120), lambda event: None)
    last = service.load(weights(), "finish")
    service.close()
    with pytest.raises(UserError, match="closed"):
        last.result(timeout=60)
    with pytest.raises(UserError, match="shutting down"):
        service.load(weights())
    with pytest.raises(UserError, match="shutting down"):
        service.between_steps(lambda engine: engine.stats())  # type: ignore[attr-defined]


def test_an_engine_closed_meanwhile_gives_no_half_rows():
    service = started(weights(), slots=8)

    def close_once_it_decodes() -> None:
        while service.stats().new_tokens < 4:
            time.sleep(0.001)
        service.close()

    closing = threading.Thread(target=close_once_it_decodes)
    closing.start()
    with pytest.raises(RuntimeError, match="closed"):
        rollout(service, [GenerationRequest((1,), 120)] * 4)
    closing.join()
