"""Which implementation of the quantized matmul runs, decided in one place and open to inspection.

Nothing falls back: `matmul` runs what `choose` returns or raises. The choice is made while tracing;
`use_implementation` also enters the jit cache key, so a function that was already compiled is
traced again under another implementation.

>>> with use_implementation("pallas"):
...     explain(x, q_int4).implementation
'pallas'
"""

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType

from tpu_stack.errors import UserError
from tpu_stack.quant.blocked import BLOCK_ROWS
from tpu_stack.quant.qtensor import QTensor
from tpu_stack.quant.sliced import MAX_K
from tpu_stack.quant.transposed import MULTIPLY_REDUCE_ROWS
from tpu_stack.sharding.constrain import current_platform, current_scope

IMPLEMENTATIONS = ("xla", "xla_blocked", "xla_sliced", "pallas")
MAX_BLOCKED_M = 32
"""Above this M, one large dot makes up for widening the whole weight first (measured on CPU)."""
MAX_SLICED_M = 1024
"""Above this M, three integer products cost more than one of float32 (measured on CPU)."""

_requested: ContextVar[str | None] = ContextVar("implementation", default=None)


@dataclass(frozen=True)
class Choice:
    """What `matmul` runs for one call, and why.

    Attributes:
      implementation: "dot" or "multiply_reduce" (plain array), "xla", "xla_blocked", "xla_sliced"
        or "pallas".
      scale_mode: where the scales are applied: "none", "after" (on the output), "input" (on x) or
        "before" (on the weight).
      reason: one line for a person.
      requested: whether the caller or `use_implementation` named it.
    """

    implementation: str
    scale_mode: str
    reason: str
    requested: bool = False


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Runs every quantized `matmul` traced inside the block with implementation `name`.

    Raises: UserError for an unknown name.
    """
    token = _requested.set(_known(name))
    try:
        with set_xla_metadata(tpu_stack_matmul=name):  # part of jit's cache key, and seen in HLO
            yield
    finally:
        _requested.reset(token)


def _known(name: str) -> str:
    if name in IMPLEMENTATIONS:
        return name
    near = difflib.get_close_matches(name, IMPLEMENTATIONS, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown matmul implementation {name!r}; {hint}known: {IMPLEMENTATIONS}")


def scale_mode(w: QTensor, transpose: bool) -> str:
    """Where scales can be applied most cheaply without changing the result.

    A scale that is constant along the contraction multiplies the output ("after"); one that varies
    only along it multiplies the input ("input"); groups multiply the weight ("before").
    """
    per_row = w.contract_axis == -1
    if not per_row and w.scales.shape[-3] > 1:
        return "before"
    return "after" if per_row == transpose else "input"


def choose(
    x_shape: tuple[int, ...], w: Any, transpose: bool = False, implementation: str | None = None
) -> Choice:
    """The decision `matmul` acts on.

    Raises UserError when the requested implementation cannot run.
    """
    rows = math.prod(x_shape[:-1])
    if not isinstance(w, QTensor):
        return _of_array(w, transpose, rows)
    mode = scale_mode(w, transpose)
    requested = implementation or _requested.get()
    if requested is None:
        return _default(w, transpose, mode, rows)
    reason = "requested by the caller" if implementation else "requested by use_implementation"
    if _known(requested) == "pallas" and _partitioned_by_compiler():
        raise UserError(
            "the pallas matmul cannot run under a mesh that the compiler partitions "
            "(GSPMD does not split a pallas_call); call sharded_matmul or use 'xla'"
        )
    if requested == "xla_blocked" and not _blockable(w, transpose, mode):
        raise UserError(
            f"xla_blocked needs scales that are not along the rows it walks, and a row count "
            f"divisible by {BLOCK_ROWS} of values that are not packed bits; got {w.format} "
            f"{list(w.shape)}, transpose={transpose}; use 'xla'"
        )
    if requested == "xla_sliced" and not _sliceable(w, mode):
        raise UserError(
            "xla_sliced needs values of int8, as `widen` makes them, and scales that multiply the"
            f" output; got {w.format} of {w.values.dtype} {list(w.shape)}, transpose={transpose};"
            " use 'xla'"
        )
    return Choice(requested, mode, reason, requested=True)


def _of_array(w: Any, transpose: bool, rows: int) -> Choice:
    fits = transpose and rows in MULTIPLY_REDUCE_ROWS and w.dtype == jnp.float32
    if fits and current_platform() == "cpu" and _one_device_program():
        why = f"one CPU device, M={rows} of float32: a fused multiply and reduce is fastest"
        return Choice("multiply_reduce", "none", why)
    return Choice("dot", "none", "the weight is a plain array")


def _default(w: QTensor, transpose: bool, mode: str, rows: int) -> Choice:
    backend = current_platform()
    if backend == "tpu" and _one_device_program():
        return Choice("pallas", mode, "one TPU: the kernel reads the weight packed")
    if backend == "cpu" and _one_device_program():
        if rows <= MAX_SLICED_M and _sliceable(w, mode):
            why = f"one CPU device and M={rows}: products of int8 are exact, and the fastest"
            return Choice("xla_sliced", mode, why)
        if rows <= MAX_BLOCKED_M and _blockable(w, transpose, mode):
            why = f"one CPU device and M={rows}: widening in cache beats a copy"
            return Choice("xla_blocked", mode, why)
    return Choice("xla", mode, "the compiler partitions and fuses it on any mesh")


def kernel_per_device() -> bool:
    """Whether products on the current mesh run the kernel on each device's shard of the weight: on
    TPU, unless another implementation was requested."""
    requested = _requested.get()
    return requested == "pallas" or (requested is None and current_platform() == "tpu")


def _blockable(w: QTensor, transpose: bool, mode: str) -> bool:
    walks_rows = mode != "input" and transpose == (w.contract_axis == -1) and not w.packed_bits
    return walks_rows and w.shape[-2] % BLOCK_ROWS == 0 and BLOCK_ROWS % min(w.group, 64) == 0


def _sliceable(w: QTensor, mode: str) -> bool:
    whole = w.values.dtype == jnp.int8 and w.offset == 0
    return whole and mode == "after" and w.shape[w.contract_axis] <= MAX_K


def _mesh_axis_types() -> list[AxisType]:
    mesh = jax.sharding.get_abstract_mesh()
    return [t for t, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True) if size > 1]


def _partitioned_by_compiler() -> bool:
    return any(t != AxisType.Manual for t in _mesh_axis_types())


def _one_device_program() -> bool:
    types = _mesh_axis_types()
    if types:
        return all(t == AxisType.Manual for t in types)
    scope = current_scope()
    return jax.device_count() == 1 if scope is None else scope[0].size == 1


def explain(
    x: Any, w: Any, *, transpose: bool = False, implementation: str | None = None
) -> Choice:
    """What `matmul(x, w, ...)` would run here, and why; `x` and `w` may be abstract."""
    return choose(tuple(x.shape), w, transpose, implementation)


def chosen_implementation(
    x: Any, w: Any, *, transpose: bool = False, implementation: str | None = None
) -> str:
    """The name of the implementation that `matmul(x, w, ...)` runs here."""
    return explain(x, w, transpose=transpose, implementation=implementation).implementation
