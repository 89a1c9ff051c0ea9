"""Which topology of the TPU compiler stands for a profile, and what cannot be compiled for.

The compiler checks no pod limits, counts chips by names of its own, and takes every axis for open
unless told that it wraps. XLA chooses its collectives by that: on an open grid it may gather
weights by all-reduce, where a torus takes all-gathers. `tpu7x` has two JAX devices per chip. The
compiler knows no TPU 8, for which 7x is the *proxy*: as many devices, other memory and links.

>>> topology_of(get_profile("8t:4x4x4")).name
'tpu7x:2x4x4'
"""

from dataclasses import dataclass
from math import prod
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import get_chip
from tpu_stack.hardware.slices import shape_of_count, wraps
from tpu_stack.hardware.topology import parse_topology
from tpu_stack.sharding.profiles import Profile

COMPILER_NAMES = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "7x": "tpu7x"}
"""Chip -> what `jax.experimental.topologies` calls it (libtpu 0.0.52)."""
CHIP_CONFIGS = {"v4": "megacore", "v5p": "megacore"}
"""Chip -> the configuration in which its two cores are one device; "default" for the others."""
PROXY = {"8t": "7x", "8i": "7x"}
"""Chip the compiler does not know -> the one that it compiles for instead."""
HOST = (2, 2, 1)
"""Chips of one host along each axis, where the slice has as many."""


@dataclass(frozen=True)
class Topology:
    """A topology of the compiler.

    Attributes:
      name: its own name of it. chip: ours of the chip. devices: JAX devices.
      wrap: which axes close into rings, as slices of this shape have them.
      chip_config, host: the cores of a device, and the chips of a host along three axes.
    """

    name: str
    chip: str
    devices: int
    wrap: tuple[bool, ...]
    chip_config: str
    host: tuple[int, int, int]

    @property
    def options(self) -> dict[str, Any]:
        """What `jax.experimental.topologies.get_topology_desc` takes beside the name; of three axes
        even on a 2D torus (libtpu 0.0.52)."""
        return {
            "chip_config_name": self.chip_config,
            "chips_per_host_bounds": self.host,
            "num_slices": 1,
            "wrap": (*self.wrap, *(False,) * (3 - len(self.wrap))),
        }


def topology_of(profile: Profile) -> Topology:
    """The compiler's topology with the devices of `profile`, wired as the slice is.

    A plain count of chips gets the slice nearest to a cube (square). Where the slice that a proxy
    stands for is a torus, the proxy's axes of more than two chips wrap.

    Raises UserError for a profile without a topology, a chip that it neither knows nor has a proxy
    for, and devices that do not fill the proxy's chips or its pod.
    """
    if profile.chips is None:
        rank = profile.chip_facts.torus_rank
        example = {2: "4x4", 3: "2x2x1"}.get(rank or 0, "8")
        raise UserError(f"{profile.name}: say how many chips, as in {profile.chip}:{example}")
    sizes = _shape(profile)
    if profile.chip in COMPILER_NAMES:
        return _named(profile.chip, sizes, wraps(profile.chip_facts, sizes))
    proxy = PROXY.get(profile.chip)
    if proxy is None:
        raise UserError(
            f"the TPU compiler cannot compile for {profile.chip};"
            f" known: {', '.join(COMPILER_NAMES)}; by proxy: {', '.join(PROXY)}"
        )
    chip = get_chip(proxy)
    devices, per_chip = profile.chip_facts.devices(profile.chips), chip.devices(1)
    if devices % per_chip:
        raise UserError(
            f"{profile.name} has {devices} devices, which do not fill chips of {proxy}"
            f" ({per_chip} devices each), the compiler's proxy for {profile.chip}"
        )
    chips = devices // per_chip
    if chip.pod_chips is not None and chips > chip.pod_chips.number:
        raise UserError(
            f"no proxy for {profile.name}: it takes {chips} chips of {proxy}, and a pod has"
            f" {chip.pod_chips.value}"
        )
    stand_in = shape_of_count(chip, chips)
    wrap = wraps(chip, stand_in)
    if all(wraps(profile.chip_facts, sizes)):
        wrap = tuple(size > 2 for size in stand_in)
    return _named(proxy, stand_in, wrap)


def is_torus(profile: Profile) -> bool:
    """Whether every axis of the profile's slice closes into a ring; an emulated one is open."""
    return profile.chips is not None and all(wraps(profile.chip_facts, _shape(profile)))


def _shape(profile: Profile) -> tuple[int, ...]:
    """Chips along each axis of the profile's slice; a count of chips off the torus."""
    chip = profile.chip_facts
    sizes = parse_topology(profile.name.partition(":")[2], chip).sizes
    return shape_of_count(chip, sizes[0]) if len(sizes) == 1 else sizes


def _named(name: str, sizes: tuple[int, ...], wrap: tuple[bool, ...]) -> Topology:
    text = f"{COMPILER_NAMES[name]}:{'x'.join(map(str, sizes))}"
    x, y, z = (*sizes, 1)[:3]
    return Topology(
        name=text,
        chip=name,
        devices=get_chip(name).devices(prod(sizes)),
        wrap=wrap,
        chip_config=CHIP_CONFIGS.get(name, "default"),
        host=(min(x, HOST[0]), min(y, HOST[1]), min(z, HOST[2])),
    )
