"""Rules: legal specs, and every illegal combination refused with names."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from tpu_stack.errors import UserError
from tpu_stack.sharding.axes import LOGICAL_AXES, TensorSpec
from tpu_stack.sharding.rules import Rules, check_divides, split_limit

RULES = Rules({"batch": ("data", "fsdp"), "embed": ("fsdp",), "heads": ("tensor",)})


def weight(*shape: int, axes=("embed", "heads"), granules=None, name="blocks.w") -> TensorSpec:
    return TensorSpec(name, shape, "float32", axes, granules or (1,) * len(shape), -2)


def test_spec_of_axes():
    assert RULES.partition_spec(("embed", "heads")) == P("fsdp", "tensor")
    assert RULES.partition_spec(("batch", None, "heads")) == P(("data", "fsdp"), None, "tensor")
    assert RULES.partition_spec(("vocab", None)) == P(None, None)  # no rule: replicated
    assert RULES.partition_spec(()) == P()


def test_two_axes_on_one_mesh_axis():
    """The tensor, both logical axes and the mesh axis are named."""
    rules = Rules({"ffw": ("tensor",), "heads": ("tensor",)})
    with pytest.raises(
        UserError, match=r"blocks\.w: logical axes 'ffw' and 'heads' both map to mesh axis 'tensor'"
    ):
        rules.partition_spec(("ffw", "heads"), "blocks.w")
    with pytest.raises(UserError, match="'batch' and 'embed' both map to mesh axis 'fsdp'"):
        RULES.partition_spec(("batch", None, "embed"))
    with pytest.raises(UserError, match="'heads' and 'heads'"):
        RULES.partition_spec(("heads", "heads"))


def test_bad_rules():
    with pytest.raises(UserError, match="rule for 'width'"):
        Rules({"width": ("tensor",)})
    with pytest.raises(UserError, match=r"rule for 'embed' names a mesh axis twice"):
        Rules({"embed": ("fsdp", "fsdp")})


def test_bad_tensor_specs():
    with pytest.raises(ValueError, match=r"w: .* differ in rank"):
        TensorSpec("w", (4, 4), "float32", ("embed",), (1, 1))
    with pytest.raises(ValueError, match=r"w: unknown logical axes \['width'\]"):
        TensorSpec("w", (4,), "float32", ("width",), (1,))


def test_what_does_not_divide_is_named():
    with pytest.raises(UserError) as error:
        check_divides(weight(96, 64), RULES, {"data": 2, "fsdp": 64, "tensor": 8})
    assert str(error.value) == (
        "blocks.w: axis 'embed' has 96 parts, which fsdp=64 does not divide;"
        " nearest that works: fsdp=32"
    )


def test_granules_stay_together():
    """6 heads of 128 are 768 elements, yet only 1, 2, 3 or 6 devices can share them."""
    spec = weight(96, 768, granules=(1, 128))
    assert split_limit(spec, 1) == 6
    check_divides(spec, RULES, {"tensor": 6, "fsdp": 1})
    with pytest.raises(UserError) as error:
        check_divides(spec, RULES, {"tensor": 4, "fsdp": 1})
    assert str(error.value) == (
        "blocks.w: axis 'heads' has 6 parts (in units of 128), which tensor=4 does not divide;"
        " nearest that works: tensor=2"
    )


def test_axis_over_two_mesh_axes():
    spec = weight(6, 8, axes=("batch", None))
    with pytest.raises(
        UserError, match=r"data=4, fsdp=2 does not divide; nearest .*data=2, fsdp=1"
    ):
        check_divides(spec, RULES, {"data": 4, "fsdp": 2})


def test_illegal_spec_is_refused_before_sizes():
    with pytest.raises(UserError, match="both map to mesh axis"):
        check_divides(weight(8, 8, axes=("embed", "batch")), RULES, {})


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 240), st.integers(1, 240)),
    fsdp=st.integers(1, 64),
    tensor=st.integers(1, 64),
)
def test_the_suggested_mesh_works(shape, fsdp, tensor):
    """Following the advice (each complaint names one tensor axis) ends in a mesh that divides."""
    mesh = {"fsdp": fsdp, "tensor": tensor}
    for _ in range(2):
        try:
            check_divides(weight(*shape), RULES, mesh)
        except UserError as error:
            advice = str(error).rpartition("nearest that works: ")[2]
            for part in advice.split(", "):
                name, size = part.split("=")
                assert int(size) <= mesh[name]
                mesh[name] = int(size)
    check_divides(weight(*shape), RULES, mesh)
    assert shape[0] % mesh["fsdp"] == shape[1] % mesh["tensor"] == 0


@settings(deadline=None)
@given(
    axes=st.lists(st.sampled_from([None, *LOGICAL_AXES]), max_size=4).map(tuple),
    table=st.dictionaries(
        st.sampled_from(LOGICAL_AXES),
        st.lists(st.sampled_from(["data", "fsdp", "tensor"]), unique=True, max_size=3).map(tuple),
    ),
)
def test_a_spec_uses_a_mesh_axis_once_or_raises(axes, table):
    rules = Rules(table)
    used = [mesh_axis for axis in axes for mesh_axis in rules.mesh_axes(axis)]
    if len(set(used)) < len(used):
        with pytest.raises(UserError, match="both map to mesh axis"):
            rules.partition_spec(axes)
    else:
        entries = rules.partition_spec(axes)
        flat = [n for e in entries if e is not None for n in ((e,) if isinstance(e, str) else e)]
        assert flat == used
        assert len(entries) == len(axes)
