"""What the compiler makes of a slice's links: a small step with its weights over fsdp.

Four layers of 2048 x 2048 float32 weights, cast to bfloat16 where they are used, fsdp over all
devices. A torus must gather them by all-gathers and reduce nothing but gradients; what an open grid
takes is the compiler's choice, kept here as it chose (libtpu 0.0.52) so that a change is seen.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tpu_stack.kernels.compiled import ENVIRONMENT

pytestmark = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu (the aot extra)")

LAYERS, D = 4, 2048
WEIGHT = D * D * 2  # bytes of one gathered
PROGRAM = f"""
import dataclasses, json, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from tpu_stack.planner.aot.child import devices_of
from tpu_stack.planner.aot.target import topology_of
from tpu_stack.planner.hlo import collectives
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile

def loss(weights, x):
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w.astype(jnp.bfloat16)), None))
    return jax.lax.scan(layer, x, weights)[0].astype(jnp.float32).sum()

topology = topology_of(get_profile(sys.argv[1], "train"))
if sys.argv[2:]:  # as an open grid
    topology = dataclasses.replace(topology, wrap=(False,) * len(topology.wrap))
mesh = make_mesh({{"fsdp": topology.devices}}, devices_of(topology))
over = NamedSharding(mesh, P(None, "fsdp"))
weights = jax.ShapeDtypeStruct(({LAYERS}, {D}, {D}), jnp.float32, sharding=over)
rows = NamedSharding(mesh, P("fsdp"))
x = jax.ShapeDtypeStruct((topology.devices * 512, {D}), jnp.bfloat16, sharding=rows)
step = jax.jit(jax.grad(loss), out_shardings=over).lower(weights, x).compile()
found = collectives(step.as_text(), mesh)
print(json.dumps([(c.kind, c.axes, c.bytes, c.trips) for c in found]))
"""


def emitted(profile: str, *options: str) -> dict[str, int]:
    """Kind of collective -> bytes of one device in the whole step, those of weights' size."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, profile, *options],
        env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = {}
    for kind, axes, size, trips in json.loads(done.stdout.splitlines()[-1]):
        assert axes == ["fsdp"]
        found[kind] = found.get(kind, 0) + size * trips
    return found


def reduced(found: dict[str, int]) -> int:
    """Bytes of sums; a reduce-scatter may be an all-reduce that is sliced at once."""
    return found.get("all-reduce", 0) + found.get("reduce-scatter", 0)


def test_a_torus_gathers_weights_by_all_gathers():
    found = emitted("v5p:4x4x4")
    assert found["all-gather"] == 2 * LAYERS * WEIGHT  # forward, and for the input's gradient
    assert reduced(found) == LAYERS * WEIGHT  # one gradient of each


@pytest.mark.slow
def test_an_open_grid_of_the_same_chips_would_gather_by_all_reduce():
    """What was compiled for this slice before the compiler was told that it wraps."""
    found = emitted("v5p:4x4x4", "open")
    assert found.keys() == {"all-reduce"}
    assert reduced(found) == 3 * LAYERS * WEIGHT


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["v4:4x4x4", "7x:4x4x4", "8t:4x4x4", "v6e:16x16"])
def test_a_torus_of_every_chip_but_v5e_gathers_weights_by_all_gathers(profile):
    """8t:4x4x4 is compiled for 7x with the axes of 4 wrapped."""
    found = emitted(profile)
    assert found["all-gather"] == 2 * LAYERS * WEIGHT
    assert reduced(found) == LAYERS * WEIGHT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "kinds"),
    [
        ("v5p:2x2x2", {"all-gather", "all-reduce"}),
        ("v5p:2x4x4", {"all-gather", "collective-permute"}),
        ("v5e:4x4", {"all-gather", "collective-permute"}),
        ("v5e:16x16", {"all-reduce"}),
    ],
)
def test_what_an_open_grid_takes_and_v5e(profile, kinds):
    """v5e's whole pod wraps, and yet shards of 8 rows, half a bfloat16 tile, are gathered by
    all-reduce; twice as wide, with 16 rows a device, they are gathered by all-gathers."""
    assert emitted(profile).keys() == kinds
