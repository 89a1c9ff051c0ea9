"""Predicted memory of the serving engine: against the arguments that its programs are traced with,
by hand, and the same from every part of the planner."""

from dataclasses import replace
from math import prod

import jax
import pytest

from tpu_stack.models.presets import get_preset
from tpu_stack.planner.memory.serve import ServeMemory
from tpu_stack.planner.memory.tiles import row_major_bytes
from tpu_stack.planner.search import Ask, search
from tpu_stack.planner.search.check import checked
from tpu_stack.planner.serve_programs import SERVE_PROGRAMS, engine_arguments
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile

LLAMA = get_preset("llama3_8b").replace(n_layers=2)
EXPERTS = get_preset("qwen3_30b_a3b").replace(n_layers=2)
SIZES = {"batch": 32, "context": 2000, "prompt": 1000}


def leaf_bytes(leaf):
    """Of one argument on one device, without what tiles pad."""
    bits = (
        jax.numpy.iinfo(leaf.dtype).bits if "int4" in str(leaf.dtype) else 8 * leaf.dtype.itemsize
    )
    return prod(leaf.sharding.shard_shape(leaf.shape)) * bits // 8


@pytest.mark.parametrize("program", SERVE_PROGRAMS)
@pytest.mark.parametrize(
    ("config", "format", "mesh"),
    [(LLAMA, "int4", "data=2,tensor=4"), (LLAMA, "bf16", "data=1,tensor=8"),
     (EXPERTS, "int8", "data=4,tensor=2")],
)  # fmt: skip
def test_arguments_are_those_that_the_program_is_traced_with(program, config, format, mesh):
    profile = get_profile("v6e:8", "serve").with_mesh(mesh)
    devices = make_mesh(profile.mesh, jax.devices("cpu"))
    _, arguments = engine_arguments(config, profile, format, program, mesh=devices, **SIZES)
    given = sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(arguments))
    found = ServeMemory(config, profile, format).predict(program, **SIZES)
    assert found.argument_bytes == pytest.approx(given, rel=2e-3)


def test_pages_state_and_what_lies_beside_a_prefill_by_hand():
    """16 slots on each of two slices, of 2000 tokens in 16 pages of 128."""
    profile = get_profile("v6e:8", "serve").with_mesh("data=2,tensor=4")
    memory = ServeMemory(LLAMA, profile, "int4")
    decode = memory.predict("decode", **SIZES)
    terms = {term.name: term.bytes for term in decode.always}
    assert terms["pages of keys and values"] == 2 * (8 // 4) * (2 * 16 * 16) * 128 * 128 * 2
    assert terms["counts of tokens"] == 16 * 128_256 * (4 + 1)
    prefill = memory.predict("prefill", **SIZES)
    assert [term.name for term in prefill.beside] == ["counts of tokens", "tokens and sampling"]
    assert prefill.held_bytes - prefill.total_bytes == sum(t.bytes for t in prefill.beside)
    assert sum(prefill.held.values()) == prefill.held_bytes
    assert decode.held_bytes == decode.total_bytes


def test_heads_that_fill_no_lanes_are_padded_beside_what_is_given():
    """64 of 128 lanes: twice the bytes, which only the kernel of decode asks for."""
    config = get_preset("smollm2_135m").replace(n_layers=2)
    memory = ServeMemory(config, get_profile("v6e:1", "serve"), "int8")
    given = 2 * 3 * (2 * 32 * 16) * 128 * 64 * 2
    decode, prefill = (memory.predict(name, **SIZES).held for name in ("decode", "prefill"))
    assert decode["pages of keys and values"] == prefill["pages of keys and values"] == given
    assert decode["pages, padded for the kernel"] == 2 * given + 3 * given // 2
    assert "pages, padded for the kernel" not in prefill


def test_twice_the_slots_are_twice_the_pages_and_weights_stay():
    profile = get_profile("v6e:4", "serve")
    memory = ServeMemory(LLAMA, profile, "int8")
    one, two = (memory.predict("decode", **(SIZES | {"batch": n})).held for n in (16, 32))
    assert two["pages of keys and values"] == 2 * one["pages of keys and values"]
    assert two["weights of the layers"] == one["weights of the layers"]


def test_rows_are_padded_to_a_tile_as_they_lie():
    assert row_major_bytes((3, 16, 64), 16) == 3 * 16 * 128 * 2
    assert row_major_bytes((1, 1000), 32) == 1024 * 4
    assert row_major_bytes((5,), 32) == 128 * 4


@pytest.mark.parametrize("goal", ["decode-throughput", "prefill-throughput"])
def test_a_search_holds_what_plan_memory_predicts(goal):
    """For every plan, not only for those that are shown."""
    config = get_preset("llama3_8b")
    found = search(Ask("llama3_8b", ("v6e:8",), goal, batches=(8, 16), formats=("int4",)))
    for plan in found.plans:
        again = checked(config, replace(plan, memory={}, checked=False))
        assert plan.checked
        assert plan.memory == again.memory
