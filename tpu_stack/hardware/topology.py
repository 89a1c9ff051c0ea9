"""Reading the topology half of a profile string, as in `8t:4x4x4` or `8i:8`.

The TPU compiler checks neither pod limits nor shapes, so this does: a plan for a slice that nobody
can rent fails here, in one line that names the nearest slices that exist (`hardware.slices`).

>>> parse_topology("4x4x4", get_chip("8t"))
Topology(sizes=(4, 4, 4), chips=64)
"""

import math
import re
from typing import NamedTuple

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import Chip
from tpu_stack.hardware.slices import require_slice

# Nine digits are more chips than any pod has, and bound the text that int() is given.
_SIZE = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)

_EXAMPLES = {2: "4x4", 3: "2x2x1"}


class Topology(NamedTuple):
    """Chips along each axis, and how many that makes. A plain count has one axis."""

    sizes: tuple[int, ...]
    chips: int


def parse_topology(text: str, chip: Chip, *, rentable: bool = True) -> Topology:
    """Reads "4x4x4", "4x4" or a plain count of *chips*, and checks it against the chip.

    Raises UserError when a size is not a whole number of at least 1, when the number of axes is
    not the torus's rank (a plain count fits every chip; Boardfly and cpu take nothing else), when
    there are more chips than a pod has, or, where it must be `rentable`, when no slice has this
    shape or count.
    """
    where = f"topology {text[:40]!r} of {chip.name}"
    parts = text.split("x")
    if not all(_SIZE.fullmatch(part) for part in parts):
        raise UserError(f"{where}: write {_form(chip)}, every size a whole number from 1 up")
    sizes = tuple(int(part) for part in parts)
    rank = chip.torus_rank
    if len(sizes) != 1 and len(sizes) != rank:
        kind = f"a {rank}D torus" if rank else _kind(chip)
        raise UserError(f"{where} has {len(sizes)} axes, but {chip.name} is {kind}: {_form(chip)}")
    chips = math.prod(sizes)
    if chip.pod_chips is not None and chips > chip.pod_chips.number:
        limit = chip.pod_chips
        raise UserError(f"{where} is {chips} chips; a pod has {limit.value} ({limit.source})")
    if rentable:
        require_slice(chip, sizes)
    return Topology(sizes, chips)


def _kind(chip: Chip) -> str:
    return "Boardfly" if chip.topology else "emulated"


def _form(chip: Chip) -> str:
    if chip.torus_rank:
        return f"{_EXAMPLES[chip.torus_rank]!r} or a count of chips such as '8'"
    return "a count of chips such as '8'"
