"""Block sizes as data: tiles.json, by device kind, format and regime."""

import functools
import json
from pathlib import Path
from typing import Any

DECODE_M = 64
"""Up to this many rows a call is memory-bound and takes the decode tiles."""


@functools.cache
def read_tiles() -> dict[str, Any]:
    """tiles.json: `libtpu`, the version they were found with, and `tiles` by device kind."""
    return json.loads((Path(__file__).parent / "tiles.json").read_text())


def tuned(kind: str, weight: str, m: int) -> dict[str, Any]:
    """The entry of a device kind, a format and a regime; "default" stands in for what is missing.

    Returns: {"bm", "bk", "bn", "after_group_from", "quarters_from"}. `after_group_from` is the
      narrowest group that gets a product of its own by default, wasting what it leaves of the
      MXU's depth; None: none does. `quarters_from` is the same for 2-bit weights as bytes
      (`quarters.py`); None: never as bytes, whatever is asked.
    """
    table = read_tiles()["tiles"]
    regime = "decode" if m <= DECODE_M else "prefill"
    for entry in (table.get(kind, {}), table["default"]):
        for name in (weight, "default"):
            if regime in entry.get(name, {}):
                return table["default"]["default"][regime] | entry[name][regime]
    raise KeyError(f"tiles.json has no default for {regime}")
