"""A loss and a batch source that have nothing to do with tokens: clips regressed on a teacher.

Batches are trees of rank 3 and 2; the teacher is frozen. `oracle` is the same training in NumPy,
float64, whole batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile
from tpu_stack.training.layout import StateLayout
from tpu_stack.training.losses import Mean, Terms
from tpu_stack.training.program import TrainProgram

B, FRAMES, D, H = 8, 3, 8, 16
RATE, MOMENTUM = 0.1, 0.5


class Clips:
    """Clip s of seed 0 in batch s; frames weigh from 0 to 2, so that parts of a batch weigh
    unequally. `spoil` is the number of a batch, from 0, that holds one NaN."""

    def __init__(self, spoil: int | None = None, length: int | None = None):
        self._spoil, self._length, self._index = spoil, length, 0

    @property
    def element_spec(self) -> dict[str, Any]:
        return {
            "clip": {"x": jax.ShapeDtypeStruct((B, FRAMES, D), np.float32)},
            "weight": jax.ShapeDtypeStruct((B, FRAMES), np.float32),
        }

    def __next__(self) -> dict[str, Any]:
        if self._index == self._length:
            raise StopIteration
        generator = np.random.default_rng([0, self._index])
        x = generator.standard_normal((B, FRAMES, D)).astype(np.float32)
        weight = generator.uniform(0, 2, (B, FRAMES)).astype(np.float32)
        weight[5:] = 0  # padding
        if self._index == self._spoil:
            x[1, 2, 3] = np.nan
        self._index += 1
        return {"clip": {"x": x}, "weight": weight}

    def get_state(self) -> dict[str, int]:
        return {"index": self._index}

    def set_state(self, state: dict[str, int]) -> None:
        self._index = state["index"]

    def fingerprint(self) -> dict[str, Any]:
        return {"clips.seed": 0}


@dataclass(frozen=True)
class TeacherLoss:
    """The weighted squared distance from tanh(x @ teacher), per unit of weight."""

    def denominator(self, batch: Any) -> Terms:
        return jnp.sum(batch["weight"])

    def __call__(self, params, frozen, batch, key) -> tuple[Terms, dict[str, Mean]]:
        x, weight = batch["clip"]["x"], batch["weight"]
        apart = x @ params["w"] + params["b"][None, None] - jnp.tanh(x @ frozen["teacher"])
        each = jnp.sum(apart**2, axis=-1)
        rows = jnp.sum(weight > 0)
        metrics = {
            "error": Mean(jnp.sum(jnp.where(weight > 0, each, 0)), rows.astype(jnp.float32)),
            "noise": Mean(jax.random.normal(key), jnp.float32(1)),
        }
        return jnp.sum(weight * each), metrics


def parameters() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {
        "w": (0.1 * generator.standard_normal((D, H))).astype(np.float32),
        "b": np.zeros(H, np.float32),
    }


TEACHER = (0.4 * np.random.default_rng(2).standard_normal((D, H))).astype(np.float32)


@dataclass(frozen=True)
class Bench:
    """The regression laid out on a mesh."""

    layout: StateLayout
    frozen: dict[str, jax.Array]

    @classmethod
    def on(cls, mesh_text: str) -> "Bench":
        profile = get_profile("8t").with_mesh(mesh_text)
        mesh = make_mesh(profile.mesh)
        specs = {"w": P("fsdp", "tensor"), "b": P("tensor")}
        params = {
            name: jax.ShapeDtypeStruct(
                value.shape, value.dtype, sharding=NamedSharding(mesh, specs[name])
            )
            for name, value in parameters().items()
        }
        optimizer = optax.sgd(RATE, momentum=MOMENTUM)

        def init(key: Any) -> dict[str, Any]:
            return jax.tree.map(jnp.asarray, parameters())

        layout = StateLayout.of_params(params, init, optimizer, mesh, profile.rules)
        placed = jax.device_put(TEACHER, NamedSharding(mesh, P(None, "tensor")))
        return cls(layout, {"teacher": placed})

    def program(self, loss: Any = TeacherLoss(), accumulate: int = 1) -> TrainProgram:
        spec = Clips().element_spec
        return TrainProgram.compile(
            loss, self.layout, spec, accumulate=accumulate, frozen=self.frozen
        )


def oracle(steps: int, gradient: Callable | None = None) -> list[float]:
    """Losses of `steps` whole-batch steps of SGD with momentum, float64."""
    params = {name: value.astype(np.float64) for name, value in parameters().items()}
    moments = {name: np.zeros_like(value) for name, value in params.items()}
    batches, losses = Clips(), []
    for _ in range(steps):
        loss, grads = (gradient or regression)(params, next(batches))
        losses.append(loss)
        for name, grad in grads.items():
            moments[name] = MOMENTUM * moments[name] + grad
            params[name] = params[name] - RATE * moments[name]
    return losses


def regression(params: dict[str, np.ndarray], batch: Any) -> tuple[float, dict[str, np.ndarray]]:
    """TeacherLoss of one batch and its gradient, by hand."""
    x = batch["clip"]["x"].astype(np.float64).reshape(-1, D)
    weight = batch["weight"].astype(np.float64).reshape(-1, 1)
    apart = x @ params["w"] + params["b"] - np.tanh(x @ TEACHER.astype(np.float64))
    back = 2 * weight * apart / weight.sum()
    return (weight * apart**2).sum() / weight.sum(), {"w": x.T @ back, "b": back.sum(0)}
