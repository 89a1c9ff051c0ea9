"""The train step: a pure function from (state, frozen, batch) to (state, metrics).

It knows no model: what is minimized is a `losses.Loss`.

    step = make_train_step(loss, optimizer, accumulate=2)
    state, metrics = jax.jit(step, donate_argnums=0)(state, frozen, batch)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.constrain import constrain
from tpu_stack.training.losses import Loss, Scalar, Terms

Metrics = dict[str, Array]
StepFunction = Callable[["TrainState", Any, Any], tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes from step to step.

    Attributes:
      step: int32 scalar, steps taken. params: float32 master weights. opt_state: the optimizer's.
      key: PRNG key; step-specific keys are folded in from `step`, so it never changes.
      finite: bool scalar, False once a step's loss or gradient was not; from then on nothing
        changes, so that the state stays that of the last good step however late the host looks.
    """

    step: Any  # not annotated as arrays: the same tree holds shapes, or shardings
    params: Any
    opt_state: Any
    key: Any
    finite: Any

    @classmethod
    def first(cls, params: Any, opt_state: Any, key: PRNGKeyArray, step: int = 0) -> Self:
        """The state in which a run begins, or goes on, at `step`."""
        return cls(jnp.int32(step), params, opt_state, key, jnp.bool_(True))


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, accumulate: int = 1
) -> StepFunction:
    """The step function; jit it with the state's shardings and donate the state, not `frozen`.

    The gradient is that of the loss of the whole global batch (see `Loss`), however the batch is
    split into `accumulate` micro-batches or over devices. Metrics are float32 scalars: "loss" (the
    objective, or the term of that name), every term, every metric of the loss, "grad_norm"; and the
    bool "finite".

    A step whose objective or gradient norm is not finite, and every step after it, returns the
    state it was given but for `finite`.
    """

    def gradient(state: TrainState, frozen: Any, batch: Any):
        denominators = jax.tree.map(_not_zero, _named(loss.denominator(batch)))
        step_key = jax.random.fold_in(state.key, state.step)

        def objective(params: Any, part: Any, index: Array | int):
            sums, metrics = loss(params, frozen, part, jax.random.fold_in(step_key, index))
            terms = jax.tree.map(jnp.divide, _named(sums), denominators)
            return reduce(jnp.add, terms.values()), (terms, metrics)

        def of_part(part: Any, index: Array | int):
            return jax.value_and_grad(objective, has_aux=True)(state.params, part, index)

        if accumulate == 1:
            return of_part(batch, 0)
        return _summed_over_parts(of_part, batch, accumulate)

    def train_step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        (objective, (terms, metrics)), grads = gradient(state, frozen, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(grads)
        finite = state.finite & jnp.isfinite(objective) & jnp.isfinite(norm)
        step, params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (state.step + 1, params, opt_state),
            (state.step, state.params, state.opt_state),
        )
        means = {name: mean.sum / _not_zero(mean.count) for name, mean in metrics.items()}
        found = {"loss": objective, **terms, **means, "grad_norm": norm, "finite": finite}
        return TrainState(step, params, opt_state, state.key, finite), found

    return train_step


def _summed_over_parts(of_part: Callable[[Any, Any], Any], batch: Any, parts: int) -> Any:
    """The sum of `of_part(micro-batch, its number)` over `parts` equal parts of the batch."""

    def add(sums: Any, numbered: Any):
        part, index = numbered
        part = jax.tree.map(lambda x: constrain(x, BATCH, *(None,) * (x.ndim - 1)), part)
        return jax.tree.map(jnp.add, sums, of_part(part, index)), None

    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(of_part, first, jnp.int32(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, (split, jnp.arange(parts)))[0]


def _named(terms: Terms) -> dict[str, Scalar]:
    return terms if isinstance(terms, dict) else {"loss": terms}


def _not_zero(count: Scalar) -> Float[Array, ""]:
    return jnp.where(count == 0, 1.0, count)
