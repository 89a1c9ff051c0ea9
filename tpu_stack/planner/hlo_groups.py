"""Finds the mesh axes that a collective spans, from the device groups XLA printed.

XLA prints groups in three forms: lists (`{{0,1},{2,3}}`), transposed iotas
(`[4,2]<=[2,2,2]T(0,2,1)`) and named meshes (`mesh['data'=2,'fsdp'=4] {'fsdp'}`). The numbers are
positions in the program's device assignment, which for JAX is the order of `mesh.devices.flat`, not
hardware ids; a mesh over permuted devices shows it (tests/planner/test_hlo_programs.py).

>>> span_of("replica_groups=[4,2]<=[8], ...", (2, 2, 2), ("data", "fsdp", "tensor")).axes
('tensor',)
"""

import re
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np

_INTEGERS = re.compile(r"\d+")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<axes>[^\]]*)\]"
    r"(?:, ?device_ids=\((?:\[(?P<dims>[\d,]+)\]T\((?P<order>[\d,]+)\)|(?P<ids>[\d,]+))\))?"
    r" ?\{(?P<spanned>[^}]*)\}"
)


class Span(NamedTuple):
    """What a collective spans.

    `axes` are mesh axes in mesh order, without those of size 1; None when the groups are no full
    set of mesh axes ("unmatched"). `group_size` counts the devices of one group. `within` names
    the smallest axes that contain each group: equal to `axes` when they match.
    """

    axes: tuple[str, ...] | None
    group_size: int
    within: tuple[str, ...]


def replica_groups(attributes: str, devices: int) -> np.ndarray | list[list[int]] | None:
    """The groups in any of the three forms; `{}` means one group of all; None when not printed."""
    if mesh := _MESH.search(attributes):
        return _mesh_groups(mesh)
    if iota := _IOTA.search(attributes):
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    if lists := _LISTS.search(attributes):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", lists[1])]
        return groups or [list(range(devices))]
    return None


def source_target_pairs(attributes: str) -> np.ndarray | None:
    """The (source, target) pairs of a collective-permute, shape [P, 2]; None when not printed."""
    match = _PAIRS.search(attributes)
    return np.array(_numbers(match[1])).reshape(-1, 2) if match else None


@lru_cache(maxsize=4096)
def span_of(attributes: str, sizes: tuple[int, ...], names: tuple[str, ...]) -> Span:
    """Matches the groups or pairs in an instruction's attributes against a mesh's axes.

    Groups match a set of axes when they are exactly the mesh's slices along it, in any order.
    Pairs span the axes along which any source and target differ. Without groups or pairs the span
    is unmatched, with a group size of 0.
    """
    coordinates = np.stack(np.unravel_index(np.arange(prod(sizes)), sizes), axis=1)
    pairs = source_target_pairs(attributes)
    groups = pairs if pairs is not None else replica_groups(attributes, prod(sizes))
    if groups is None:
        return Span(None, 0, ())
    varies = np.zeros(len(sizes), bool)
    for group in groups:
        members = coordinates[np.asarray(group, int)]
        varies |= (members != members[:1]).any(axis=0)
    within = tuple(name for name, moved in zip(names, varies, strict=True) if moved)
    full = prod(size for size, moved in zip(sizes, varies, strict=True) if moved)
    if pairs is not None:
        return Span(within, full, within)
    members = [int(device) for group in groups for device in group]
    complete = sorted(members) == list(range(prod(sizes)))
    exact = complete and all(len(group) == full for group in groups)
    return Span(within if exact else None, max(map(len, groups)), within)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in _INTEGERS.findall(text)]


def _iota(dims: str, order: str | None) -> np.ndarray:
    sizes = _numbers(dims)
    axes = _numbers(order) if order else list(range(len(sizes)))
    return np.arange(prod(sizes)).reshape(sizes).transpose(axes).reshape(-1)


def _mesh_groups(match: re.Match[str]) -> np.ndarray:
    """Expands `mesh['a'=2,'b'=4] {'b'}`; `'b':(1)2` is a part of an axis: (stride) size."""
    axes = dict(re.findall(r"'?([\w.\-]+)'?=(\d+)", match["axes"]))
    sizes = {name: int(size) for name, size in axes.items()}
    chosen = re.findall(r"'?([A-Za-z_][\w.\-]*)'?(?::\((\d+)\)(\d+))?", match["spanned"])
    devices = np.arange(prod(sizes.values()))
    if match["dims"]:
        devices = _iota(match["dims"], match["order"])
    elif match["ids"]:
        devices = np.array(_numbers(match["ids"]))
    dims: list[int] = []
    picked: dict[tuple[str, int], int] = {}
    for name, size in sizes.items():
        cuts = {1, size}
        for axis, before, part in chosen:
            if axis == name and before:
                cuts |= {int(before), int(before) * int(part)}
        edges = sorted(cuts)
        for low, high in pairwise(edges):
            picked[name, low] = len(dims)
            dims.append(high // low)
    inner: list[int] = []
    for axis, before, part in chosen:
        start = int(before or 1)
        stop = start * int(part) if part else sizes[axis]
        inner += [
            dim for (name, low), dim in picked.items() if name == axis and start <= low < stop
        ]
    outer = [dim for dim in range(len(dims)) if dim not in inner]
    group = prod(dims[dim] for dim in inner)
    return devices.reshape(dims).transpose([*outer, *inner]).reshape(-1, group)
