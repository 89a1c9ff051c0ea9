"""What grouped_matmul has otherwise than quantized_matmul's tiles: tiles.json.

A block of few rows is cheap to multiply where each row is scaled by groups, yet at 16 rows an
expert nearly every block holds the ends of two experts, whose weights are then widened twice.

>>> own_tiles("bfloat16", 16)["TPU7x"]["int4"]["decode"]
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

SCALED_FIRST = {"after_group_from": None, "bytes_rows": 0, "ways_rows": 0}
"""The bounds of an entry whose scales are applied before the product."""


@functools.cache
def read_tiles() -> dict[str, Any]:
    """tiles.json: `libtpu`, and in `tuned`, by device kind, format and regime, what differs from
    quantized_matmul's entries. "FORMAT@int8" is for rows of int8, in FORMAT's place.

    An entry's "after_rows" is up to which `load_of` scales are applied after the product, where
    they would be at all; without it, always.
    """
    return json.loads((Path(__file__).parent / "tiles.json").read_text())


def load_of(rows: int, group: int) -> int:
    """Rows that an expert gets on average, in proportion to groups of 64: half as long ones take
    twice as long to scale after the product."""
    return math.ceil(rows * 64 / group)


def own_tiles(x_dtype: Any, load: int) -> dict[str, Any]:
    """`own` of `quantized_matmul.tiles.tuned` for rows of this dtype and a `load_of` them."""
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
    return entry | SCALED_FIRST if load > entry.get("after_rows", load) else entry
