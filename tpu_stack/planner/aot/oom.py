"""Reads the TPU compiler's out-of-memory message: how much, of how much, and what is largest.

Two forms are known. libtpu 0.0.52 mostly gives up before scheduling ("E1000: CompileTimeHbmOom",
temporaries only, no list); a program that fails while buffers are assigned gets the long form,
"Used 63.80G of 30.75G hbm", with "Largest program allocations" (as in erfanzar/EasyDeL#166).

>>> read_oom("... HLO temporaries (28.50G) exceeds available HBM (15.75G). ...").limit_bytes
16911433728
"""

import re
from dataclasses import dataclass

from tpu_stack.planner.aot.result import Allocation

_SIZE = r"([\d.]+)([KMGT]?)i?B?"
_EARLY = re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_LATE = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TOTAL = re.compile(rf"Total hbm usage >= {_SIZE}")
_MARKS = ("Ran out of memory", "HbmOom", "exceeds available HBM")
_SCALE = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Oom:
    """The parsed message: bytes of one device, None where it does not say."""

    used_bytes: int | None
    limit_bytes: int | None
    used_is_temporaries: bool
    largest: tuple[Allocation, ...]


def read_oom(message: str) -> Oom | None:
    """What an error message says of HBM; None when it is about something else."""
    if not any(mark in message for mark in _MARKS) or "vmem" in message.lower():
        return None
    early = _EARLY.search(message)
    if early:
        return Oom(_bytes(early[1], early[2]), _bytes(early[3], early[4]), True, ())
    late, total = _LATE.search(message), _TOTAL.search(message)
    used = limit = None
    if late:
        used, limit = _bytes(late[1], late[2]), _bytes(late[3], late[4])
    if total:
        used = max(used or 0, _bytes(total[1], total[2]))
    return Oom(used, limit, False, tuple(_allocations(message)))


def _allocations(message: str) -> list[Allocation]:
    """The numbered entries after "Largest program allocations in hbm:"."""
    _, _, listed = message.partition("Largest program allocations in hbm:")
    found = []
    for entry in re.split(r"\n\s*\d+\.\s+(?=Size:)", listed)[1:]:
        fields = dict(re.findall(r"(Size|Operator|Shape|Allocation type): *([^\n]*)", entry))
        size = re.match(_SIZE, fields.get("Size", ""))
        if size is None:
            continue
        operator = fields.get("Operator", "")
        name = _NAME.search(operator)
        found.append(
            Allocation(
                bytes=_bytes(size[1], size[2]),
                shape=fields.get("Shape", ""),
                operator=name[1] if name else operator,
                kind=fields.get("Allocation type", ""),
            )
        )
    return sorted(found, key=lambda item: -item.bytes)


def _bytes(number: str, scale: str) -> int:
    return int(float(number) * _SCALE[scale])
