"""Settings of `quantize_rows` that the tuner tries: rows per block.

>>> case = get_case("quantize_rows", "int8", "bf16")
>>> next(settings(case, compile_target("7x"), (2048, 4096))).tiles
(64,)
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpu_stack.kernels import quantize_rows as package
from tpu_stack.kernels.quantize_rows.pallas_tpu import CHUNK, ROWS, block_rows, read_tiles
from tpu_stack.planner.kernels.cases import Case
from tpu_stack.planner.kernels.row_cases import TYPES
from tpu_stack.planner.kernels.setting import Setting
from tpu_stack.planner.kernels.targets import CompileTarget

TILES_FILE = Path(package.__file__).parent / "tiles.json"
BLOCK_AXES = "rows"
"""What the numbers of `tiles` count."""
SECTION = "tuned"
"""The key of tiles.json that holds the device kinds."""
BLOCKS = tuple(ROWS * 2**power for power in range(6))


def settings(case: Case, target: CompileTarget, shape: tuple[int, ...]) -> Iterator[Setting]:
    """The current setting, then all of `BLOCKS`; some occur twice."""
    m, k = shape
    current = block_rows(m, k, TYPES[case.format], target.device_kind)
    call = case.nbytes(shape)
    for requested in (None, *BLOCKS):
        rows = current if requested is None else min(m, requested)
        step = call * rows / m
        # VMEM holds two buffers and one chunk of columns as float32, bits and values.
        yield Setting((rows,), None, step, call, 2 * step + 16 * rows * min(k, CHUNK))


def entry_path(case: Case, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The keys of the case's entry under a device kind in tiles.json."""
    return (TYPES[case.format],)


def entry_of(
    case: Case, kind: str, shape: tuple[int, ...], tiles: tuple[int, ...], scale_mode: None = None
) -> int:
    """Elements of a block that make `tiles` the default at the shape."""
    return tiles[0] * shape[1]


def clear_cache() -> None:
    """Makes the next read load tiles.json again."""
    read_tiles.cache_clear()


def format_table(table: dict[str, Any]) -> str:
    """The text of tiles.json for a table."""
    return json.dumps(table, indent=2) + "\n"
