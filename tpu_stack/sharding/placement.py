"""From a profile, a mesh and a number of devices to a `Mesh` of the devices that are there.

On a TPU or GPU the mesh covers all devices. A CPU emulates the profile: the same axes and rules on
virtual CPU devices. These share the machine's cores and each holds its own copy of what a mesh
replicates, so there is one unless the caller asks for a mesh or shows one, as training does.

>>> profile, mesh = place("8t", "train", PlacementOptions(), [spec])
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from tpu_stack.errors import UserError
from tpu_stack.sharding.axes import TensorSpec

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from tpu_stack.sharding.profiles import Profile, Role

EMULATED_DEVICES = 8
"""Virtual CPU devices of an emulated mesh whose size nobody gave."""


@dataclass(frozen=True)
class PlacementOptions:
    """Where a program runs."""

    mesh: str | None = None
    """Axis sizes, such as data=2,fsdp=2,tensor=2; the default is the nearest legal mesh."""
    devices: int | None = None
    """Virtual CPU devices to emulate on; not for a TPU. The default is 8 where a mesh is emulated
    (training, or a profile with a topology), else 1."""


def place(
    profile_text: str,
    role: "Role",
    options: PlacementOptions,
    specs: Sequence[TensorSpec],
    *,
    emulate: bool | None = None,
) -> "tuple[Profile, Mesh]":
    """The profile as it will run, and its mesh.

    Args:
      profile_text: NAME[:TOPOLOGY].
      specs: the tensors that the mesh must divide.
      emulate: as in `devices_for`.

    Raises UserError when the profile, the options and the devices do not fit.
    """
    from tpu_stack.sharding.mesh import make_mesh
    from tpu_stack.sharding.profiles import get_profile

    profile = get_profile(profile_text, role)
    devices = devices_for(profile_text, role, options, emulate=emulate)
    if profile.chips is None or devices[0].platform == "cpu":
        profile = profile.emulate(len(devices), emulated=devices[0].platform == "cpu")
    elif profile.devices != len(devices):
        raise UserError(f"{profile.name} has {profile.devices} devices; here are {len(devices)}")
    profile = profile.with_mesh(options.mesh) if options.mesh else profile.fit(specs)
    profile.check(specs)
    return profile, make_mesh(profile.mesh, devices)


def place_two(
    prefill: str, decode: str, specs: Sequence[TensorSpec]
) -> "tuple[tuple[Profile, Mesh], tuple[Profile, Mesh]]":
    """Two serving profiles on separate devices, NAME:CHIPS each; on a CPU one device per chip.

    Raises UserError where a profile gives no number of chips, or they do not fit.
    """
    from tpu_stack.sharding.mesh import make_mesh
    from tpu_stack.sharding.profiles import get_profile

    on_cpu, profiles, counts = _on_cpu(), [], []
    for flag, text in (("prefill", prefill), ("decode", decode)):
        profile = get_profile(text, "serve")
        if profile.chips is None:
            raise UserError(f"{flag} is {text}; say on how many chips, as {text}:4")
        profiles.append(profile)
        counts.append(profile.chips if on_cpu else profile.devices)
    devices = start_devices(sum(counts) if on_cpu else None)
    if sum(counts) != len(devices):
        raise UserError(
            f"prefill {prefill} and decode {decode} need {sum(counts)} devices; here are"
            f" {len(devices)}"
        )
    sides = []
    for profile, count in zip(profiles, counts, strict=True):
        here, devices = devices[:count], devices[count:]
        profile = profile.emulate(count) if on_cpu else profile
        profile = profile.fit(specs)
        profile.check(specs)
        sides.append((profile, make_mesh(profile.mesh, here)))
    return sides[0], sides[1]


def devices_for(
    profile_text: str, role: "Role", options: PlacementOptions, *, emulate: bool | None = None
) -> list:
    """Starts JAX with the devices that `options` ask for, and returns them.

    Args:
      emulate: whether a CPU emulates a mesh where `options` and the profile give no size for one;
        the default is to do so for training.

    Raises UserError as `start_devices` does, and where `options` contradict themselves.
    """
    wanted = _wanted(role, options)
    if wanted is None and _on_cpu():
        emulate = role == "train" if emulate is None else emulate
        wanted = EMULATED_DEVICES if emulate or ":" in profile_text else 1
    return start_devices(wanted)


def start_devices(wanted: int | None) -> list:
    """The devices to run on: `wanted` virtual ones on a CPU, elsewhere all there are.

    The first call fixes the number of virtual devices, so verbs call this before anything that
    starts JAX's backend (opening a checkpoint does). No more than are wanted: a product on one of
    eight devices took a third longer than on one of one. Raises UserError where there are fewer.
    """
    import jax

    if _on_cpu():
        count = wanted or EMULATED_DEVICES
        try:
            so_far = jax.config.jax_num_cpu_devices
            jax.config.update("jax_num_cpu_devices", max(count, so_far))
        except RuntimeError:  # the backend has started: use the devices it has
            if len(jax.devices()) < count:
                raise UserError(
                    f"{count} devices are wanted and {len(jax.devices())} are running: their number"
                    " is fixed once JAX has started; ask for the larger mesh first, or for"
                    f" {len(jax.devices())}"
                ) from None
        return jax.devices()[:count]
    devices = jax.devices()
    if wanted is not None and wanted != len(devices):
        raise UserError(f"devices is for emulation on a CPU; here are {len(devices)} devices")
    return devices


def _wanted(role: "Role", options: PlacementOptions) -> int | None:
    """How many devices the options ask for; None when they leave it open."""
    from tpu_stack.sharding.profiles import parse_profile_mesh

    wanted = options.devices
    if options.mesh is not None:
        needed = prod(parse_profile_mesh(role, options.mesh).values())
        if wanted is not None and wanted != needed:
            raise UserError(f"mesh {options.mesh} has {needed} devices, and devices is {wanted}")
        wanted = needed
    if wanted is not None and wanted < 1:
        raise UserError(f"devices is {wanted}; it must be at least 1")
    return wanted


def choose_backend() -> None:
    """Without a TPU's device file JAX uses the CPU, so that libtpu is not probed; whoever set
    JAX_PLATFORMS, or has started JAX, has chosen already."""
    import jax

    has_tpu = any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
    if not has_tpu and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


def _on_cpu() -> bool:
    import jax

    choose_backend()
    return jax.config.jax_platforms == "cpu"
