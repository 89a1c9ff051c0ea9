"""Meshes and profiles: what they parse, refuse, and keep when they are shrunk or fitted."""

import dataclasses
from math import prod

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from tpu_stack.errors import UserError
from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.presets import get_preset
from tpu_stack.sharding.axes import TensorSpec
from tpu_stack.sharding.constrain import constrain, sharding_scope
from tpu_stack.sharding.mesh import batch_sharding, make_mesh, mesh_text, parse_mesh
from tpu_stack.sharding.profiles import MESH_AXES, RULES, get_profile, require_batch_divides

TRAIN_AXES = ("data", "fsdp", "tensor")


def test_parse_mesh():
    assert parse_mesh("fsdp=4,tensor=2", TRAIN_AXES) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert parse_mesh("", TRAIN_AXES) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert list(parse_mesh("tensor=2,data=3", TRAIN_AXES)) == list(
        TRAIN_AXES
    )  # the profile's order


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model=4", "no axis 'model'"),
        ("fsdp", "'fsdp' must be a positive whole number"),
        ("fsdp=0", "'fsdp' must be a positive"),
        ("fsdp=-2", "'fsdp' must be a positive"),
        ("fsdp=two", "'fsdp' must be a positive"),
        ("fsdp=1.5", "'fsdp' must be a positive"),
        ("fsdp=\u00b2", "'fsdp' must be a positive"),  # isdigit() is true of a superscript two
        ("fsdp=" + "9" * 5000, "'fsdp' must be a positive"),  # int() refuses so many digits
        ("4x2", "no axis '4x2'"),
        ("fsdp=2,fsdp=4", "'fsdp' twice"),
    ],
)
def test_mesh_text_that_does_not_parse(text, said):
    with pytest.raises(UserError, match=said):
        parse_mesh(text, TRAIN_AXES)


@settings(deadline=None)
@given(sizes=st.fixed_dictionaries({axis: st.integers(1, 10**6) for axis in TRAIN_AXES}))
def test_mesh_text_reads_back(sizes):
    assert parse_mesh(mesh_text(sizes), TRAIN_AXES) == sizes


def test_make_mesh():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()
    assert (
        make_mesh({"data": 1, "tensor": 2}, jax.devices()[4:]).devices.flat[0] == jax.devices()[4]
    )
    with pytest.raises(UserError, match="mesh data=3,tensor=4 needs 12 devices, and there are 8"):
        make_mesh({"data": 3, "tensor": 4})
    assert batch_sharding(RULES["train"], mesh, 3).spec == P(("data", "fsdp"), None, None)


def test_profile_strings():
    training, serving = get_profile("8t"), get_profile("8i:8")
    assert (training.role, training.chips, training.devices) == ("train", None, 1)
    assert tuple(training.mesh) == MESH_AXES["train"]
    assert (training.precision.params, training.precision.compute) == ("float32", "bfloat16")
    # 8i has two devices a chip, and serves on tensor parallelism alone.
    assert serving.mesh == {"data": 1, "tensor": 16}
    assert (serving.role, serving.chips, serving.precision.cache) == ("serve", 8, "bfloat16")
    assert get_profile("8t:4x4x4").mesh == {"data": 1, "fsdp": 64, "tensor": 1}
    assert get_profile("v5e:4x4", "serve").mesh == {"data": 1, "tensor": 16}
    assert get_profile("8i:4", "train").mesh == {"data": 1, "fsdp": 8, "tensor": 1}
    assert get_profile("8t:4x4x4").chip_facts.name == "8t"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("9t", "unknown chip '9t'"),
        ("", "unknown chip ''"),
        ("8T", "did you mean '8t'"),
        ("v6:4x4", "unknown chip 'v6'.*did you mean 'v6e'"),
        ("8t:4x4", "topology '4x4' of 8t"),
        ("8t:4x4xfour", "topology '4x4xfour' of 8t"),
        ("v5e:400x400", "v5e"),
    ],
)
def test_profiles_that_are_refused(text, said):
    with pytest.raises(UserError, match=said):
        get_profile(text)


def test_with_mesh():
    profile = get_profile("8t:4x4x4").with_mesh("data=2,fsdp=8,tensor=4")
    assert profile.mesh == {"data": 2, "fsdp": 8, "tensor": 4}
    with pytest.raises(UserError, match="has 32 devices, and 8t:4x4x4 has 64"):
        profile.with_mesh("fsdp=8,tensor=4")
    assert get_profile("8t").with_mesh("fsdp=6").devices == 6  # without a topology any size will do
    with pytest.raises(UserError, match="no axis 'fsdp'"):
        get_profile("8i").with_mesh("fsdp=2")


