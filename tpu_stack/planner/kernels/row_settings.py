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
BLOCKS_OF = "rows"
"""What the numbers of tiles count."""
SECTION = "tuned"
"""Of tiles.json that device kinds are in."""
BLOCKS = tuple(ROWS * 2**power for power in range(6))


def settings(case: Case, target: CompileTarget, shape: tuple[int, ...]) -> Iterator[Setting]:
    """The current setting, then all of `BLOCKS`; some of them may be the same."""
    m, k = shape
    current = block_rows(m, k, TYPES[case.format], target.device_kind)
    call = case.nbytes(shape)
    for asked in (None, *BLOCKS):
        rows = current if asked is None else min(m, asked)
        step = call * rows / m
        # In VMEM: two buffers, and one chunk of columns in float32, bits and values.
        yield Setting((rows,), None, step, call, 2 * step + 16 * rows * min(k, CHUNK))


def place_of(case: Case, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Where in a device kind's part of tiles.json the case's entry is."""
    return (TYPES[case.format],)


def entry_of(
    case: Case, kind: str, shape: tuple[int, ...], tiles: tuple[int, ...], scale_mode: None = None
) -> int:
    """Elements of a block with which `tiles` are the default at the shape."""
    return tiles[0] * shape[1]


def forget() -> None:
    """Has tiles.json read again."""
    read_tiles.cache_clear()


def tiles_text(table: dict[str, Any]) -> str:
    """tiles.json as it is kept."""
    return json.dumps(table, indent=2) + "\n"
