"""The engine against a plain forward pass, alone and in every kind of company."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_model import (
    CONFIG,
    LENGTH,
    PAGE,
    REQUESTS,
    SAMPLED,
    alone,
    ask,
    engine,
    finish,
    parameters,
    programs,
    prompt_of,
    tokens_of,
)

from tpu_stack.models.decoder import forward
from tpu_stack.serving.engine.engine import Engine
from tpu_stack.serving.engine.guess import guess
from tpu_stack.serving.requests import (
    Finished,
    GenerationRequest,
    Restarted,
    SamplingParams,
    Token,
)


def test_greedy_tokens_are_those_of_a_full_pass():
    run = jax.jit(partial(forward, CONFIG))
    for number in (0, 2, 5):
        request = REQUESTS[number]
        tokens = list(request.prompt)
        got = alone(number)
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(tokens) + len(got)] = [*tokens, *got]
        logits = np.asarray(run(parameters(), jnp.asarray(padded)))[0]
        want = logits.argmax(-1)[len(tokens) - 1 : len(tokens) + len(got) - 1]
        assert list(got) == want.tolist()
    assert len(set(alone(5))) > 5, "the outputs are too alike to tell requests apart"


def test_the_window_ends_a_sequence():
    assert len(alone(5)) == LENGTH - 200


@pytest.mark.parametrize("order", [1, -1])
def test_a_request_is_the_same_alone_and_in_a_mix(order):
    target = engine()
    asked = {}
    for number in range(len(REQUESTS))[::order]:
        asked[number] = ask(target, REQUESTS[number])[1]
        target.step()
    finish(target)
    for number, events in asked.items():
        assert tuple(tokens_of(events)) == alone(number), number


@pytest.mark.parametrize(
    "cache_dtype",
    ["float32", *(pytest.param(d, marks=pytest.mark.slow) for d in ("int8", "float8_e4m3fn"))],
)
def test_sequences_that_are_preempted_come_back_as_they_were(cache_dtype):
    roomy, tight = engine(128, cache_dtype), engine(20, cache_dtype)
    answers = []
    growing = [
        GenerationRequest(prompt_of(9 * n + 2, n), 100, sampling=sampling)
        for n, sampling in enumerate([SamplingParams(), SAMPLED] * 4)
    ]
    for target in (roomy, tight):
        asked = [ask(target, request)[1] for request in growing]
        finish(target)
        answers.append([tokens_of(events) for events in asked])
    assert answers[0] == answers[1]
    assert roomy.stats().preempted == 0
    assert tight.stats().preempted > 0


def test_a_shared_prefix_is_computed_once():
    """Two requests at once and one later: the first's whole pages serve all three."""
    target = engine()
    prefix = prompt_of(200, seed=1)
    prompts = [(*prefix, *prompt_of(9, seed=n)) for n in range(3)]
    first = [ask(target, GenerationRequest(prompt, 4)) for prompt in prompts[:2]]
    finish(target)
    later = ask(target, GenerationRequest(prompts[2], 4))
    finish(target)
    whole = 200 // PAGE * PAGE
    assert [sequence.cached for sequence, _ in (*first, later)] == [0, whole, whole]
    assert target.stats().cached_prompt_tokens == 2 * whole
    for prompt, (_, events) in zip(prompts, (*first, later), strict=True):
        fresh = engine()
        _, want = ask(fresh, GenerationRequest(prompt, 4))
        finish(fresh)
        assert tokens_of(events) == tokens_of(want)


def test_a_prefix_whose_owner_leaves_is_computed_by_the_next():
    target = engine()
    prompt = prompt_of(200, seed=1)
    owner, owner_events = ask(target, GenerationRequest(prompt, 4))
    _, events = ask(target, GenerationRequest(prompt, 4))
    target.step()
    target.cancel(owner)
    finish(target)
    assert owner_events[-1].reason == "cancelled"
    fresh = engine()
    _, want = ask(fresh, GenerationRequest(prompt, 4))
    finish(fresh)
    assert tokens_of(events) == tokens_of(want)


def test_cancelled_anywhere_nothing_leaks():
    target = engine(20)
    rng = np.random.default_rng(0)
    asked = [ask(target, request) for request in REQUESTS * 3]
    for sequence, _ in asked:
        for _ in range(int(rng.integers(0, 4))):
            target.step()
        if rng.random() < 0.4:
            target.cancel(asked[int(rng.integers(len(asked)))][0])
            target.cancel(sequence)
    finish(target)
    reasons = [events[-1].reason for _, events in asked]
    assert {"cancelled", "length"} == set(reasons)
    assert sum(target.stats().finished.values()) == len(asked)
    for number, (_, events) in enumerate(asked):
        if events[-1].reason == "length":
            assert tuple(tokens_of(events)) == alone(number % len(REQUESTS))


def test_deadlines_pass_for_the_waiting_and_the_running():
    target = engine()
    late = GenerationRequest(prompt_of(5, 0), 200, deadline_s=1e-6)
    asked = [ask(target, late)[1] for _ in range(3)]
    finish(target)
    assert [events[-1].reason for events in asked] == ["deadline"] * 3


