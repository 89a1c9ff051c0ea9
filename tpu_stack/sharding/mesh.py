"""Meshes: named axes with sizes, as text, as arithmetic, and as a `jax.sharding.Mesh`.

>>> mesh_text(parse_mesh("fsdp=4,tensor=2", ("data", "fsdp", "tensor")))
'data=1,fsdp=4,tensor=2'
"""

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding

from tpu_stack.errors import UserError
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.rules import Rules

_SIZE = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)  # as many digits as no pod needs


def parse_mesh(text: str, axis_names: Sequence[str]) -> dict[str, int]:
    """`"fsdp=4,tensor=2"` as sizes for every one of `axis_names`; axes not named get 1."""
    given: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in axis_names:
            raise UserError(f"mesh {text!r}: no axis {name!r}; this profile has {list(axis_names)}")
        if name in given:
            raise UserError(f"mesh {text!r} names {name!r} twice")
        if not _SIZE.fullmatch(size):
            raise UserError(f"mesh {text!r}: size of {name!r} must be a positive whole number")
        given[name] = int(size)
    return dict.fromkeys(axis_names, 1) | given


def mesh_text(sizes: Mapping[str, int]) -> str:
    """`{"data": 1, "fsdp": 4}` as `"data=1,fsdp=4"`."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these axis sizes over `devices` (default: all), in an order fit for their torus.

    Raises UserError when there are fewer devices than the sizes ask for.
    """
    devices = list(jax.devices() if devices is None else devices)
    needed = prod(sizes.values())
    if needed > len(devices):
        raise UserError(
            f"mesh {mesh_text(sizes)} needs {needed} devices, and there are {len(devices)}"
        )
    auto = (AxisType.Auto,) * len(sizes)
    shape = tuple(sizes.values())
    if devices[0].platform == "tpu" and needed == len(devices):
        try:
            return jax.make_mesh(shape, tuple(sizes), axis_types=auto, devices=devices)
        except NotImplementedError:  # an axis that fits no whole axes of the torus, as 8 on 4x4
            laid_out = create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(laid_out, tuple(sizes), axis_types=auto)
    return Mesh(np.array(devices[:needed]).reshape(shape), tuple(sizes), axis_types=auto)


def batch_sharding(rules: Rules, mesh: Mesh, rank: int = 2) -> NamedSharding:
    """How [B, T, ...] inputs are laid out: rows over the batch axes, the rest replicated."""
    return NamedSharding(mesh, rules.partition_spec((BATCH, *(None,) * (rank - 1))))
