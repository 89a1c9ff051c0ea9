"""Where grouped_matmul's tuned entries differ from quantized_matmul's: tiles.json.

Small blocks of rows are cheap in scale mode "after_group". But at 16 rows per expert nearly every
block holds the ends of two experts, and the kernel decodes both weights.

>>> tile_overrides("bfloat16", 16)["TPU7x"]["int4"]["decode"]["plane_rows_max"]
0
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

SCALED_FIRST = {"after_group_min": None, "plane_rows_max": 0, "schedule_rows_max": 0}
"""An entry's thresholds that make scale mode "before" the default."""


@functools.cache
def read_tiles() -> dict[str, Any]:
    """tiles.json: `libtpu`, the version it was tuned with, and in `tuned` the overrides of
    quantized_matmul's entries by device kind, format and regime.

    "FORMAT@int8" replaces FORMAT for int8 activations. "after_group_rows_max" is the most
    `normalized_rows` at which scale mode "after_group" may be the default; no bound without it.
    """
    return json.loads((Path(__file__).parent / "tiles.json").read_text())


def normalized_rows(rows: int, group: int) -> int:
    """Mean rows per expert, weighted by 64 / group: halving the group doubles the time that
    scaling after the product takes."""
    return math.ceil(rows * 64 / group)


def tile_overrides(x_dtype: Any, load: int) -> dict[str, Any]:
    """`overrides` of `quantized_matmul.tiles.tuned` for activations of `x_dtype`.

    load: of `normalized_rows`.
    """
    mark = f"@{jnp.dtype(x_dtype).name}"
    found: dict[str, Any] = {}
    for kind, formats in read_tiles()["tuned"].items():
        names = sorted(name for name in formats if "@" not in name or name.endswith(mark))
        found[kind] = {
            name.removesuffix(mark): {
                regime: _entry(entry, load) for regime, entry in formats[name].items()
            }
            for name in names  # FORMAT before FORMAT@...
        }
    return found


def _entry(entry: dict[str, Any], load: int) -> dict[str, Any]:
    return entry | SCALED_FIRST if load > entry.get("after_group_rows_max", load) else entry
