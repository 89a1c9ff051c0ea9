"""Sharding constraints on activations, by logical axis, read from the profile in force.

Model code names the axes of an activation; which mesh axes they land on is decided by whoever
traces it, through `sharding_scope`. Outside a scope nothing is constrained.

>>> with sharding_scope(mesh, profile.rules):
...     compiled = jax.jit(lambda x: constrain(x, "batch", None)).lower(x).compile()
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from tpu_stack.sharding.rules import Rules

_SCOPE: ContextVar[tuple[Mesh, Rules] | None] = ContextVar("sharding_scope", default=None)


@contextmanager
def sharding_scope(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Functions traced inside constrain their activations to `mesh` by `rules`."""
    token = _SCOPE.set((mesh, rules))
    try:
        yield
    finally:
        _SCOPE.reset(token)


def current_scope() -> tuple[Mesh, Rules] | None:
    """The mesh and rules in force, for code that splits its own work (`shard_map`)."""
    return _SCOPE.get()


def current_platform() -> str:
    """What the code being traced will run on: the mesh in force's platform, else JAX's default.

    Programs are compiled for TPU topologies from processes that have no TPU.
    """
    scope = _SCOPE.get()
    return jax.default_backend() if scope is None else scope[0].devices.flat[0].platform


def constrain(x: Array, *axes: str | None) -> Array:
    """`x`, constrained to the layout of its logical `axes` where a scope is in force."""
    scope = _SCOPE.get()
    if scope is None or scope[0].size == 1:
        return x
    mesh, rules = scope
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rules.partition_spec(axes)))
