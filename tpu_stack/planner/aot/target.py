"""Which topology of the TPU compiler stands for a profile, and what cannot be compiled for.

The compiler checks no pod limits and counts chips by names of its own; `tpu7x` has two JAX devices
per chip. It knows no TPU 8, for which 7x is the *proxy*: as many devices, other memory and links.

>>> topology_of(get_profile("8t:4x4x4")).name
'tpu7x:2x4x4'
"""

from dataclasses import dataclass

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import get_chip
from tpu_stack.hardware.topology import parse_topology
from tpu_stack.planner.links import cubic_topology
from tpu_stack.sharding.profiles import Profile

COMPILER_NAMES = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "7x": "tpu7x"}
"""Chip -> what `jax.experimental.topologies` calls it (libtpu 0.0.52)."""
PROXY = {"8t": "7x", "8i": "7x"}
"""Chip the compiler does not know -> the one that it compiles for instead."""


@dataclass(frozen=True)
class Topology:
    """A topology of the compiler. `name` is its own name of it, `chip` ours of the chip."""

    name: str
    chip: str
    devices: int


def topology_of(profile: Profile) -> Topology:
    """The compiler's topology with the devices of `profile`.

    A plain count of chips gets the topology nearest to a cube (square).

    Raises UserError for a profile without a topology, a chip that it neither knows nor has a proxy
    for, and devices that do not fill the proxy's chips or its pod.
    """
    if profile.chips is None:
        rank = profile.chip_facts.torus_rank
        example = {2: "4x4", 3: "2x2x1"}.get(rank or 0, "8")
        raise UserError(f"{profile.name}: say how many chips, as in {profile.chip}:{example}")
    if profile.chip in COMPILER_NAMES:
        sizes = parse_topology(profile.name.partition(":")[2], profile.chip_facts).sizes
        return _named(profile.chip, sizes)
    proxy = PROXY.get(profile.chip)
    if proxy is None:
        raise UserError(
            f"the TPU compiler cannot compile for {profile.chip};"
            f" known: {', '.join(COMPILER_NAMES)}; by proxy: {', '.join(PROXY)}"
        )
    per_chip = get_chip(proxy).devices(1)
    devices = profile.chip_facts.devices(profile.chips)
    if devices % per_chip:
        raise UserError(
            f"{profile.name} has {devices} devices, which do not fill chips of {proxy}"
            f" ({per_chip} devices each), the compiler's proxy for {profile.chip}"
        )
    try:
        sizes = parse_topology(str(devices // per_chip), get_chip(proxy)).sizes
    except UserError as error:
        raise UserError(f"no proxy for {profile.name}: {error}") from None
    return _named(proxy, sizes)


def _named(name: str, sizes: tuple[int, ...]) -> Topology:
    chip = get_chip(name)
    chips = parse_topology("x".join(map(str, sizes)), chip).chips
    if len(sizes) == 1:
        cube = cubic_topology(chip, chips)
        sizes = (*(s for s in cube if s > 1), *(s for s in cube if s == 1))  # 2x2x1, not 1x2x2
        if chip.torus_rank == 2:
            sizes = cube
    text = f"{COMPILER_NAMES[name]}:{'x'.join(map(str, sizes))}"
    return Topology(text, name, chip.devices(chips))
