"""Any loss through the step: split, sharded, mixed, with a frozen teacher; against float64."""

from dataclasses import dataclass
from typing import Any

import clip_regression as clips
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_stack.errors import UserError
from tpu_stack.training.losses import Mean, Terms
from tpu_stack.training.step import TrainState
from tpu_stack.training.trainer import Hook, Trainer

STEPS = 6
# Sums of 64 float32 products, over six steps that contract: 1e-6 is typical.
TOLERANCE = 1e-5


class Kept(Hook):
    """The metrics of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_metrics(self, trainer: Trainer, step: int, values: dict[str, float]) -> None:
        assert step == len(self.rows) + 1
        self.rows.append(values)


def train(bench: clips.Bench, program: Any, steps: int = STEPS) -> tuple[TrainState, list[dict]]:
    kept = Kept()
    state = Trainer(program, clips.Clips(), [kept]).run(bench.layout.init(0), steps)
    return state, kept.rows


@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_of_any_rank_and_a_frozen_teacher(mesh, accumulate):
    """Micro-batches and devices hold unequal weight, the last ones none, and change nothing."""
    bench = clips.Bench.on(mesh)
    program = bench.program(accumulate=accumulate)
    state, rows = train(bench, program)
    np.testing.assert_allclose([row["loss"] for row in rows], clips.oracle(STEPS), rtol=TOLERANCE)
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    np.testing.assert_array_equal(bench.frozen["teacher"], clips.TEACHER)  # neither moved nor given
    for leaf, like in zip(
        jax.tree.leaves(state), jax.tree.leaves(bench.layout.abstract), strict=True
    ):
        assert leaf.sharding == like.sharding
    first = next(clips.Clips())
    x = first["clip"]["x"][:5].reshape(-1, clips.D).astype(np.float64)
    apart = x @ clips.parameters()["w"] - np.tanh(x @ clips.TEACHER)
    assert rows[0]["error"] == pytest.approx((apart**2).sum(-1).mean(), rel=TOLERANCE)
    assert len({row["noise"] for row in rows}) == STEPS  # every step has a key of its own


@dataclass(frozen=True)
class Mixed:
    """New clips, and old ones at a weight of their own: two means over unlike numbers of frames."""

    share: float

    def _parts(self, batch: Any) -> dict[str, Any]:
        new = batch["weight"] > 1
        return {
            "new": dict(batch, weight=jnp.where(new, batch["weight"], 0)),
            "old": dict(batch, weight=jnp.where(new, 0, batch["weight"])),
        }

    def denominator(self, batch: Any) -> Terms:
        parts = self._parts(batch)
        return {name: jnp.sum(part["weight"]) for name, part in parts.items()}

    def __call__(self, params, frozen, batch, key) -> tuple[Terms, dict[str, Mean]]:
        shares = {"new": 1.0, "old": self.share}
        sums: dict[str, Any] = {
            name: clips.TeacherLoss()(params, frozen, part, key)[0]
            for name, part in self._parts(batch).items()
        }
        return {name: shares[name] * part for name, part in sums.items()}, {}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_mixture_of_losses_divides_each_by_its_own(accumulate):
    def mixed(params, batch):
        new = batch["weight"] > 1
        parts = [
            clips.regression(params, dict(batch, weight=np.where(which, batch["weight"], 0)))
            for which in (new, ~new)
        ]
        (a, da), (b, db) = parts
        return a + 0.25 * b, {name: da[name] + 0.25 * db[name] for name in da}

    bench = clips.Bench.on("data=2")
    _, rows = train(bench, bench.program(Mixed(0.25), accumulate))
    wanted = clips.oracle(STEPS, mixed)
    np.testing.assert_allclose([row["loss"] for row in rows], wanted, rtol=TOLERANCE)
    for row in rows:
        assert row["new"] + row["old"] == pytest.approx(row["loss"], rel=1e-6)


def test_nothing_to_divide_by_is_no_division_by_zero():
    bench = clips.Bench.on("data=1")
    program = bench.program()
    batch = next(clips.Clips())
    state, metrics = program(
        bench.layout.init(0), program.place(dict(batch, weight=0 * batch["weight"]))
    )
    assert float(metrics["loss"]) == float(metrics["error"]) == 0.0
    assert bool(state.finite)
    np.testing.assert_array_equal(state.params["w"], clips.parameters()["w"])


def test_a_batch_unlike_its_spec_is_named():
    program = clips.Bench.on("data=1").program()
    batch = next(clips.Clips())
    with pytest.raises(UserError, match=r"the batch is .*float32\[8, 2, 8\].*says.*\[8, 3, 8\]"):
        program.place({**batch, "clip": {"x": batch["clip"]["x"][:, :2]}})
