"""Slices: which can be rented, the nearest to one that cannot, and which axes wrap."""

from itertools import product
from math import prod

import pytest

from tpu_stack.errors import UserError
from tpu_stack.hardware import SLICES, get_chip, shape_of_count, wraps
from tpu_stack.hardware.slices import require_slice


@pytest.mark.parametrize(
    ("chip", "sizes", "want"),
    [
        ("v5p", (4, 4, 4), (True, True, True)),
        ("v5p", (4, 4, 12), (True, True, True)),
        ("v5p", (2, 4, 4), (False, False, False)),
        ("v4", (2, 2, 1), (False, False, False)),
        ("7x", (8, 8, 8), (True, True, True)),
        ("8t", (4, 4, 4), (True, True, True)),
        ("v5e", (8, 8), (False, False)),
        ("v5e", (8, 16), (False, True)),
        ("v6e", (16, 16), (True, True)),
        ("8i", (64,), (False,)),
        ("cpu", (8,), (False,)),
    ],
)
def test_which_axes_wrap(chip, sizes, want):
    assert wraps(get_chip(chip), sizes) == want


@pytest.mark.parametrize(
    ("chip", "chips", "want"),
    [
        ("8t", 64, (4, 4, 4)),
        ("8t", 16, (2, 2, 4)),
        ("v5p", 320, (4, 4, 20)),  # 4x8x10 is nearer to a cube, and nobody can rent it
        ("v5p", 2, (1, 2, 1)),
        ("v6e", 16, (4, 4)),
        ("8i", 8, (8,)),
        ("7x", 2, (2, 1, 1)),
        ("7x", 96, (4, 4, 6)),
        ("8t", 7, (7, 1, 1)),
    ],
)
def test_the_slice_of_a_count(chip, chips, want):
    assert shape_of_count(get_chip(chip), chips) == want


def rentable(name: str, sizes: tuple[int, ...]) -> bool:
    """Google's rule in its own words, for a 3D chip: a host or two hosts high, or whole cubes of
    4x4x4, the sizes in increasing order."""
    if sizes in {(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)}:
        return True
    if sizes in {(1, 1, 1)} and name != "v4":
        return True
    return all(size % 4 == 0 for size in sizes) and list(sizes) == sorted(sizes)


@pytest.mark.parametrize("name", ["v4", "7x", "8t"])
def test_every_shape_up_to_twelve_is_rented_or_refused_by_the_rule(name):
    for sizes in product(range(1, 13), repeat=3):
        try:
            require_slice(get_chip(name), sizes)
        except UserError:
            assert not rentable(name, sizes), sizes
        else:
            assert rentable(name, sizes), sizes


@pytest.mark.parametrize(
    ("chip", "sizes", "says"),
    [
        ("8t", (3, 5, 7), "nearest: 4x4x4 (64 chips) or 4x4x8 (128 chips) (no shapes are public"),
        ("8t", (105,), "nearest: 64 (4x4x4) or 128 (4x4x8)"),
        ("8t", (8, 4, 4), "nearest: 4x4x8 (128 chips)"),
        ("8i", (2,), "nearest: 1 or 4 (no shapes are public; assumed"),
        ("v6e", (4, 2), "nearest: 2x4 (8 chips)"),
        ("v6e", (12, 12), "nearest: 8x16 (128 chips) or 16x16 (256 chips)"),
        ("v6e", (3,), "nearest: 1 (1x1) or 4 (2x2)"),
        ("v4", (1, 1, 1), "nearest: 2x2x1 (4 chips)"),
        ("v5p", (2, 8, 8), "nearest: 4x4x8 (128 chips)"),
        ("7x", (16, 24, 24), ""),
        ("v5p", (12, 12, 60), ""),
    ],
)
def test_what_is_no_slice_is_refused_with_the_nearest(chip, sizes, says):
    text = "x".join(map(str, sizes))
    if not says:
        require_slice(get_chip(chip), sizes)
        return
    with pytest.raises(UserError) as error:
        require_slice(get_chip(chip), sizes)
    message = str(error.value)
    assert says in message
    assert f"{text!r} of {chip}" in message
    assert "\n" not in message


def test_every_chip_has_a_source_and_says_what_is_assumed():
    for name, rule in SLICES.items():
        assert rule.source, name
        assert rule.assumed == (name in ("8t", "8i"))
        chip = get_chip(name)
        assert {len(sizes) for sizes in rule.small} == {chip.torus_rank or 1}
        for sizes in rule.small:
            require_slice(chip, sizes)
            require_slice(chip, (prod(sizes),))
