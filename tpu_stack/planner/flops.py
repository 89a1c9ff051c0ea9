"""Counts the matrix-multiply work of a JAX function without allocating or compiling anything.

The function is traced with abstract arguments and its jaxpr walked, loops multiplied out, so a 70B
train step is counted in seconds on a laptop. Dtypes are kept per operand pair, because a chip's
peak depends on them.

    count = count_flops(step, state, batch)  # ShapeDtypeStructs or arrays
    count.matmul_flops, count.by_operand_dtypes[("bfloat16", "bfloat16")]

Conventions: a multiply-add is 2 operations; figures are for all devices together (a `shard_map`
body is multiplied by the devices it runs on); recomputation under `jax.checkpoint` counts, since it
runs; elementwise work does not. Padding and dilation zeros of a convolution count as work. Unused
results are dropped within one jaxpr, not across the boundary of an inner one. Of a conditional's
branches the costliest counts, of those without a kernel where there is one: what a kernel does is
known by its own estimate only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

# Primitives that hide products: another library's code, a callback, or a decomposition.
_OPAQUE = {
    *("ffi_call", "pure_callback", "io_callback", "custom_linear_solve", "triangular_solve"),
    *("cholesky", "lu", "eig", "eigh", "svd", "qr", "householder_product", "fft"),
    *("tridiagonal_solve", "schur", "hessenberg"),
}


@dataclass(frozen=True)
class FlopCount:
    """Matrix-multiply work of one call, over all devices.

    Invariants: `matmul_flops` is the sum of `by_operand_dtypes`, keyed by JAX dtype names of left
    and right operand; `dot_operand_bytes` sums the bytes of every product's operands and output as
    if nothing were fused, an upper bound on their HBM traffic; `opaque` names what was not
    counted (kernels, callbacks, decompositions), with a kernel's own cost estimate, whose FLOPs
    times its runs are `opaque_flops`; loops in `unknown_loops` are counted as one turn each.
    """

    matmul_flops: int
    by_operand_dtypes: Mapping[tuple[str, str], int]
    dot_operand_bytes: int
    opaque: tuple[str, ...] = ()
    opaque_flops: int = 0
    unknown_loops: tuple[str, ...] = ()


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> FlopCount:
    """Trace `function` (plain or jitted) with arrays or ShapeDtypeStructs and count its products.

    A function that needs static arguments must be passed jitted with them named, or partially
    applied. Raises whatever tracing the function raises.
    """
    traceable = function if hasattr(function, "trace") else jax.jit(function)
    return count_jaxpr(traceable.trace(*args, **kwargs).jaxpr)  # pyright: ignore


def count_jaxpr(closed: Any, turns: Fraction | None = None) -> FlopCount:
    """Count the products in a closed jaxpr, as `jax.make_jaxpr` returns.

    Args:
      turns: how often a loop turns whose length only its data tell, the mean over all such loops;
        None: they are counted as one turn and named in `unknown_loops`.
    """
    tally = _count(closed.jaxpr, turns)
    flops = {pair: int(amount) for pair, amount in tally.flops.items()}
    return FlopCount(
        matmul_flops=sum(flops.values()),
        by_operand_dtypes=flops,
        dot_operand_bytes=int(tally.bytes),
        opaque=tuple(dict.fromkeys(tally.opaque)),
        opaque_flops=int(tally.opaque_flops),
        unknown_loops=tuple(tally.unknown),
    )


@dataclass
class _Tally:
    turns: Fraction | None = None
    flops: dict[tuple[str, str], int | Fraction] = field(default_factory=dict)
    bytes: int | Fraction = 0
    opaque: list[str] = field(default_factory=list)
    opaque_flops: int | Fraction = 0
    unknown: list[str] = field(default_factory=list)

    @property
    def total(self) -> int | Fraction:
        return sum(self.flops.values()) + self.opaque_flops

    def add(self, other: "_Tally", times: int | Fraction = 1) -> None:
        for pair, flops in other.flops.items():
            self.flops[pair] = self.flops.get(pair, 0) + flops * times
        self.bytes += other.bytes * times
        self.opaque_flops += other.opaque_flops * times
        self.opaque += other.opaque
        self.unknown += other.unknown

    def product(self, eqn: core.JaxprEqn, flops: int) -> None:
        left, right = (_aval(variable) for variable in eqn.invars[:2])
        pair = (str(left.dtype), str(right.dtype))
        self.flops[pair] = self.flops.get(pair, 0) + flops
        self.bytes += sum(_bytes(_aval(v)) for v in (*eqn.invars[:2], *eqn.outvars[:1]))


def _count(jaxpr: core.Jaxpr, turns: Fraction | None) -> _Tally:
    tally = _Tally(turns)
    for eqn in _live(jaxpr):
        handler = _HANDLERS.get(eqn.primitive.name)
        if handler is not None:
            handler(eqn, tally)
        elif eqn.primitive.name in _OPAQUE:
            tally.opaque.append(eqn.primitive.name)
        else:
            for inner in _inner_jaxprs(eqn.params):
                tally.add(_count(inner, turns))
    return tally


def _live(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """The equations whose results are used; XLA drops the others too."""
    used = {id(variable) for variable in jaxpr.outvars}
    kept: list[core.JaxprEqn] = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(id(variable) in used for variable in eqn.outvars):
            kept.append(eqn)
            used.update(id(variable) for variable in eqn.invars)
    return kept[::-1]


def _dot_general(eqn: core.JaxprEqn, tally: _Tally) -> None:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    left = _aval(eqn.invars[0]).shape
    depth = prod(left[axis] for axis in contracting)
    tally.product(eqn, 2 * prod(_aval(eqn.outvars[0]).shape) * depth)


def _ragged_dot(eqn: core.JaxprEqn, tally: _Tally) -> None:
    """Each row meets one group's matrix. When the ragged axis is contracted, all rows once."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, _), _ = numbers.dot_dimension_numbers
    left, out = _aval(eqn.invars[0]).shape, _aval(eqn.outvars[0]).shape
    depth = prod(left[axis] for axis in contracting)
    ragged_is_contracted = numbers.lhs_ragged_dimensions[0] in contracting
    outputs = prod(out[1:]) if ragged_is_contracted else prod(out)
    tally.product(eqn, 2 * outputs * depth)


