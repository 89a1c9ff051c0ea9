"""The train step compiled for a mesh, together with what it reads and never changes.

Frozen trees (a teacher, a reference policy) are arguments of the program, never donated.

    program = TrainProgram.compile(loss, layout, batches.element_spec, accumulate=2)
    state, metrics = program(state, program.place(batch))
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax

from tpu_stack.errors import UserError
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.training.batches import place_batch
from tpu_stack.training.layout import StateLayout
from tpu_stack.training.losses import Loss
from tpu_stack.training.step import Metrics, TrainState, make_train_step


@dataclass(frozen=True)
class TrainProgram:
    """A compiled train step; calling it consumes the state and returns before the devices are done.

    Attributes:
      compiled: (state, frozen, batch) -> (state, metrics). frozen: passed to every call as it is.
      batch: ShapeDtypeStructs with shardings of one global batch.
      compile_s: seconds that compiling took.
    """

    compiled: Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]
    frozen: Any
    batch: Any
    compile_s: float = 0.0

    @classmethod
    def compile(
        cls,
        loss: Loss,
        layout: StateLayout,
        element_spec: Any,
        *,
        accumulate: int = 1,
        frozen: Any = (),
    ) -> Self:
        """Compiles `loss`'s step for the layout's mesh; `frozen` are arrays placed on it."""
        started = time.perf_counter()
        step = make_train_step(loss, layout.optimizer, accumulate)
        batch = layout.abstract_batch(element_spec)
        with sharding_scope(layout.mesh, layout.rules):
            jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout.shardings, None))
            compiled = jitted.lower(layout.abstract, frozen, batch).compile()
        return cls(compiled, frozen, batch, time.perf_counter() - started)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """One step from `state`, whose arrays are gone afterwards."""
        return self.compiled(state, self.frozen, batch)

    def place(self, batch: Any) -> Any:
        """This process's rows of a batch, on the devices. Raises UserError for another shape."""
        (sharding, *_) = (leaf.sharding for leaf in jax.tree.leaves(self.batch))
        placed = place_batch(batch, sharding)
        found, said = _shapes(placed), _shapes(self.batch)
        if found != said:
            raise UserError(f"the batch is {found}; its source's element_spec says {said}")
        return placed


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)
