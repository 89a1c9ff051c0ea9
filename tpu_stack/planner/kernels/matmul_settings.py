"""Settings of `quantized_matmul` that the tuner tries: tiles and scale modes.

>>> case = get_case("quantized_matmul", "int4", "bf16")
>>> next(settings(case, compile_target("v6e"), (16, 4096, 14336))).tiles
(16, 4096, 1024)
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from tpu_stack.kernels import quantized_matmul as package
from tpu_stack.kernels.quantized_matmul import SCALE_MODES, Plan, make_plan
from tpu_stack.kernels.quantized_matmul.blocks import columns_per_core
from tpu_stack.kernels.quantized_matmul.operands import cores_of
from tpu_stack.kernels.quantized_matmul.tiles import read_tiles, regime_of, tuned
from tpu_stack.planner.kernels.cases import Case, array_bytes
from tpu_stack.planner.kernels.setting import Setting
from tpu_stack.planner.kernels.targets import CompileTarget
from tpu_stack.quant import get_format

ROW_BLOCKS = {"decode": (64,), "prefill": (256, 512, 1024)}
K_BLOCKS = (512, 1024, 2048, 4096)
N_BLOCKS = (512, 1024, 2048)
TILES_FILE = Path(package.__file__).parent / "tiles.json"
BLOCK_AXES = "M, K, N"
"""What the numbers of `tiles` count."""
SECTION = "tiles"
"""The key of tiles.json that holds the device kinds."""


def settings(case: Case, target: CompileTarget, shape: tuple[int, ...]) -> Iterator[Setting]:
    """The current setting, then every other that the kernel accepts; some occur twice."""
    kind, nbytes = target.device_kind, _Bytes.of(case, shape)
    current = plan_of(case, shape, kind)
    requested = [((current.bm, current.bk, current.bn), current.scale_mode)]
    requested += [
        ((bm, bk, bn), mode)
        for mode in SCALE_MODES
        for bm in ROW_BLOCKS[regime_of(shape[0])]
        for bk in K_BLOCKS
        for bn in widths(shape[2], kind)
    ]
    for tiles, mode in requested:
        try:
            plan = plan_of(case, shape, kind, tiles=tiles, scale_mode=mode)
        except ValueError:
            continue  # the kernel refuses it at this shape
        cut = (plan.bm, plan.bk, plan.bn)
        step = nbytes.of_step(shape, cut)
        widened = 4 * plan.bk * plan.bn + 8 * plan.bm * plan.bn
        yield Setting(cut, mode, step, nbytes.of_call(shape, cut), 2 * step + widened)


def widths(n: int, kind: str) -> list[int]:
    """Block widths to try for N columns, equal for all cores of a device."""
    return [columns_per_core(n, width, cores_of(kind)) for width in N_BLOCKS]


def plan_of(case: Case, shape: tuple[int, ...], kind: str, **options: Any) -> Plan:
    """The kernel's plan for the case at a shape on a device kind; options as in `make_plan`."""
    arrays = dict(case.abstract(shape))
    x, values, scales = (arrays.pop(name) for name in ("x", "values", "scales"))
    offset = get_format(case.format).offset
    return make_plan(x, values, scales, offset=offset, kind=kind, **arrays, **options)


def tiles_name(case: Case) -> str:
    """The case's format in tiles.json: its dtype, or the format where several share a dtype."""
    fmt = get_format(case.format)
    if case.format == "nvfp4":
        return case.format
    special = {"int2": "int2" if fmt.offset else "ternary", "int32": "int1"}
    return special.get(fmt.storage, fmt.storage)


def entry_of(
    case: Case, kind: str, shape: tuple[int, ...], tiles: tuple[int, ...], scale_mode: str | None
) -> dict[str, Any]:
    """The entry of tiles.json that makes the winner the default.

    `bm` is 64 for decode, whatever M is, else the winner's. For a scale mode that is not the
    default, the thresholds move so that the case's shape and group select it.
    """
    decode = regime_of(shape[0]) == "decode"
    entry = tuned(kind, tiles_name(case), shape[0]) | {
        "bm": ROW_BLOCKS["decode"][0] if decode else tiles[0],
        "bk": tiles[1],
        "bn": tiles[2],
    }
    return entry | _bounds(entry, plan_of(case, shape, kind, tiles=tiles), scale_mode)


def _bounds(entry: dict[str, Any], default: Plan, scale_mode: str | None) -> dict[str, Any]:
    """The thresholds to change for the scale mode in an entry whose plan is `default`."""
    if default.scale_mode == scale_mode:
        return {}
    if scale_mode == "after_group":
        return {"after_group_min": default.group}
    moved = {"plane_rows_max": default.plane_rows - 1} if default.uses_planes else {}
    least = entry["after_group_min"]
    if least is not None and default.group >= least:
        moved["after_group_min"] = 2 * default.group
    return moved


def entry_path(case: Case, shape: tuple[int, ...]) -> tuple[str, str]:
    """The keys of the case's entry under a device kind in tiles.json."""
    return tiles_name(case), regime_of(shape[0])


@dataclass(frozen=True)
class _Bytes:
    """Packed bytes of the weight with its scales, of x and of the result."""

    weight: int
    x: int
    out: int

    @classmethod
    def of(cls, case: Case, shape: tuple[int, ...]) -> "_Bytes":
        arrays = case.abstract(shape)
        weight = sum(array_bytes(arrays[name]) for name in ("values", "scales"))
        out = sum(map(array_bytes, jax.tree.leaves(case.out_shape(shape))))
        return cls(weight, array_bytes(arrays["x"]), out)

    def of_step(self, shape: tuple[int, ...], tiles: tuple[int, int, int]) -> float:
        """Bytes that one grid step loads and stores."""
        m, k, n = (min(1.0, block / size) for block, size in zip(tiles, shape, strict=True))
        return self.weight * k * n + self.x * m * k + self.out * m * n

    def of_call(self, shape: tuple[int, ...], tiles: tuple[int, int, int]) -> float:
        """Bytes that a call moves: the result once, the weight once per block of M, and x once per
        block of N, or once where one block holds all of K."""
        m, k, n = (math.ceil(size / block) for block, size in zip(tiles, shape, strict=True))
        return self.weight * m + self.x * (n if k > 1 else 1) + self.out


def clear_cache() -> None:
    """Makes the next read load tiles.json again."""
    read_tiles.cache_clear()


def format_table(table: dict[str, Any]) -> str:
    """The text of tiles.json for a table: indented, with one line per regime."""
    lines = ["{", f'  "libtpu": {json.dumps(table["libtpu"])},', '  "tiles": {']
    kinds = []
    for kind, formats in table["tiles"].items():
        blocks = []
        for name, regimes in formats.items():
            rows = [f"        {json.dumps(k)}: {json.dumps(v)}" for k, v in regimes.items()]
            blocks.append(f"      {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n      }")
        kinds.append(f"    {json.dumps(kind)}: {{\n" + ",\n".join(blocks) + "\n    }")
    return "\n".join([*lines, ",\n".join(kinds), "  }", "}"]) + "\n"