def _convolution(eqn: core.JaxprEqn, tally: _Tally) -> None:
    kernel = _aval(eqn.invars[1]).shape
    out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    taps = prod(kernel) // max(out_features, 1)
    tally.product(eqn, 2 * prod(_aval(eqn.outvars[0]).shape) * taps)


def _scan(eqn: core.JaxprEqn, tally: _Tally) -> None:
    tally.add(_count(eqn.params["jaxpr"].jaxpr, tally.turns), times=eqn.params["length"])


def _while(eqn: core.JaxprEqn, tally: _Tally) -> None:
    inner = _count(eqn.params["body_jaxpr"].jaxpr, tally.turns)
    inner.add(_count(eqn.params["cond_jaxpr"].jaxpr, tally.turns))
    if tally.turns is None and (inner.total or inner.opaque):
        tally.unknown.append(f"while at {_where(eqn)}")
    tally.add(inner, times=1 if tally.turns is None else tally.turns)


def _cond(eqn: core.JaxprEqn, tally: _Tally) -> None:
    branches = [_count(branch.jaxpr, tally.turns) for branch in eqn.params["branches"]]
    tally.add(max(branches, key=lambda branch: (not branch.opaque, branch.total)))


def _shard_map(eqn: core.JaxprEqn, tally: _Tally) -> None:
    sizes, manual = eqn.params["mesh"].shape, eqn.params["newly_manual_axes"]
    devices = prod(size for name, size in sizes.items() if name in manual)
    tally.add(_count(eqn.params["jaxpr"], tally.turns), times=devices)


def _pallas_call(eqn: core.JaxprEqn, tally: _Tally) -> None:
    estimate = eqn.params.get("cost_estimate")
    name = eqn.params.get("name") or getattr(eqn.params.get("name_and_src_info"), "name", "kernel")
    if estimate is None:
        tally.opaque.append(f"pallas_call {name}: no cost_estimate")
        return
    tally.opaque.append(
        f"pallas_call {name}: cost_estimate {estimate.flops} flops, "
        f"{estimate.bytes_accessed} bytes a call"
    )
    tally.opaque_flops += int(estimate.flops)


def _custom_derivative(eqn: core.JaxprEqn, tally: _Tally) -> None:
    """Only the function itself runs; its derivative rules appear where they are applied."""
    inner = eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
    for jaxpr in _inner_jaxprs({"function": inner}):
        tally.add(_count(jaxpr, tally.turns))


_HANDLERS: dict[str, Callable[[core.JaxprEqn, _Tally], None]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "pallas_call": _pallas_call,
    "custom_vjp_call": _custom_derivative,
    "custom_jvp_call": _custom_derivative,
}


def _inner_jaxprs(params: Mapping[str, Any]) -> list[core.Jaxpr]:
    found: list[core.Jaxpr] = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)  # a closed jaxpr holds the open one
            if isinstance(inner, core.Jaxpr):
                found.append(inner)
    return found


def _aval(variable: Any) -> Any:
    return variable.aval


def _bytes(aval: Any) -> int:
    return (prod(aval.shape) * _bits(aval.dtype) + 7) // 8


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return dtype.itemsize * 8


def _where(eqn: core.JaxprEqn) -> str:
    return str(eqn.source_info.name_stack) or "top level"