def test_stop_tokens_end_the_output_and_are_not_part_of_it():
    output = alone(2)
    stop = output[5]
    request = dataclasses.replace(REQUESTS[2], stop_tokens=frozenset({stop}))
    target = engine()
    _, events = ask(target, request)
    finish(target)
    assert tuple(tokens_of(events)) == output[: output.index(stop)]
    assert events[-1].reason == "stop"


def test_lower_priority_numbers_go_first_and_make_others_wait():
    target = engine()
    slow = [ask(target, GenerationRequest(prompt_of(5, n), 100, priority=5))[1] for n in range(8)]
    for _ in range(5):
        target.step()
    _, urgent = ask(target, GenerationRequest(prompt_of(6, 9), 3, priority=0))
    for _ in range(12):
        target.step()
    assert isinstance(urgent[-1], Finished)
    assert not any(isinstance(events[-1], Finished) for events in slow)
    finish(target)
    assert all(len(tokens_of(events)) == 100 for events in slow)


def test_clients_share_the_engine_fairly():
    """A client with 30 requests does not keep one with two waiting until they are done."""
    target = engine()
    greedy = [
        ask(target, GenerationRequest(prompt_of(5, n), 12, client="many"))[1] for n in range(30)
    ]
    few = [ask(target, GenerationRequest(prompt_of(7, n), 12, client="few"))[1] for n in range(2)]
    while not all(events and isinstance(events[-1], Finished) for events in few):
        target.step()
    done = sum(bool(events) and isinstance(events[-1], Finished) for events in greedy)
    assert done <= 16
    finish(target)


def test_log_probabilities_are_the_models_own():
    request = dataclasses.replace(
        REQUESTS[2], sampling=SamplingParams(logprobs=3, logit_bias={7: 2.0}), max_tokens=6
    )
    target = engine()
    _, events = ask(target, request)
    finish(target)
    tokens = tokens_of(events)
    full = jnp.asarray([[*request.prompt, *tokens]])
    logprobs = np.asarray(jax.nn.log_softmax(forward(CONFIG, parameters(), full)[0]))
    for step, event in enumerate(event for event in events if isinstance(event, Token)):
        row = logprobs[len(request.prompt) - 1 + step]
        np.testing.assert_allclose(event.logprob or 0.0, row[event.token], atol=1e-4)
        assert [token for token, _ in event.top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([p for _, p in event.top], np.sort(row)[::-1][:3], atol=1e-4)


@pytest.mark.parametrize("in_flight", ["finish", "restart"])
def test_new_weights_take_over_between_two_steps(in_flight):
    target = engine()
    _, before = ask(target, REQUESTS[2])
    for _ in range(6):
        target.step()
    new = parameters(1)
    target.load(new, in_flight)
    _, after = ask(target, REQUESTS[2])
    finish(target)
    fresh = Engine(programs(), new)
    _, want = ask(fresh, REQUESTS[2])
    finish(fresh)
    assert tokens_of(after) == tokens_of(want)
    assert target.stats().generation == 1
    if in_flight == "finish":
        assert tuple(tokens_of(before)) == alone(2)
    else:
        restart = next(n for n, event in enumerate(before) if isinstance(event, Restarted))
        assert tokens_of(before[restart:]) == tokens_of(want)
    assert tokens_of(want) != list(alone(2))


@pytest.mark.parametrize("pages", [24, pytest.param(128, marks=pytest.mark.slow)])
def test_guessing_changes_no_token_of_any_request(pages):
    """Greedy or sampled, with penalties or biases: seed for seed the same, in fewer steps."""
    target = Engine(programs(pages, "float32", 3), parameters())
    asked = [ask(target, request)[1] for request in REQUESTS]
    finish(target)
    for number, events in enumerate(asked):
        assert tuple(tokens_of(events)) == alone(number), number
    stats = target.stats()
    assert 0 < stats.accepted < stats.drafted


def test_guesses_are_what_followed_the_last_time():
    history = jnp.array([[5, 6, 7, 8, 5, 6, 9, 5, 6, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]])
    got = guess(history, jnp.array([8, 8]), 3)
    np.testing.assert_array_equal(got, [[9, 5, 6], [-1, -1, -1]])
    np.testing.assert_array_equal(guess(history, jnp.array([5, 0]), 3), [[7, 8, 5], [-1, -1, -1]])


def test_preempted_sequences_finish_on_the_weights_they_began_with():
    """On 20 pages some are out when the weights come; they come back before anybody new."""
    requests = [GenerationRequest(prompt_of(5, n), 100) for n in range(8)]
    target, want = engine(20), []
    for request in requests:
        want.append(ask(target, request)[1])
    finish(target)
    target = engine(20)
    asked = [ask(target, request)[1] for request in requests]
    while not target.stats().preempted:
        target.step()
    target.load(parameters(1), "finish")
    _, after = ask(target, dataclasses.replace(requests[0], priority=-1))
    finish(target)
    assert [tokens_of(events) for events in asked] == [tokens_of(events) for events in want]
    assert tokens_of(after) != tokens_of(want[0])
    assert target.stats().generation == 1
