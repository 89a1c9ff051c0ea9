"""Keeping what `tune` found: winners in tiles.json, as the kernel reads it.

>>> write_winners([(case, "v6e", (16, 4096, 14336), winner)])
['quantized_matmul int4 bf16']
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.files import write_text
from tpu_stack.hardware import get_chip
from tpu_stack.kernels import quantized_matmul as package
from tpu_stack.kernels.quantized_matmul.tiles import read_tiles, tuned
from tpu_stack.planner.kernels.cases import Case
from tpu_stack.planner.kernels.targets import libtpu_version
from tpu_stack.planner.kernels.tune import ROW_BLOCKS, Candidate, plan_of, regime
from tpu_stack.quant import get_format

TILES_FILE = Path(package.__file__).parent / "tiles.json"


def tiles_name(case: Case) -> str:
    """What tiles.json calls the case's weight: its stored type, but some are told apart."""
    fmt = get_format(case.format)
    if case.format == "nvfp4":
        return case.format
    special = {"int2": "int2" if fmt.offset else "ternary", "int32": "int1"}
    return special.get(fmt.storage, fmt.storage)


def entry_of(case: Case, kind: str, shape: tuple[int, ...], winner: Candidate) -> dict[str, Any]:
    """The entry of tiles.json with which the kernel does by default what won.

    `bm` is the block that was asked for, not cut to M. A scale mode that would not be the default
    moves the bound that stands in its way, so that the shape and group of the case are on its side.
    """
    decode = regime(shape[0]) == "decode"
    entry = tuned(kind, tiles_name(case), shape[0]) | {
        "bm": ROW_BLOCKS["decode"][0] if decode else winner.tiles[0],
        "bk": winner.tiles[1],
        "bn": winner.tiles[2],
    }
    default = plan_of(case, shape, kind, tiles=winner.tiles)
    if default.scale_mode == winner.scale_mode:
        return entry
    if winner.scale_mode == "after_group":
        return entry | {"after_group_from": default.group}
    if default.as_bytes:
        entry["bytes_rows"] = default.rows_as_bytes - 1
    least = entry["after_group_from"]
    if least is not None and default.group >= least:
        entry["after_group_from"] = 2 * default.group
    return entry


def write_winners(
    found: Iterable[tuple[Case, str, tuple[int, ...], Candidate]], path: Path = TILES_FILE
) -> list[str]:
    """Puts winners into tiles.json, beside the others, with this libtpu's version.

    The file has one entry for all formats stored as one type (int4 of any group), so of these the
    first is written. Returns the names of the cases that were.

    Raises: UserError when the file was tuned with another version: its other entries would then be
      passed off as this one's. Remove them, or install that version.
    """
    table = json.loads(path.read_text())
    if table["libtpu"] != libtpu_version():
        raise UserError(
            f"{path.name} was tuned with libtpu {table['libtpu']}, and this is "
            f"{libtpu_version()}: tune with that version, or empty the file first"
        )
    written: dict[tuple[str, str, str], str] = {}
    for case, chip, shape, winner in found:
        place = (get_chip(chip).device_kinds[0], tiles_name(case), regime(shape[0]))
        if place not in written:
            kind, weight, when = place
            entries = table["tiles"].setdefault(kind, {}).setdefault(weight, {})
            entries[when] = entry_of(case, kind, shape, winner)
            written[place] = case.name
    write_text(path, tiles_text(table))
    read_tiles.cache_clear()
    return list(written.values())


def tiles_text(table: dict[str, Any]) -> str:
    """tiles.json as it is kept: indented, with one line per regime."""
    lines = ["{", f'  "libtpu": {json.dumps(table["libtpu"])},', '  "tiles": {']
    kinds = []
    for kind, formats in table["tiles"].items():
        blocks = []
        for name, regimes in formats.items():
            rows = [f"        {json.dumps(k)}: {json.dumps(v)}" for k, v in regimes.items()]
            blocks.append(f"      {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n      }")
        kinds.append(f"    {json.dumps(kind)}: {{\n" + ",\n".join(blocks) + "\n    }")
    return "\n".join([*lines, ",\n".join(kinds), "  }", "}"]) + "\n"
