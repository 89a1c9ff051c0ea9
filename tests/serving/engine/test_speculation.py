"""A draft model guesses; the target's tokens stay what they were, greedy and sampled."""

import dataclasses
from functools import cache

import jax
import pytest
from engine_model import CONFIG, LENGTH, PAGE, REQUESTS, alone, ask, finish, parameters, tokens_of
from serving_model import serving

from tpu_stack.errors import UserError
from tpu_stack.models.decoder import init_params
from tpu_stack.models.per_layer import per_layer
from tpu_stack.serving.engine.engine import Engine
from tpu_stack.serving.engine.programs import Programs
from tpu_stack.serving.engine.shapes import Shapes

SMALL = dataclasses.replace(CONFIG, n_layers=1, d_ff=64)
SHAPES = Shapes(8, LENGTH, PAGE, 128, (64, 128), (1, 4), guesses=3)


@cache
def drafted(draft=SMALL, pages: int = 128) -> Programs:
    profile, mesh = serving("tensor=1", float32=True)
    shapes = dataclasses.replace(SHAPES, pages=pages)
    built = Programs(CONFIG, profile, mesh, shapes, draft)
    built.warm_up((parameters(), draft_parameters(draft)))
    return built


def draft_parameters(draft):
    if draft == CONFIG:
        return parameters()
    return per_layer(init_params(draft, jax.random.key(3)))


@pytest.mark.parametrize("pages", [24, pytest.param(128, marks=pytest.mark.slow)])
def test_a_draft_changes_no_token_of_any_request(pages):
    """Alone, in a mix, and preempted and resumed: on 24 pages not all fit."""
    target = Engine(drafted(SMALL, pages), (parameters(), draft_parameters(SMALL)))
    asked = [ask(target, request)[1] for request in REQUESTS]
    finish(target)
    for number, events in enumerate(asked):
        assert tuple(tokens_of(events)) == alone(number), number
    assert target.stats().drafted > 0
    assert bool(target.stats().preempted) == (pages == 24)


@pytest.mark.slow
def test_a_draft_that_is_the_target_is_always_right():
    """So its cache is right at every position, also after steps that kept everything."""
    target = Engine(drafted(CONFIG), (parameters(), parameters()))
    asked = [ask(target, request)[1] for request in REQUESTS]
    finish(target)
    for number, events in enumerate(asked):
        assert tuple(tokens_of(events)) == alone(number), number
    stats = target.stats()
    assert stats.accepted == pytest.approx(stats.drafted, rel=0.02)  # two shapes of one product
    new = sum(len(alone(number)) for number in range(len(REQUESTS)))
    assert stats.decode_rows < new / 3  # four tokens a step, but for the last ones


def test_a_draft_cannot_have_other_tokens_or_a_smaller_window():
    profile, mesh = serving("tensor=1", float32=True)
    for change, said in (
        ({"vocab_size": 128}, "has 128 tokens and the model 64"),
        ({"max_seq_len": 128}, "window is 128 tokens"),
    ):
        with pytest.raises(UserError, match=said):
            Programs(CONFIG, profile, mesh, SHAPES, dataclasses.replace(SMALL, **change))
    with pytest.raises(UserError, match="guesses 0"):
        Programs(CONFIG, profile, mesh, dataclasses.replace(SHAPES, guesses=0), SMALL)
