"""Topology strings: what is read, and the one line that says what is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_stack.errors import UserError
from tpu_stack.hardware import CHIP_NAMES, get_chip, parse_topology


@pytest.mark.parametrize(
    ("chip", "text", "sizes", "chips"),
    [
        ("8t", "4x4x4", (4, 4, 4), 64),
        ("8t", "2x2x1", (2, 2, 1), 4),
        ("8t", "9600", (9600,), 9600),
        ("8i", "8", (8,), 8),
        ("8i", "1024", (1024,), 1024),
        ("8t", "8x8x16", (8, 8, 16), 1024),
        ("7x", "1", (1,), 1),
        ("v5e", "16x16", (16, 16), 256),
        ("v6e", "4x4", (4, 4), 16),
        ("v6e", "8", (8,), 8),
        ("v5p", "16x20x28", (16, 20, 28), 8960),
        ("cpu", "8", (8,), 8),
    ],
)
def test_good(chip, text, sizes, chips):
    assert parse_topology(text, get_chip(chip)) == (sizes, chips)


@pytest.mark.parametrize(
    ("chip", "text", "says"),
    [
        ("8t", "4x4", "has 2 axes, but 8t is a 3D torus: '2x2x1' or a count"),
        ("v5e", "2x2x1", "has 3 axes, but v5e is a 2D torus: '4x4' or a count"),
        ("8i", "2x4", "has 2 axes, but 8i is Boardfly: a count of chips such as '8'"),
        ("cpu", "2x4", "has 2 axes, but cpu is emulated"),
        ("8t", "0x4x4", "from 1 up"),
        ("8t", "-1x4x4", "from 1 up"),
        ("8t", "4xx4", "from 1 up"),
        ("8t", "4x4x", "from 1 up"),
        ("8t", "4.0x4x4", "from 1 up"),
        ("8t", " 4x4x4", "from 1 up"),
        ("8t", "", "from 1 up"),
        ("8t", "٤x4x4", "from 1 up"),
        ("8i", "1_0", "from 1 up"),
        ("8i", "9" * 5000, "from 1 up"),
        ("8t", "3x5x7", "is no slice that can be rented; nearest: 4x4x4 (64 chips) or 4x4x8 (128"),
        ("8t", "100", "nearest: 64 (4x4x4) or 128 (4x4x8)"),
        ("8i", "5", "nearest: 4 or 8"),
        ("v5e", "3x3", "nearest: 2x4 (8 chips) or 4x4 (16 chips)"),
        ("v6e", "2", "nearest: 1 (1x1) or 4 (2x2)"),
        ("v5e", "16x17", "is 272 chips; a pod has 256 (GD)"),
        ("8i", "1025", "is 1025 chips; a pod has 1024 (DD)"),
        ("8t", "32x32x32", "is 32768 chips; a pod has 9600 (DD)"),
    ],
)
def test_bad(chip, text, says):
    with pytest.raises(UserError) as error:
        parse_topology(text, get_chip(chip))
    message = str(error.value)
    assert says in message
    assert f"of {chip}" in message
    assert len(message) < 200
    assert "\n" not in message


@given(text=st.text(alphabet="0123456789x- .\n", max_size=12), name=st.sampled_from(CHIP_NAMES))
def test_reads_or_raises_a_user_error_and_never_exceeds_the_pod(text, name):
    chip = get_chip(name)
    try:
        sizes, chips = parse_topology(text, chip)
    except UserError:
        return
    assert "x".join(str(size) for size in sizes) == text
    assert chips >= 1
    assert chip.pod_chips is None or chips <= chip.pod_chips.number
