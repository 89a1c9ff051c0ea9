"""Settings of `grouped_matmul` that the tuner tries: weight blocks and scale modes.

The plan chooses the rows of a block. Where this op has no entry in tiles.json, quantized_matmul's
applies.

>>> case = get_case("grouped_matmul", "int4", "bf16")
>>> next(settings(case, compile_target("v6e"), (128, 4096, 14336))).tiles
(64, 4096, 2048)
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from tpu_stack.kernels import grouped_matmul as package
from tpu_stack.kernels.grouped_matmul.plan import MOST_ROWS
from tpu_stack.kernels.grouped_matmul.tiles import normalized_rows, read_tiles, tile_overrides
from tpu_stack.kernels.quantized_matmul import SCALE_MODES, Plan
from tpu_stack.kernels.quantized_matmul.tiles import regime_of, tuned
from tpu_stack.planner.kernels import grouped_cases, matmul_settings
from tpu_stack.planner.kernels.cases import Case, array_bytes
from tpu_stack.planner.kernels.grouped_cases import EXPERTS
from tpu_stack.planner.kernels.setting import Setting
from tpu_stack.planner.kernels.targets import CompileTarget

TILES_FILE = Path(package.__file__).parent / "tiles.json"
BLOCK_AXES = "rows, K, N"
"""What the numbers of `tiles` count."""
SECTION = "tuned"
"""The key of tiles.json that holds the device kinds."""


def settings(case: Case, target: CompileTarget, shape: tuple[int, ...]) -> Iterator[Setting]:
    """The current setting, then every other that the kernel accepts; some occur twice."""
    kind, setting = target.device_kind, _sized(case, shape)
    yield setting(plan_of(case, shape, kind))
    for mode in SCALE_MODES:
        for bk in matmul_settings.K_BLOCKS:
            for bn in matmul_settings.widths(shape[2], kind):
                try:
                    plan = plan_of(case, shape, kind, tiles=(MOST_ROWS, bk, bn), scale_mode=mode)
                except ValueError:
                    continue  # the kernel refuses it at this shape
                yield setting(plan)


def plan_of(case: Case, shape: tuple[int, ...], kind: str, **options: Any) -> Plan:
    """The kernel's plan for the case at a shape on a device kind."""
    return grouped_cases.plan_of(case.format, case.activation, shape, kind, **options)


def entry_path(case: Case, shape: tuple[int, ...]) -> tuple[str, str]:
    """The keys of the case's entry under a device kind in tiles.json."""
    name = matmul_settings.tiles_name(case)
    if case.activation == "int8":
        name += "@int8"
    return name, regime_of(_rows_of_expert(shape))


def _rows_of_expert(shape: tuple[int, ...]) -> int:
    return math.ceil(shape[0] / EXPERTS)


def entry_of(
    case: Case, kind: str, shape: tuple[int, ...], tiles: tuple[int, ...], scale_mode: str | None
) -> dict[str, Any]:
    """The overrides of quantized_matmul's entry that make the setting the default."""
    average = _rows_of_expert(shape)
    name, x_dtype = matmul_settings.tiles_name(case), case.abstract(shape)["x"].dtype
    theirs, own = tuned(kind, name, average), tile_overrides(x_dtype, 0)
    entry = tuned(kind, name, average, own) | {"bk": tiles[1], "bn": tiles[2]}
    default = plan_of(case, shape, kind, tiles=(MOST_ROWS, *tiles[1:]))
    if mode_of(default) != scale_mode:
        now = normalized_rows(average, default.group)
        if scale_mode == "before":
            entry["after_group_rows_max"] = now - 1
        else:
            if "after_group_rows_max" in entry:
                entry["after_group_rows_max"] = max(now, entry["after_group_rows_max"])
            least = entry["after_group_min"]
            if least is None or default.group < least:
                entry["after_group_min"] = default.group
    return {name: value for name, value in entry.items() if value != theirs.get(name)}


def mode_of(plan: Plan) -> str | None:
    """The scale mode to pass for this plan; None when its tiles use several."""
    return None if "after_group" in plan.tile_schedule else plan.scale_mode


def _sized(case: Case, shape: tuple[int, ...]) -> Callable[[Plan], Setting]:
    """From a plan to its `Setting`, by the sizes of the case's arrays."""
    arrays = dict(case.abstract(shape))
    expert = sum(array_bytes(arrays[name]) for name in ("values", "scales")) / EXPERTS
    x = array_bytes(arrays["x"])
    out = sum(map(array_bytes, jax.tree.leaves(case.out_shape(shape))))
    call = case.nbytes(shape)

    def setting(plan: Plan) -> Setting:
        blocks = zip((plan.bm, plan.bk, plan.bn), shape, strict=True)
        m, k, n = (min(1.0, block / size) for block, size in blocks)
        step = expert * k * n + x * m * k + out * m * n
        return Setting(
            tiles=(plan.bm, plan.bk, plan.bn),
            scale_mode=mode_of(plan),
            block_bytes=step,
            call_bytes=call,
            vmem_bytes=2 * step + 4 * plan.bk * plan.bn + 8 * plan.bm * plan.bn,
        )

    return setting


def clear_cache() -> None:
    """Makes the next read load tiles.json again."""
    read_tiles.cache_clear()


def format_table(table: dict[str, Any]) -> str:
    """The text of tiles.json for a table."""
    return json.dumps(table, indent=2) + "\n"
