"""Settings of `grouped_matmul` that the tuner tries: blocks of weights, and scale modes.

Rows of a block are the plan's: data decide how many visits an expert takes, and what is multiplied
for nothing. quantized_matmul's entries stand where the op has none of its own.

>>> settings(make_case("int4", "bf16"), compile_target("v6e"), (128, 4096, 14336))
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from tpu_stack.kernels import grouped_matmul as package
from tpu_stack.kernels.grouped_matmul.plan import MOST_ROWS, own_tiles, read_tiles
from tpu_stack.kernels.quantized_matmul import SCALE_MODES, Plan
from tpu_stack.kernels.quantized_matmul.tiles import regime_of, tuned
from tpu_stack.planner.kernels import grouped_cases, matmul_settings
from tpu_stack.planner.kernels.cases import Case, array_bytes
from tpu_stack.planner.kernels.settings import Setting
from tpu_stack.planner.kernels.targets import CompileTarget

TILES_FILE = Path(package.__file__).parent / "tiles.json"
BLOCKS_OF = "rows, K, N"
"""What the numbers of tiles count."""
SECTION = "tuned"
"""Of tiles.json that device kinds are in."""


def settings(case: Case, target: CompileTarget, shape: tuple[int, ...]) -> Iterator[Setting]:
    """The current setting, then all that the kernel takes; some of them may be the same."""
    kind = target.device_kind
    yield _setting(case, shape, plan_of(case, shape, kind))
    for mode in SCALE_MODES:
        for bk in matmul_settings.DEPTHS:
            for bn in matmul_settings.widths(shape[2], kind):
                try:
                    plan = plan_of(case, shape, kind, tiles=(MOST_ROWS, bk, bn), scale_mode=mode)
                except ValueError:
                    continue  # not a setting of the kernel at this shape
                yield _setting(case, shape, plan)


def plan_of(case: Case, shape: tuple[int, ...], kind: str, **options: Any) -> Plan:
    """The kernel's plan for the case at a shape on a device kind."""
    return grouped_cases.plan_of(case.format, case.activation, shape, kind, **options)


def place_of(case: Case, shape: tuple[int, ...]) -> tuple[str, str]:
    """Where in a device kind's part of tiles.json the case's entry is."""
    name = matmul_settings.tiles_name(case)
    if case.activation == "int8":
        name += "@int8"
    return name, regime_of(_rows_of_expert(shape))


def _rows_of_expert(shape: tuple[int, ...]) -> int:
    return math.ceil(shape[0] / grouped_cases.EXPERTS)


def entry_of(
    case: Case, kind: str, shape: tuple[int, ...], tiles: tuple[int, ...], scale_mode: str | None
) -> dict[str, Any]:
    """What has to differ from quantized_matmul's entry for the setting to be the default."""
    name, rows = matmul_settings.tiles_name(case), _rows_of_expert(shape)
    x_dtype = case.abstract(shape)["x"].dtype
    theirs, own = tuned(kind, name, rows), tuned(kind, name, rows, own_tiles(x_dtype))
    default = plan_of(case, shape, kind, tiles=(MOST_ROWS, *tiles[1:]))
    bounds = matmul_settings.bounds(own, default, scale_mode)
    wanted = own | {"bk": tiles[1], "bn": tiles[2]} | bounds
    return {name: value for name, value in wanted.items() if value != theirs[name]}


def _setting(case: Case, shape: tuple[int, ...], plan: Plan) -> Setting:
    arrays = dict(case.abstract(shape))
    experts = arrays["group_sizes"].shape[0]
    expert = sum(array_bytes(arrays[name]) for name in ("values", "scales")) / experts
    out = sum(map(array_bytes, jax.tree.leaves(case.out_shape(shape))))
    m, k, n = (
        min(1.0, block / size)
        for block, size in zip((plan.bm, plan.bk, plan.bn), shape, strict=True)
    )
    step = expert * k * n + array_bytes(arrays["x"]) * m * k + out * m * n
    widened = 4 * plan.bk * plan.bn + 8 * plan.bm * plan.bn
    return Setting(
        tiles=(plan.bm, plan.bk, plan.bn),
        scale_mode=plan.scale_mode,
        block_bytes=step,
        call_bytes=case.nbytes(shape),
        vmem_bytes=2 * step + widened,
    )


def forget() -> None:
    """Has tiles.json read again."""
    read_tiles.cache_clear()


def tiles_text(table: dict[str, Any]) -> str:
    """tiles.json as it is kept."""
    return json.dumps(table, indent=2) + "\n"
