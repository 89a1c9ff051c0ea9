"""Tuned block sizes and strategy thresholds: tiles.json, by device kind, format and regime.

>>> tuned("TPU v6 lite", "int2", m=16)["bn"]
2048
"""

import functools
import json
from pathlib import Path
from typing import Any

DECODE_M = 64
"""A call of at most this many rows is memory-bound and takes the decode tiles."""
_ALIASES = {
    "TPU v5e": "TPU v5 lite",
    "TPU v6e": "TPU v6 lite",
    "TPU v5p": "TPU v5",
    "TPU8t": "TPU7x",
    "TPU8i": "TPU7x",
}
"""Device kinds that use another kind's tiles: other spellings, and TPU 8, which has no public
compiler and is taken to resemble 7x."""


@functools.cache
def read_tiles() -> dict[str, Any]:
    """tiles.json: `libtpu`, the version it was tuned with, and `tiles` by device kind."""
    return json.loads((Path(__file__).parent / "tiles.json").read_text())


def tiles_kind(kind: str) -> str:
    """The key of a device kind in tiles.json files."""
    return _ALIASES.get(kind, kind)


def regime_of(m: int) -> str:
    """ "decode" or "prefill" for a call of M rows."""
    return "decode" if m <= DECODE_M else "prefill"


def tuned(
    kind: str, weight: str, m: int, overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The entry for a device kind, format and regime; "default" fills in what is missing.

    overrides: entries of another op, by device kind, format and regime, that replace these.

    Returns: block sizes "bm", "bk", "bn", and

    - "after_group_min": the smallest group that defaults to scale mode "after_group", which wastes
      the rest of the MXU's depth; None for never.
    - "plane_rows_max": most rows, of x times the groups in the MXU's depth, at which the kernel
      decodes the weight to e5m2 planes (e5m2_planes.py); 0 for never.
    - "tile_schedule": `Plan.tile_schedule`; empty for none.
    - "schedule_rows_max": most rows, counted in the same way, at which the schedule may contain
      "after_group".

    Raises: KeyError when not even "default" has the regime.
    """
    table = read_tiles()["tiles"]
    regime = regime_of(m)
    others = (overrides or {}).get(tiles_kind(kind), {}).get(weight, {}).get(regime, {})
    for entry in (table.get(tiles_kind(kind), {}), table["default"]):
        for name in (weight, "default"):
            if regime in entry.get(name, {}):
                return table["default"]["default"][regime] | entry[name][regime] | others
    raise KeyError(f"tiles.json has no default for {regime}")
