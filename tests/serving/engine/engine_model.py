"""What the tests of the engine share: a model, its programs, ways to ask and to finish."""

import dataclasses
from functools import cache

import jax
import numpy as np
from serving_model import MODEL, serving

from tpu_stack.models.decoder import init_params
from tpu_stack.models.per_layer import per_layer
from tpu_stack.serving.engine.engine import Engine
from tpu_stack.serving.engine.programs import Programs
from tpu_stack.serving.engine.shapes import Shapes
from tpu_stack.serving.requests import (
    Finished,
    GenerationRequest,
    SamplingParams,
    Token,
)
from tpu_stack.serving.service import Ticket

LENGTH, PAGE = 256, 16
CONFIG = dataclasses.replace(MODEL, max_seq_len=LENGTH)
SAMPLED = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=5)


@cache
def stacked_parameters(seed: int = 0):
    # Large weights make sharp choices: greedy tokens then differ from request to request.
    return jax.tree.map(lambda x: 3 * x, init_params(CONFIG, jax.random.key(seed)))


@cache
def parameters(seed: int = 0):
    """Split into layers, as engines run them."""
    return per_layer(stacked_parameters(seed))


def programs(pages: int = 128, cache_dtype: str = "float32", guesses: int = 0) -> Programs:
    """Compiled once per process, however they are asked for."""
    return _programs(pages, cache_dtype, guesses)


@cache
def _programs(pages: int, cache_dtype: str, guesses: int) -> Programs:
    profile, mesh = serving("tensor=1", float32=True)
    precision = dataclasses.replace(profile.precision, cache=cache_dtype)
    profile = dataclasses.replace(profile, precision=precision)
    shapes = Shapes(8, LENGTH, PAGE, pages, (64, 128), (1, 4), guesses)
    built = Programs(CONFIG, profile, mesh, shapes)
    built.warm_up(parameters())
    return built


def engine(pages: int = 128, cache_dtype: str = "float32") -> Engine:
    return Engine(programs(pages, cache_dtype), parameters())


def ask(target: Engine, request: GenerationRequest):
    """Submits; the list fills with events."""
    events: list = []
    sequence = target.submit(Ticket(next(_numbers), request), events.append)
    return sequence, events


_numbers = iter(range(1, 10**6))


def finish(target: Engine) -> None:
    """Runs until nothing is left, then sees that nothing leaked and nothing was compiled."""
    for _ in range(200_000):
        if not target.step():
            break
    assert not target.running
    assert len(target.queue) == 0
    assert target.pool.available == target.pool.total
    assert target.programs.recompilations == 0


def tokens_of(events: list) -> list[int]:
    assert isinstance(events[-1], Finished)
    return [event.token for event in events if isinstance(event, Token)]


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist())


REQUESTS = [
    GenerationRequest(prompt_of(length, seed=length), max_tokens=new, sampling=sampling)
    for length, new, sampling in (
        (3, 20, SamplingParams()),
        (64, 9, SAMPLED),
        (65, 30, SamplingParams()),
        (130, 40, SAMPLED),
        (16, 1, SamplingParams()),
        (200, 100, SamplingParams()),
        (17, 25, dataclasses.replace(SAMPLED, frequency_penalty=0.7, repetition_penalty=1.3)),
        (90, 12, SamplingParams(logit_bias={3: 4.0})),
        (31, 33, SamplingParams(temperature=1.0, seed=9)),
        (129, 20, SamplingParams(presence_penalty=1.0)),
    )
]


@cache
def alone(number: int) -> tuple[int, ...]:
    """The tokens of REQUESTS[number], asked alone of an engine on one mesh."""
    target = engine()
    _, events = ask(target, REQUESTS[number])
    finish(target)
    return tuple(tokens_of(events))
