"""The loss does not depend on the mesh: every shape on 1, 2, 4 and 8 devices, in float32."""

from dataclasses import replace
from itertools import product
from typing import Any

import jax
import numpy as np
import pytest

from tpu_stack.checkpoint.checksums import tree_checksums
from tpu_stack.data.pipeline import train_iterator
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.training.batches import place_batch
from tpu_stack.training.run import Job
from tpu_stack.training.step import TrainState, make_train_step

STEPS = 20
SIZES = (1, 2, 4, 8)
MESHES = [
    f"data={data},fsdp={fsdp},tensor={tensor}"
    for data, fsdp, tensor in product(SIZES, repeat=3)
    if data * fsdp * tensor in SIZES
]

QUICK = {
    f"data={data},fsdp={fsdp},tensor={tensor}"
    for data, fsdp, tensor in ((1, 1, 1), (2, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2))
}
"""Each axis alone and all three; the others are slow tests."""

# Reductions over devices add in another order: 6e-8 a rounding, 20 Adam steps that each pass errors
# on with a gain near one. 1e-4 is what the project promises; typical here is 1e-6.
TOLERANCE = 1e-4


def losses(job: Job, start: TrainState, quick: dict[str, Any]) -> list[float]:
    """The loss of each of the first steps from the host copy `start` of a state."""
    layout = job.layout()
    step = make_train_step(job.loss(), layout.optimizer, job.train.accumulate)
    batches = train_iterator(job.corpus, job.data)
    start = replace(start, key=jax.random.key(job.train.seed))  # keys have no host form
    state = jax.device_put(start, layout.shardings)
    found = []
    with sharding_scope(job.mesh, job.profile.rules):
        compiled = jax.jit(
            step, donate_argnums=0, out_shardings=(layout.shardings, None), compiler_options=quick
        )
        for _ in range(STEPS):
            state, metrics = compiled(state, (), place_batch(next(batches), layout.batch))
            found.append(float(metrics["loss"]))
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(layout.abstract), strict=True):
        assert leaf.sharding == like.sharding
    return found


def first_state(job: Job) -> TrainState:
    return job.layout().init(job.train.seed)


def on_host(state: TrainState) -> TrainState:
    """A copy that donation cannot reach."""
    fields = (state.step, state.params, state.opt_state, state.finite)
    step, params, opt_state, finite = jax.tree.map(np.array, fields)
    return TrainState(step, params, opt_state, state.key, finite)


@pytest.fixture(scope="module")
def adamw(bench):
    """(state, losses) on one device, compiled as users compile."""
    job = bench.job("data=1")
    start = on_host(first_state(job))
    found = losses(job, start, {})
    assert found[-1] < found[0] - 0.5  # it learns, so later losses depend on earlier steps
    return start, found


def test_all_twenty_meshes_are_meant():
    assert len(MESHES) == len(set(MESHES)) == 1 + 3 + 6 + 10
    assert set(MESHES) > QUICK


@pytest.mark.parametrize(
    "mesh",
    [mesh if mesh in QUICK else pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES],
)
def test_loss_at_step_20(bench, adamw, quick_options, mesh):
    start, wanted = adamw
    found = losses(bench.job(mesh), start, quick_options)
    assert found == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=2,tensor=2"])
def test_accumulation_over_devices(bench, adamw, quick_options, mesh):
    """Two micro-batches with unequal numbers of labels are the one batch, on a mesh too."""
    start, wanted = adamw
    found = losses(bench.job(mesh, accumulate=2), start, quick_options)
    assert found == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.slow
def test_muon_too(bench, quick_options):
    """Muon's products of whole matrices are sharded, and add up to the same steps.

    Newton-Schulz enlarges small singular values by up to 3.4**5 = 480, and their rounding errors:
    from 1e-7 to 5e-5 of an update, of which a step is a 1e-3 part of the weights.
    """
    one, eight = (
        bench.job(mesh, optimizer="muon") for mesh in ("data=1", "data=2,fsdp=2,tensor=2")
    )
    start = on_host(first_state(one))
    wanted = losses(one, start, quick_options)
    assert wanted[-1] < wanted[0] - 0.5
    assert losses(eight, start, quick_options) == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.usefixtures("quick_compile")
def test_initialization_does_not_depend_on_the_mesh(bench):
    """Bit for bit: random numbers are drawn by global index, and nothing is summed."""
    one, eight = (
        tree_checksums(first_state(bench.job(mesh)).params)
        for mesh in ("data=1", "fsdp=4,tensor=2")
    )
    assert one == eight
