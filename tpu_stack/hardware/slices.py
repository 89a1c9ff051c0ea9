"""Which slices of each chip can be rented, and which of their axes wrap round.

The shape of a slice decides its links: an axis that wraps is a ring, an axis that does not is a
line, and XLA chooses its collectives by that. Shapes and wrap are data here, each with its source.

>>> wraps(get_chip("v5p"), (4, 4, 4)), wraps(get_chip("v5p"), (2, 4, 4))
((True, True, True), (False, False, False))
"""

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import log, prod
from typing import Literal

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import Chip, get_chip

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class SliceRule:
    """The slices of one chip.

    Attributes:
      small: the shapes that are listed one by one, in chips along each axis.
      block: every axis of a larger slice is a multiple of this, in non-decreasing order, up to a
        pod; None where `small` lists all slices.
      wrap: which axes close into rings. "blocks": all where every axis is a multiple of 4, else
        none. "16": each axis of 16. "none": no axis is a ring.
      source: where this is documented.
      assumed: no source documents it; it is another chip's rule.
    """

    small: tuple[Sizes, ...]
    block: int | None
    wrap: Literal["blocks", "16", "none"]
    source: str
    assumed: bool = False


_SMALL_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_ALL_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_TABLE = "AI-Hypercomputer/xpk system_characteristics.py"
_WRAP = "wrap: AI-Hypercomputer/maxtext accelerator_to_spec_map.py"
_ASSUMED = "no shapes are public; assumed to be 7x's"

SLICES: dict[str, SliceRule] = {
    "v4": SliceRule(
        _SMALL_3D, 4, "blocks",
        f"GD tpu/docs/types-topologies: A <= B <= C, all at most 4 or multiples of 4; {_WRAP}",
    ),
    "v5e": SliceRule(_ALL_2D, None, "16", f"GD tpu/docs/v5e, table of 2D slice shapes; {_WRAP}"),
    "v5p": SliceRule(
        ((1, 1, 1), (1, 2, 1), *_SMALL_3D), 4, "blocks",
        "GD tpu/docs/v5p, table of topologies and 'all 4x4x4 and larger slices have full 3D torus"
        f" connectivity'; more in {_TABLE}; below a host of 4, machines ct5p-hightpu-1t and -2t"
        f" (the order of 1x2x1 is assumed); {_WRAP}",
    ),
    "v6e": SliceRule(_ALL_2D, None, "16", f"GD tpu/docs/v6e, table of topologies; {_WRAP}"),
    "7x": SliceRule(
        ((1, 1, 1), *_SMALL_3D), 4, "blocks",
        f"GD tpu/docs/tpu7x and {_TABLE}; wrap: as v5p, which GD calls similar",
    ),
    "8t": SliceRule(((1, 1, 1), *_SMALL_3D), 4, "blocks", _ASSUMED, assumed=True),
    "8i": SliceRule(((1,), (4,), (8,), (16,), (32,)), 64, "none", _ASSUMED, assumed=True),
}  # fmt: skip
"""Chip -> its slices. GD: Google Cloud's documentation. 8i is no torus: its slices are counts."""


def wraps(chip: Chip, sizes: Sizes) -> tuple[bool, ...]:
    """Whether each axis of a slice of `sizes` chips closes into a ring."""
    rule = SLICES.get(chip.name)
    kind = rule.wrap if rule else "none"
    if kind == "16":
        return tuple(size == 16 for size in sizes)
    return (kind == "blocks" and all(size % 4 == 0 for size in sizes),) * len(sizes)


@cache
def _shapes(name: str) -> tuple[Sizes, ...]:
    """Every slice of a chip by number of chips; of as many chips, the nearest to a cube first."""
    rule, chip = SLICES[name], get_chip(name)
    found = list(rule.small)
    if rule.block and chip.pod_chips:
        found += _multiples(rule.block, len(rule.small[0]), int(chip.pod_chips.number), rule.block)
    return tuple(sorted(found, key=lambda sizes: (prod(sizes), sum(sizes), sizes)))


def _multiples(block: int, rank: int, chips: int, least: int) -> list[Sizes]:
    """Shapes of at most `chips`: `rank` multiples of `block` from `least` up, shortest first."""
    if rank == 0:
        return [()]
    longest = int(chips ** (1 / rank) + 1e-9)  # the first axis is the shortest
    return [
        (size, *rest)
        for size in range(least, longest + 1, block)
        for rest in _multiples(block, rank - 1, chips // size, size)
    ]


def shape_of_count(chip: Chip, chips: int) -> Sizes:
    """The slice of `chips` chips that is nearest to a cube (2D: to a square).

    A chip that is no torus has one axis, of `chips`. A count that no slice has gets the torus
    nearest to a cube, with axes of one chip last.
    """
    if chip.torus_rank is None:
        return (chips,)
    same = [sizes for sizes in _shapes(chip.name) if prod(sizes) == chips]
    return same[0] if same else _nearest_cube(chips, chip.torus_rank)


def _nearest_cube(chips: int, rank: int) -> Sizes:
    divisors = [d for d in range(1, chips + 1) if chips % d == 0]
    shapes = {
        tuple(sorted((*head, chips // prod(head))))
        for head in product(divisors, repeat=rank - 1)
        if chips % prod(head) == 0
    }
    best = min(shapes, key=lambda shape: (sum(shape), shape))
    return (*(s for s in best if s > 1), *(s for s in best if s == 1))


def is_slice(chip: Chip, sizes: Sizes) -> bool:
    """Whether a slice of the chip has these sizes, or this count of chips; always True on cpu."""
    if chip.name not in SLICES:
        return True
    shapes = _shapes(chip.name)
    return sizes in shapes or (len(sizes) == 1 and any(prod(s) == sizes[0] for s in shapes))


def require_slice(chip: Chip, sizes: Sizes) -> None:
    """Raises UserError, naming the nearest slices, unless the chip has a slice of these sizes.

    `sizes` has the axes of the chip's slices, or one number: a count of chips.
    """
    if is_slice(chip, sizes):
        return
    rule, shapes, count = SLICES[chip.name], _shapes(chip.name), len(sizes) == 1
    why = f" ({rule.source})" if rule.assumed else ""
    near = " or ".join(_text(shape, count) for shape in _nearest(shapes, sizes))
    text = "x".join(map(str, sizes))
    raise UserError(
        f"topology {text!r} of {chip.name} is no slice that can be rented; nearest: {near}{why}"
    )


def _nearest(shapes: tuple[Sizes, ...], sizes: Sizes) -> list[Sizes]:
    """The slice most alike of as many chips, else of the next smaller and the next larger count."""

    def unlike(shape: Sizes) -> float:
        if len(shape) != len(sizes):
            return sum(shape)
        pairs = zip(sorted(shape), sorted(sizes), strict=True)
        return sum(log(a / b) ** 2 for a, b in pairs)

    chips = prod(sizes)
    counts = sorted({prod(shape) for shape in shapes})
    wanted = [chips] if chips in counts else []
    if not wanted:
        wanted = [c for c in counts if c < chips][-1:] + [c for c in counts if c > chips][:1]
    return [min((s for s in shapes if prod(s) == c), key=unlike) for c in wanted]


def _text(shape: Sizes, count: bool) -> str:
    text, chips = "x".join(map(str, shape)), prod(shape)
    if len(shape) == 1:
        return text
    return f"{chips} ({text})" if count else f"{text} ({chips} chips)"
