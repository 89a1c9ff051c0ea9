"""A run that begins with another run's weights, on another mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.errors import UserError
from tpu_stack.training.run import train


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_begins_with_the_weights_and_a_fresh_optimizer(bench, tmp_path, optimizer):
    first = train(bench.job("data=2,fsdp=2", steps=3), tmp_path / "first")
    job = bench.job("fsdp=2,tensor=2", steps=2, learning_rate=0.0, optimizer=optimizer, seed=9)
    second = train(dataclasses.replace(job, init=tmp_path / "first"), tmp_path / "second")
    for had, has in zip(
        jax.tree.leaves(first.state.params), jax.tree.leaves(second.state.params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(has), np.asarray(had))
    assert int(second.state.step) == 2
    from_nothing = train(job)
    assert second.losses[0][1] < from_nothing.losses[0][1] - 0.01

    with CheckpointStore(tmp_path / "second", read_only=True) as store:
        assert store.latest() == 2
    longer = dataclasses.replace(job.train, steps=3)
    resumed = train(
        dataclasses.replace(job, train=longer, init=tmp_path / "first"),
        tmp_path / "second",
        resume=True,
    )
    assert [step for step, _ in resumed.losses] == [3]


def test_a_folder_that_holds_no_run_is_refused(bench, tmp_path):
    job = dataclasses.replace(bench.job("data=2", steps=1), init=tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        train(job, tmp_path / "out")
