"""Block sizes as data: tiles.json, by device kind, format and regime."""

import functools
import json
from pathlib import Path
from typing import Any

DECODE_M = 64
"""Up to this many rows a call is memory-bound and takes the decode tiles."""
_ALIASES = {
    "TPU v5e": "TPU v5 lite",
    "TPU v6e": "TPU v6 lite",
    "TPU v5p": "TPU v5",
    "TPU8t": "TPU7x",
    "TPU8i": "TPU7x",
}
"""Device kinds that take another's tiles: called otherwise in tiles.json, or, as TPU 8, of which no
compiler is public, taken to be like it."""


@functools.cache
def read_tiles() -> dict[str, Any]:
    """tiles.json: `libtpu`, the version they were found with, and `tiles` by device kind."""
    return json.loads((Path(__file__).parent / "tiles.json").read_text())


def tiles_kind(kind: str) -> str:
    """What tiles.json files call a device kind."""
    return _ALIASES.get(kind, kind)


def regime_of(m: int) -> str:
    """The regime of a call of M rows."""
    return "decode" if m <= DECODE_M else "prefill"


def tuned(kind: str, weight: str, m: int, own: dict[str, Any] | None = None) -> dict[str, Any]:
    """The entry of a device kind, a format and a regime; "default" stands in for what is missing.

    own: another op's entries, by device kind, format and regime, of what it has otherwise.

    Returns: "bm", "bk", "bn", and

    - "after_group_from": the narrowest group that gets a product of its own by default, wasting
      what it leaves of the MXU's depth; None: none does.
    - "bytes_rows": up to how many rows, those of x times the groups in the MXU's depth, weights are
      multiplied as bytes (`as_bytes.py`); 0: never.
    - "ways": those in which a block's tiles are multiplied in turn (`by_stripes.py`); none: all
      alike. "ways_rows": up to how many rows, counted so, "after" is one of them.
    """
    table = read_tiles()["tiles"]
    regime = regime_of(m)
    others = (own or {}).get(tiles_kind(kind), {}).get(weight, {}).get(regime, {})
    for entry in (table.get(tiles_kind(kind), {}), table["default"]):
        for name in (weight, "default"):
            if regime in entry.get(name, {}):
                return table["default"]["default"][regime] | entry[name][regime] | others
    raise KeyError(f"tiles.json has no default for {regime}")