PROFILES = st.sampled_from(
    ["8t", "8t:4x4x4", "8t:4x4x8", "8i", "8i:8", "v5e:4x4", "7x:2x2x2", "cpu"]
)


@settings(deadline=None)
@given(text=PROFILES, n=st.integers(1, 96))
def test_emulate_keeps_everything_but_the_mesh(text, n):
    profile = get_profile(text)
    small = profile.emulate(n)
    assert small.emulated
    assert small.devices == prod(small.mesh.values()) == n
    assert dataclasses.replace(small, mesh=profile.mesh, emulated=False) == profile
    assert list(small.mesh) == list(profile.mesh)
    if profile.chips is not None:  # axes that were 1 stay 1
        assert all(small.mesh[axis] == 1 for axis, size in profile.mesh.items() if size == 1)


def test_emulate_examples():
    assert get_profile("8t").emulate(8).mesh == {"data": 2, "fsdp": 2, "tensor": 2}
    assert get_profile("8i").emulate(8).mesh == {"data": 2, "tensor": 4}
    assert get_profile("8t:4x4x4").with_mesh("fsdp=16,tensor=4").emulate(8).mesh == {
        "data": 1,
        "fsdp": 4,
        "tensor": 2,
    }
    assert not get_profile("8t").emulate(4, emulated=False).emulated
    with pytest.raises(UserError, match="cannot emulate on 0 devices"):
        get_profile("8t").emulate(0)


def square(embed: int, heads: int) -> TensorSpec:
    return TensorSpec("w", (embed, heads), "float32", ("embed", "heads"), (1, 1), -2)


@settings(deadline=None)
@given(
    n=st.sampled_from([1, 2, 4, 6, 8, 12, 16, 24, 64]),
    sizes=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    start=st.integers(0, 10**6),
)
def test_fit_finds_the_nearest_legal_mesh(n, sizes, start):
    """`fit` returns a legal mesh of as many devices, and the same one when it already fits."""
    shapes = [
        (d, f, n // d // f) for d in range(1, n + 1) for f in range(1, n + 1) if n % (d * f) == 0
    ]
    data, fsdp, tensor = shapes[start % len(shapes)]
    profile = get_profile("8t").with_mesh(f"data={data},fsdp={fsdp},tensor={tensor}")
    specs = [square(*sizes)]
    fitted = profile.fit(specs)  # data parallelism alone always fits
    fitted.check(specs)
    assert fitted.devices == n
    if sizes[0] % fsdp == sizes[1] % tensor == 0:
        assert fitted == profile


def test_fit_says_why_nothing_fits():
    profile = get_profile("8i").with_mesh("tensor=8")
    odd = [
        TensorSpec("w", (7,), "float32", ("heads",), (1,)),
        TensorSpec("b", (3,), "float32", ("batch",), (1,)),
    ]
    with pytest.raises(UserError, match="w: axis 'heads' has 7 parts, which tensor=8"):
        profile.fit(odd)


def test_fit_of_a_real_model():
    """nano has 2 key heads: a tensor axis of 8 gives way to 2, and data takes the rest."""
    specs = tensor_specs(get_preset("nano"))
    assert get_profile("8i").with_mesh("tensor=8").fit(specs).mesh == {"data": 4, "tensor": 2}


def test_batch_that_does_not_divide():
    profile = get_profile("8t").with_mesh("data=2,fsdp=3")
    require_batch_divides(profile, 12)
    with pytest.raises(
        UserError, match=r"batch size 16 .* data=2,fsdp=3 \(6 shards\); nearest that works: 18"
    ):
        require_batch_divides(profile, 16)
    with pytest.raises(UserError, match="nearest that works: 6"):
        require_batch_divides(profile, 1)


def test_constrain_needs_a_scope():
    """Outside a scope, and on one device, nothing is constrained; inside, the rules decide."""
    x = jax.numpy.zeros((8, 4))
    assert constrain(x, "batch", "heads") is x
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with sharding_scope(mesh, RULES["train"]):
        placed = jax.jit(lambda x: constrain(x, "batch", "heads"))(x)
        one = make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
        with sharding_scope(one, RULES["train"]):
            assert constrain(x, "batch", "heads") is x
        with pytest.raises(UserError, match="both map to mesh axis 'fsdp'"):
            constrain(x, "batch", "embed")
    assert placed.sharding.spec == P(("data", "fsdp"), "tensor")
    assert constrain(x, "batch", "heads") is x
