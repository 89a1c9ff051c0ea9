"""Replica groups in every printed form against groups built from a mesh's coordinates."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_stack.planner.hlo_groups import replica_groups, span_of

SIZES, NAMES = (2, 2, 2), ("data", "fsdp", "tensor")


@pytest.mark.parametrize(
    ("printed", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("{{0,2},{4,6},{1,3},{5,7}}", ("fsdp",)),
        ("{{4,0},{6,2},{1,5},{3,7}}", ("data",)),  # order within and between groups is free
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp", "tensor")),
        ("{{0,1,2,3,4,5,6,7}}", NAMES),
        ("{}", NAMES),
        ("[4,2]<=[8]", ("tensor",)),
        ("[4,2]<=[4,2]T(1,0)", ("fsdp",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("[4,2]<=[2,2,2]T(2,1,0)", ("data",)),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "tensor")),
        ("[1,8]<=[8]", NAMES),
        ("[8,1]<=[8]", ()),
        ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','fsdp'}", ("data", "fsdp")),
        ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'tensor','data'}", ("data", "tensor")),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("fsdp", "tensor")),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", ("fsdp",)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1':(2)2}", ("tensor",)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("tensor",)),
        ("mesh['a'=2,'b'=4], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("data", "tensor")),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("data",)),
        ("{{0,7},{1,6},{2,5},{3,4}}", None),
        ("{{0,1},{2,3}}", None),  # four devices are in no group
    ],
)
def test_printed_forms(printed, axes):
    span = span_of(f"channel_id=1, replica_groups={printed}, dimensions={{0}}", SIZES, NAMES)
    assert span.axes == axes
    if axes is not None:
        assert span.group_size == 2 ** len(axes)


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [
        ("{{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}", ("tensor",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("{{0,0},{1,2},{2,1},{3,3}}", ("fsdp", "tensor")),
        ("{{0,0},{1,1}}", ()),
    ],
)
def test_source_target_pairs(pairs, axes):
    assert span_of(f"channel_id=1, source_target_pairs={pairs}", SIZES, NAMES).axes == axes


def test_part_of_an_axis_is_unmatched_but_located():
    span = span_of("replica_groups={{0,1},{2,3},{4,5},{6,7}}", (2, 4), ("data", "tensor"))
    assert span.axes is None
    assert (span.group_size, span.within) == (2, ("tensor",))


def test_no_groups_printed():
    assert span_of("channel_id=1", SIZES, NAMES).axes is None


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    data=st.data(),
)
def test_every_axis_subset_is_found(sizes, data):
    """Groups built from the coordinates match their axes; those of size 1 are left out."""
    names = tuple("abcd"[: len(sizes)])
    subsets = [c for n in range(len(sizes) + 1) for c in combinations(range(len(sizes)), n)]
    chosen = data.draw(st.sampled_from(subsets))
    rest = [axis for axis in range(len(sizes)) if axis not in chosen]
    size = int(np.prod([sizes[axis] for axis in chosen]))
    groups = np.arange(int(np.prod(sizes))).reshape(sizes).transpose([*rest, *chosen])
    groups = groups.reshape(-1, size)
    lists = ",".join("{" + ",".join(map(str, group)) + "}" for group in groups)
    order = ",".join(map(str, [*rest, *chosen]))
    dims = ",".join(map(str, sizes))
    axes = ",".join(f"'{name}'={n}" for name, n in zip(names, sizes, strict=True))
    spanned = ",".join(f"'{names[axis]}'" for axis in chosen)
    expected = tuple(names[axis] for axis in chosen if sizes[axis] > 1)
    for printed in (
        f"{{{lists}}}",
        f"[{groups.shape[0]},{size}]<=[{dims}]T({order})",
        f"mesh[{axes}] {{{spanned}}}",
    ):
        attributes = f"replica_groups={printed}, use_global_device_ids=true"
        found = replica_groups(attributes, int(np.prod(sizes)))
        assert found is not None
        assert np.array_equal(np.asarray(found), groups)
        assert span_of(attributes, sizes, names).axes == expected
