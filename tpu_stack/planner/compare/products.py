"""How each tensor is multiplied on either side: operand types, native or emulated, and the tile.

The tile is the one that the quantized kernel itself plans for the chip and one device's shapes. On
a mesh that the compiler partitions the kernel does not run (`quant.select`), and training has no
kernel for its dense products: both say so instead of quoting a tile that nothing uses.

    serve_product(config, row, profile, {"decode": 16})["kernel"]["decode"]["tile"]
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax

from tpu_stack.errors import UserError
from tpu_stack.hardware import get_chip
from tpu_stack.kernels.quantized_matmul import Plan, make_plan
from tpu_stack.models.config import ModelConfig
from tpu_stack.planner.tensors import TensorRow, shard_count
from tpu_stack.planner.traffic import lookup_only
from tpu_stack.planner.workload import Workload
from tpu_stack.quant.formats import get_format
from tpu_stack.quant.qtensor import abstract_qtensor
from tpu_stack.quant.select import scale_mode
from tpu_stack.sharding.axes import BATCH, TensorSpec
from tpu_stack.sharding.profiles import Profile

XLA_TILES = "XLA's own dot, which chooses its tiles while compiling"


def train_product(config: ModelConfig, row: TensorRow, profile: Profile) -> dict[str, Any] | None:
    """The forward product of a training step; None for a tensor that nothing multiplies."""
    if row.spec.contract_axis is None or lookup_only(config, row):
        return None
    compute = profile.precision.compute
    found = _support(profile, (compute, compute))
    return {**found, "implementation": "dot", "tile": None, "tile_reason": XLA_TILES}


def serve_product(
    config: ModelConfig, row: TensorRow, profile: Profile, rows: Mapping[str, int]
) -> dict[str, Any] | None:
    """The product of a serving step; None for a tensor that nothing multiplies.

    rows: program -> rows of activations that one device multiplies by the tensor.
    """
    if row.spec.contract_axis is None or lookup_only(config, row):
        return None
    fmt = get_format(row.serve_format)
    kernels = {name: _kernel(row, profile, count) for name, count in rows.items()}
    return {
        **_support(profile, (profile.precision.compute, fmt.operand)),
        "implementation": "pallas" if fmt.quantized else "dot",
        "kernel": kernels,
    }


def rows_per_device(spec: TensorSpec, profile: Profile, work: Workload) -> dict[str, int]:
    """Rows of activations that a serving device multiplies by a weight, by program: every token's,
    but that a table which unembeds sees one of each sequence."""
    step, slots = work.prefill_step(profile), work.serve_batch // shard_count(profile, BATCH)
    unembeds = spec.contract_axis == -1 or spec.name == "unembed"
    return {"prefill": step.rows * (1 if unembeds else step.chunk), "decode": slots}


def _support(profile: Profile, operands: tuple[str, str]) -> dict[str, Any]:
    rate = profile.chip_facts.peak_flops_per_s(*operands)
    return {
        "operands": list(operands),
        "support": rate.support,
        "computed_as": list(rate.computed_as),
    }


def _kernel(row: TensorRow, profile: Profile, m: int) -> dict[str, Any]:
    """The kernel's plan for one device's part of the tensor, or its reason to refuse."""
    first, last = (
        size // shard_count(profile, axis)
        for size, axis in zip(row.spec.shape[-2:], row.spec.axes[-2:], strict=True)
    )
    shape = (first, last)
    transpose = row.spec.contract_axis == -1
    k, n = shape[::-1] if transpose else shape
    shown = {"rows": m, "k": k, "n": n}
    if not get_format(row.serve_format).quantized:
        return {**shown, "tile": None, "refused": XLA_TILES}
    try:
        compute = profile.precision.compute
        plan = _plan(row.serve_format, profile.chip, compute, m, shape, transpose)
    except (ValueError, UserError) as error:
        return {**shown, "tile": None, "refused": str(error)}
    return {
        **shown,
        "tile": {"bm": plan.bm, "bk": plan.bk, "bn": plan.bn},
        "computed_as": list(plan.operands),
        "support": plan.support,
        "scales": plan.scale_mode,
    }


@lru_cache(maxsize=256)
def _plan(
    format: str, chip: str, compute: str, m: int, shape: tuple[int, int], transpose: bool
) -> Plan:
    """The plan that `quant.matmul` would run. Raises ValueError, the kernel's reason to refuse."""
    fmt = get_format(format)
    weight = abstract_qtensor(shape, format, -1 if transpose else -2)
    return make_plan(
        jax.ShapeDtypeStruct((m, shape[1 if transpose else 0]), jax.numpy.dtype(compute)),
        weight.values,
        weight.scales,
        transpose,
        scale_mode(weight, transpose),
        tensor_scale=weight.tensor_scale,
        offset=fmt.offset,
        rows=shape[0] if weight.packed_bits and transpose else None,
        kind=get_chip(chip).device_kinds[0],
    )
