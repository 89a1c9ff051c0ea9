"""Prefill on four devices and decode on four others: the tokens of one mesh, nothing leaked."""

import dataclasses
from functools import cache

import jax
import pytest
from engine_model import (
    CONFIG,
    LENGTH,
    PAGE,
    REQUESTS,
    SAMPLED,
    alone,
    ask,
    finish,
    prompt_of,
    stacked_parameters,
    tokens_of,
)

from tpu_stack.models.abstract import map_specs, tensor_of
from tpu_stack.serving.engine.engine import Engine
from tpu_stack.serving.engine.programs import Programs
from tpu_stack.serving.engine.shapes import Shapes
from tpu_stack.serving.engine.two_meshes import TwoMeshes
from tpu_stack.serving.requests import GenerationRequest, SamplingParams
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import Precision, Profile, get_profile


def side(chip: str, first: int, count: int, cache_dtype: str):
    profile = get_profile(chip, "serve").with_mesh(f"tensor={count}")
    precision = Precision("float32", "float32", cache_dtype)
    profile = dataclasses.replace(profile, precision=precision)
    return profile, make_mesh(profile.mesh, jax.devices()[first : first + count])


def placed(profile: Profile, mesh, seed: int = 0):
    def one(spec):
        sharding = jax.sharding.NamedSharding(mesh, profile.rules.partition_spec(spec.axes))
        return jax.device_put(tensor_of(stacked_parameters(seed), spec.name), sharding)

    return map_specs(CONFIG, one)


@cache
def built(pages: int = 128, cache_dtype: str = "float32", prefill: int = 4):
    """Programs and weights on 4 + 4 devices, or fewer to prefill."""
    shapes = Shapes(8, LENGTH, PAGE, pages, (64, 128), (1, 4))
    sides = [side("8t", 0, prefill, cache_dtype), side("8i", 4, 4, cache_dtype)]
    programs = TwoMeshes(*(Programs(CONFIG, *each, shapes) for each in sides))
    params = programs.prepared(tuple(placed(*each) for each in sides))
    programs.warm_up(params)
    return programs, params


def test_each_mesh_has_its_own_devices():
    _, params = built()
    on = [{d.id for leaf in jax.tree.leaves(each) for d in leaf.devices()} for each in params]
    assert on == [{0, 1, 2, 3}, {4, 5, 6, 7}]


@pytest.mark.parametrize(
    ("pages", "prefill"),
    [(24, 4), *(pytest.param(128, p, marks=pytest.mark.slow) for p in (4, 2))],
)
def test_tokens_are_those_of_one_mesh(pages, prefill):
    """All at once, on pages for all or for few; the meshes may differ in size."""
    programs, params = built(pages, "float32", prefill)
    target, before = Engine(programs, params), programs.transferred
    asked = [ask(target, request)[1] for request in REQUESTS]
    finish(target)
    for number, events in enumerate(asked):
        assert tuple(tokens_of(events)) == alone(number), number
    pages_of_prompts = sum(-(-len(request.prompt) // PAGE) for request in REQUESTS)
    moved = programs.transferred - before
    assert moved >= pages_of_prompts
    if pages == 128:
        assert moved == pages_of_prompts  # each once


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn"])
def test_small_caches_are_handed_over_with_their_scales(cache_dtype):
    """Seed for seed what one mesh of that cache says: here a mesh that prefills for itself."""
    programs, params = built(128, cache_dtype)
    requests = [GenerationRequest(prompt_of(40 * n + 9, n), 30, SAMPLED) for n in range(4)]
    answers = []
    for target in (Engine(programs, params), Engine(programs._to, params[1])):
        if target.programs is programs._to:
            programs._to.warm_prefill(params[1])
            programs._to.mark_warm()
        asked = [ask(target, request)[1] for request in requests]
        finish(target)
        answers.append([tokens_of(events) for events in asked])
    assert answers[0] == answers[1]


def test_a_prefix_is_shared_and_a_cancelled_owners_pages_arrive():
    """The second request finds the first one's pages on both meshes, though the first is gone."""
    target = Engine(*built())
    prefix = prompt_of(200, seed=1)
    first, _ = ask(target, GenerationRequest(prefix, 50))
    target.step()
    target.step()
    target.cancel(first)
    later, events = ask(target, GenerationRequest((*prefix, 7, 8), 20))
    finish(target)
    assert later.cached >= 128
    fresh = Engine(*built())
    _, want = ask(fresh, GenerationRequest((*prefix, 7, 8), 20))
    finish(fresh)
    assert tokens_of(events) == tokens_of(want)


def test_new_weights_take_over_on_both_meshes():
    programs, params = built()
    target = Engine(programs, params)
    _, before = ask(target, REQUESTS[2])
    target.step()
    other = tuple(placed(each.profile, each.mesh, 1) for each in (programs._from, programs._to))
    target.load(programs.prepared(other), "finish")
    _, after = ask(target, dataclasses.replace(REQUESTS[2], sampling=SamplingParams()))
    finish(target)
    assert tuple(tokens_of(before)) == alone(2)
    assert tokens_of(after) != tokens_of(before)
    assert target.stats().generation == 1
