"""Collective times against the scaling-book's worked answers and a hop-by-hop count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_stack.errors import UserError
from tpu_stack.hardware import AxisLinks, axis_links, get_chip

VOLUME = 2048 * 8192 * 2  # the book's bf16[2048, 8192]


def test_scaling_book_quiz_all_gather_on_a_v5e_line_of_four():
    """'3 * 8.4e6 / 4.5e10 = 560us': 4 chips of a v5e have no wraparound link."""
    links = axis_links(get_chip("v5e"), 4, ring=False)
    assert links == AxisLinks(4, 45e9, "line")
    assert links.all_gather_s(VOLUME) == pytest.approx(560e-6, rel=0.01)


def test_scaling_book_quiz_small_arrays_cost_hops():
    links = axis_links(get_chip("v5e"), 4, ring=False)
    assert links.all_gather_s(256 * 256 * 2) == pytest.approx(3e-6)


def test_ring_formulas_reach_the_book_s_in_the_limit_of_many_members():
    """V / W, V / W, 2 V / W and V / (4 W), where W is both ways of a link."""
    links, both_ways = AxisLinks(1000, 45e9, hop_s=0), 90e9
    assert links.all_gather_s(VOLUME) == pytest.approx(VOLUME / both_ways, rel=2e-3)
    assert links.reduce_scatter_s(VOLUME) == links.all_gather_s(VOLUME)
    assert links.all_reduce_s(VOLUME) == 2 * links.all_gather_s(VOLUME)
    assert links.all_to_all_s(VOLUME) == pytest.approx(VOLUME / (4 * both_ways), rel=1e-12)


def test_by_hand():
    ring = AxisLinks(4, 100.0, hop_s=0)
    assert ring.all_gather_s(800) == 3.0  # 3 shards of 200 over two directions of 100
    assert ring.all_to_all_s(800) == 1.0  # 800 * 4/16 / 200
    assert ring.permute_s(200) == 2.0
    line = AxisLinks(4, 100.0, "line", hop_s=0)
    assert line.all_gather_s(800) == 6.0
    assert line.all_to_all_s(800) == 2.0
    direct = AxisLinks(4, 100.0, "direct", hop_s=0)
    assert direct.all_gather_s(800) == 6.0
    assert direct.all_to_all_s(800) == 1.5  # 3 pieces of 50


def _busiest_link_in_all_to_all(n: int, kind: str) -> float:
    """Pieces over the busiest one-way link when every member sends one piece to every other."""
    load: dict[tuple[int, int], float] = {}
    for source in range(n):
        for target in range(n):
            if source == target:
                continue
            forward = (target - source) % n
            if kind == "line":
                routes = [(abs(target - source), 1 if target > source else -1, 1.0)]
            elif 2 * forward == n:
                routes = [(forward, 1, 0.5), (forward, -1, 0.5)]
            else:
                routes = [(forward, 1, 1.0) if 2 * forward < n else (n - forward, -1, 1.0)]
            for distance, step, share in routes:
                for hop in range(distance):
                    link = ((source + step * hop) % n, step)
                    load[link] = load.get(link, 0.0) + share
    return max(load.values())


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 9, 16])
@pytest.mark.parametrize("kind", ["ring", "line"])
def test_all_to_all_equals_the_busiest_link_counted_hop_by_hop(n, kind):
    links = AxisLinks(n, 1.0, kind, hop_s=0)
    assert links.all_to_all_s(n**2) == pytest.approx(_busiest_link_in_all_to_all(n, kind))


@pytest.mark.parametrize("kind", ["ring", "line", "direct"])
def test_one_member_moves_nothing(kind):
    links = AxisLinks(1, 45e9, kind, max_hops=7)
    assert links.all_gather_s(1e9) == links.all_to_all_s(1e9) == links.permute_s(1e9) == 0
    assert links.all_reduce_s(1e9) == 0


@given(
    n=st.integers(2, 64),
    kind=st.sampled_from(["ring", "line", "direct"]),
    volume=st.floats(0, 1e15),
)
def test_never_under_the_hops_and_grows_with_bytes(n, kind, volume):
    links = AxisLinks(n, 45e9, kind)
    for time in (links.all_gather_s, links.all_reduce_s, links.all_to_all_s):
        assert time(volume) >= links.hops * 1e-6
        assert time(2 * volume) >= time(volume)
    assert links.all_to_all_s(volume) <= links.all_gather_s(volume)


def test_links_per_chip():
    assert axis_links(get_chip("8t"), 4, ring=True) == AxisLinks(4, 200e9, "ring")
    assert axis_links(get_chip("8i"), 16, ring=False) == AxisLinks(8, 1.2e12, "direct", max_hops=7)
    within_a_chip = axis_links(get_chip("8i"), 2, ring=False)
    assert within_a_chip.all_reduce_s(1e9) == 0  # no figure
    assert axis_links(get_chip("7x"), 8, ring=True) == AxisLinks(4, 100e9, "ring")
    # The two devices of a chip on different axes: both axes use the same links.
    shared = axis_links(get_chip("7x"), 8, ring=True, whole_chips=False)
    assert shared == AxisLinks(8, 50e9, "ring")
    with pytest.raises(ValueError, match="do not fill"):
        axis_links(get_chip("7x"), 3, ring=False, whole_chips=True)
    with pytest.raises(UserError, match="chip cpu has no ici"):
        axis_links(get_chip("cpu"), 8, ring=False)


def test_not_an_axis():
    for n, rate in ((0, 1.0), (4, 0.0)):
        with pytest.raises(ValueError, match="not an axis"):
            AxisLinks(n, rate)
