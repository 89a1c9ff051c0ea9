"""Writes the winners that `tune` found into the op's tiles.json, which the kernel reads.

Example:
    write_winners([(case, "v6e", (16, 4096, 14336), winner)])  # ['quantized_matmul int4 bf16']
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tpu_stack.errors import UserError
from tpu_stack.files import write_text
from tpu_stack.hardware import get_chip
from tpu_stack.planner.kernels.cases import Case
from tpu_stack.planner.kernels.settings import family_of
from tpu_stack.planner.kernels.targets import libtpu_version
from tpu_stack.planner.kernels.tune import Candidate


def write_winners(
    found: Sequence[tuple[Case, str, tuple[int, ...], Candidate]], path: Path | None = None
) -> list[str]:
    """Puts winners, all of one op, into its tiles.json or `path`; other entries stay.

    Formats stored as one dtype (int4 of any group) share an entry, so only the first of them is
    written. Returns the names of the cases that were written.

    Raises: UserError when the file was tuned with another version of libtpu than is installed: its
      other entries would be taken for this version's.
    """
    (op,) = {case.op for case, *_ in found}
    family = family_of(op)
    path = Path(path or family.TILES_FILE)
    table = json.loads(path.read_text())
    if table["libtpu"] != libtpu_version():
        raise UserError(
            f"{path.name} was tuned with libtpu {table['libtpu']}, and this is "
            f"{libtpu_version()}: tune with that version, or empty the file first"
        )
    written: dict[tuple[str, ...], str] = {}
    for case, chip, shape, winner in found:
        kind = get_chip(chip).device_kinds[0]
        place = (family.SECTION, kind, *family.entry_path(case, shape))
        if place in written:
            continue
        at = table
        for key in place[:-1]:
            at = at.setdefault(key, {})
        at[place[-1]] = family.entry_of(case, kind, shape, winner.tiles, winner.scale_mode)
        written[place] = case.name
    write_text(path, family.format_table(table))
    family.clear_cache()
    return list(written.values())
