"""Which devices a program gets: what it asks for, a mesh that it shows, else one CPU device."""

import jax
import pytest

from tpu_stack.errors import UserError
from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.presets import get_preset
from tpu_stack.sharding.placement import (
    EMULATED_DEVICES,
    PlacementOptions,
    devices_for,
    place,
    place_two,
)

SPECS = tensor_specs(get_preset("nano"))


@pytest.mark.parametrize(
    ("profile", "role", "options", "emulate", "count"),
    [
        ("8i", "serve", {}, None, 1),
        ("8t", "train", {}, None, EMULATED_DEVICES),
        ("8t", "train", {}, False, 1),
        ("8i", "serve", {}, True, EMULATED_DEVICES),
        ("8i:4", "serve", {}, None, EMULATED_DEVICES),
        ("8i", "serve", {"devices": 2}, None, 2),
        ("8i", "serve", {"mesh": "data=2,tensor=2"}, None, 4),
        ("8t", "train", {"mesh": "fsdp=2"}, None, 2),
        ("8t", "train", {"devices": 1}, True, 1),
    ],
)
def test_devices(profile, role, options, emulate, count):
    placement = PlacementOptions(**options)
    assert devices_for(profile, role, placement, emulate=emulate) == jax.devices()[:count]
    placed, mesh = place(profile, role, placement, SPECS, emulate=emulate)
    assert mesh.size == count
    assert dict(mesh.shape) == dict(placed.mesh)  # what manifests record
    assert placed.emulated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "devices is 0; it must be at least 1"),
        ({"mesh": "tensor=2", "devices": 4}, "mesh tensor=2 has 2 devices, and devices is 4"),
        ({"devices": 9}, "9 devices are wanted and 8 are running"),
        ({"mesh": "tensor=3"}, "'kv_heads' has 2 parts"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        place("8i", "serve", PlacementOptions(**options), SPECS)


def test_two_meshes_share_no_device():
    (prefill, one), (decode, other) = place_two("8t:4", "8i:4", SPECS)
    assert (one.size, other.size) == (4, 4)
    assert (dict(one.shape), dict(other.shape)) == (dict(prefill.mesh), dict(decode.mesh))
    assert not set(one.devices.flat) & set(other.devices.flat)
    with pytest.raises(UserError, match="decode is 8i; say on how many chips, as 8i:4"):
        place_two("8t:4", "8i", SPECS)
