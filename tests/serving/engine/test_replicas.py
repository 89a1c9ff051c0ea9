"""Replicas on the slices of a mesh: the tokens of one engine, the work of all of them."""

import time

import jax
import numpy as np
import pytest
from engine_model import CONFIG, REQUESTS, alone, prompt_of, stacked_parameters, tokens_of
from serving_model import serving

from tpu_stack.errors import UserError
from tpu_stack.serving.engine.build import start_service
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.serving.replicas import Replicas, on_slice, split_mesh
from tpu_stack.serving.requests import Finished, GenerationRequest, QueueFull
from tpu_stack.serving.service import Service


def on_mesh(mesh: str, seed: int = 0):
    profile, devices = serving(mesh, float32=True)
    layout = PackedLayout.of(CONFIG, "float32", profile, devices)
    return jax.device_put(stacked_parameters(seed), layout.shardings), profile, devices


@pytest.fixture(scope="module")
def service():
    params, profile, mesh = on_mesh("data=2,tensor=2")
    options = EngineOptions(slots=16, queue=40, page=16, pages=64)
    built = start_service(CONFIG, params, profile, mesh, options, {"format": "float32"})
    yield built
    built.close()


def asked(service: Service, requests) -> list[list]:
    """Events of requests sent at once, when all have finished."""
    events: list[list] = [[] for _ in requests]
    for request, each in zip(requests, events, strict=True):
        service.submit(request, each.append)
    wait(lambda: all(each and isinstance(each[-1], Finished) for each in events))
    return events


def wait(holds, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_slice_holds_the_copy_that_it_held():
    params, _, mesh = on_mesh("data=2,tensor=2")
    slices = split_mesh(mesh)
    assert [dict(each.shape) for each in slices] == [{"data": 1, "tensor": 2}] * 2
    devices = [set(each.devices.flat) for each in slices]
    assert not devices[0] & devices[1]
    for slice, here in zip(slices, devices, strict=True):
        for whole, part in zip(
            jax.tree.leaves(params), jax.tree.leaves(on_slice(params, slice)), strict=True
        ):
            assert part.sharding.device_set == here
            np.testing.assert_array_equal(np.asarray(part), np.asarray(whole))
            pointers = {s.data.unsafe_buffer_pointer() for s in whole.addressable_shards}
            assert {s.data.unsafe_buffer_pointer() for s in part.addressable_shards} <= pointers


def test_replicas_give_the_tokens_of_one_engine_and_share_the_work(service):
    assert isinstance(service, Replicas)
    events = asked(service, REQUESTS)
    for number, each in enumerate(events):
        assert tuple(tokens_of(each)) == alone(number), number
    each = [one.stats() for one in service._services]
    assert [stats.submitted for stats in each] == [len(REQUESTS) // 2] * 2
    said = service.describe()
    assert (said["mesh"], said["slots"], said["pages"]) == ({"data": 2, "tensor": 2}, 16, 64)
    wait(lambda: sum(service.stats().finished.values()) == len(REQUESTS))
    wait(lambda: not service.stats().running)
    stats = service.stats()
    assert stats.submitted == sum(stats.finished.values()) == len(REQUESTS)
    assert (stats.recompilations, stats.generation, service._routes) == (0, 0, {})
    assert stats.pages_free + stats.pages_cached == stats.pages == 64


def test_a_cancelled_request_ends_where_it_lives(service):
    events: list[list] = [[], []]
    long = GenerationRequest(prompt_of(5, 1), 250)
    tickets = [service.submit(long, each.append) for each in events]
    service.cancel(tickets[1])
    wait(lambda: all(each and isinstance(each[-1], Finished) for each in events))
    assert [each[-1].reason for each in events] == ["length", "cancelled"]
    service.cancel(tickets[1])  # it is known no more


def test_a_refused_request_leaves_no_trace(service):
    with pytest.raises(UserError, match="the prompt's length"):
        service.submit(GenerationRequest((1,) * 300), print)
    refused = 0
    for _ in range(200):
        try:
            service.submit(GenerationRequest(prompt_of(5, 1), 40), lambda event: None)
        except QueueFull:
            refused += 1
    assert 0 < refused <= 160  # each of the two lets twenty wait
    assert len(service._routes) <= 200 - refused
    wait(lambda: not service._routes)
    wait(lambda: not service.stats().running)
    stats = service.stats()
    assert (stats.waiting, stats.pages_free + stats.pages_cached) == (0, stats.pages)


def test_new_weights_reach_every_replica(service):
    params, *_ = on_mesh("data=2,tensor=2", seed=1)
    other, *_ = on_mesh("data=2,tensor=2", seed=0)
    with pytest.raises(UserError, match="the new weights do not fit the running model"):
        service.load({**params, "embed": params["embed"].astype("bfloat16")})
    service.load(params)
    wait(lambda: service.stats().generation == 1)
    first, second = map(tokens_of, asked(service, [REQUESTS[2]] * 2))
    assert first == second != list(alone(2))
    service.load(other)
    wait(lambda: service.stats().generation == 2)
    assert tuple(tokens_of(asked(service, [REQUESTS[2]])[0])) == alone(2)
