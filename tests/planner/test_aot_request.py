"""What is asked of the compiler: topologies and proxies, bad input, out-of-memory messages."""

import dataclasses

import pytest

from tpu_stack.errors import UserError
from tpu_stack.planner.aot.answer import compile_spec
from tpu_stack.planner.aot.compile import key_of, target_of
from tpu_stack.planner.aot.oom import read_oom
from tpu_stack.planner.aot.request import make_request
from tpu_stack.planner.aot.spec import CompileSpec
from tpu_stack.planner.aot.target import topology_of
from tpu_stack.sharding.profiles import get_profile


@pytest.mark.parametrize(
    ("profile", "name", "devices"),
    [
        ("v4:2x2x1", "v4:2x2x1", 4),
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5e:8", "v5e:2x4", 8),
        ("v5e:1", "v5e:1x1", 1),
        ("v5p:4x4x4", "v5p:4x4x4", 64),
        ("v5p:4", "v5p:2x2x1", 4),
        ("7x:2x2x2", "tpu7x:2x2x2", 16),
        ("8t:4x4x4", "tpu7x:2x4x4", 64),
        ("8i:8", "tpu7x:2x2x2", 16),
    ],
)
def test_topology_of_a_profile(profile, name, devices):
    found = topology_of(get_profile(profile))
    assert (found.name, found.devices) == (name, devices)


OPEN = (False, False, False)


@pytest.mark.parametrize(
    ("profile", "config", "host", "wrap"),
    [
        ("v4:2x2x1", "megacore", (2, 2, 1), OPEN),
        ("v4:4x4x8", "megacore", (2, 2, 1), (True, True, True)),
        ("v5e:1", "default", (1, 1, 1), OPEN),
        ("v5e:4x4", "default", (2, 2, 1), OPEN),
        ("v5p:1", "megacore", (1, 1, 1), OPEN),
        ("v5p:2x4x4", "megacore", (2, 2, 1), OPEN),
        ("v5p:4x4x4", "megacore", (2, 2, 1), (True, True, True)),
        ("v6e:8x16", "default", (2, 2, 1), (False, True, False)),
        ("v6e:16x16", "default", (2, 2, 1), (True, True, False)),
        ("7x:1", "default", (1, 1, 1), OPEN),
        ("7x:8x8x8", "default", (2, 2, 1), (True, True, True)),
        ("8t:2x4x4", "default", (2, 2, 1), OPEN),  # stands in: 2x2x4
        ("8t:4x4x4", "default", (2, 2, 1), (False, True, True)),  # stands in: 2x4x4
        ("8i:64", "default", (2, 2, 1), (True, True, True)),  # stands in: 4x4x4
    ],
)
def test_topologies_are_wired_as_slices_are(profile, config, host, wrap):
    """MaxText's table of systems has the same of the chips that it knows."""
    assert topology_of(get_profile(profile)).options == {
        "chip_config_name": config,
        "chips_per_host_bounds": host,
        "num_slices": 1,
        "wrap": wrap,
    }


def test_the_wiring_is_in_the_key():
    key = key_of(make_request(CompileSpec("nano", "v5p:4x4x4", "train")))
    assert key["topology"]["wrap"] == [True, True, True]
    assert key["topology"]["chip_config"] == "megacore"
    assert key["topology"]["host"] == [2, 2, 1]


def test_a_proxy_is_called_one_and_keeps_the_memory_asked_for():
    target = target_of(make_request(CompileSpec("llama3_8b", "8i:8", "decode")))
    assert target.is_proxy
    assert (target.chip, target.profile_chip) == ("7x", "8i")
    assert target.hbm_bytes > target.compiler_hbm_bytes
    assert not target_of(make_request(CompileSpec("llama3_8b", "7x:2x2x2", "decode"))).is_proxy


def test_which_product_runs_is_said():
    def text(profile: str, format: str, program: str = "decode") -> str:
        return target_of(make_request(CompileSpec("nano", profile, program, format=format))).matmul

    assert text("v5e:2x2", "int4").endswith("packed, each device its part)")
    assert text("v5e:1", "int4") == "pallas (the kernel reads the weight packed)"
    assert text("v5e:2x2", "bf16") == "plain products"
    assert text("v5e:2x2", "int4", "train") == "plain products"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": "v5e"}, "say how many chips"),
        ({"profile": "v5e:32x32"}, "a pod has 256"),
        ({"profile": "v5e:2x2x2"}, "has 3 axes"),
        ({"profile": "v5e:2x8"}, "no slice that can be rented; nearest: 4x4"),
        ({"profile": "8t:3x5x7"}, r"nearest: 4x4x4 \(64 chips\) or 4x4x8"),
        ({"profile": "cpu:4"}, "cannot compile for cpu"),
        ({"profile": "8t:1"}, "do not fill chips of 7x"),
        ({"profile": "v5f:2x2"}, "did you mean 'v5"),
        ({"program": "tran"}, "did you mean 'train'"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"model": "nanoo"}, "perhaps 'nano'"),
        ({"format": "in4", "program": "decode"}, "did you mean 'int4'"),
        ({"mesh": "tensor=3"}, "has 3 devices, and v5e:2x2 has 4"),
        ({"profile": "v5e:4x4", "mesh": "tensor=16"}, "nearest that works: tensor=2"),
        ({"batch_size": 3}, "nearest that works: 4"),
        ({"batch_size": 4, "accumulate": 3}, "not a multiple of 3 micro-batches"),
        ({"batch_size": 8, "accumulate": 4}, "batch size 2 does not divide"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"seq_len": 10**6}, "meant for at most"),
        ({"program": "decode", "context": 64, "prompt": 64}, "leaves no room"),
    ],
)
def test_bad_input_is_one_line(changes, message):
    spec = dataclasses.replace(CompileSpec("nano", "v5e:2x2", "train"), **changes)
    with pytest.raises(UserError, match=message) as caught:
        make_request(spec)
    assert "\n" not in str(caught.value)


def test_a_request_checks_itself():
    request = make_request(CompileSpec("nano", "v5e:2x2", "train"))
    with pytest.raises(UserError, match="needs a profile of role serve"):
        dataclasses.replace(request, program="decode").check()
    with pytest.raises(UserError, match="timeout is 0"):
        compile_spec(CompileSpec("nano", "v5e:2x2", "train"), timeout_s=0)


def test_the_key_is_readable_and_complete():
    key = key_of(make_request(CompileSpec("nano", "v5e:2x2", "decode", format="int8")))
    assert key["format"] == "int8"
    assert key["remat"] is None
    assert key["shapes"]["context"] > key["shapes"]["prompt"]
    assert {"jax", "jaxlib", "libtpu"} == set(key["versions"])
    assert {"models", "quant", "kernels", "serving"} < set(key["sources"])
    assert "training" not in key["sources"]


EARLY = (
    "JaxRuntimeError: RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the"
    " total memory required for HLO temporaries (28.50G) exceeds available HBM (15.75G). HLO module"
)
# The long form as older compilers print it; shortened from erfanzar/EasyDeL#166.
LATE = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 63.80G of 30.75G hbm.

Total hbm usage >= 65.05G:
    reserved          1.25G
    program          63.80G

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(step)/jvp()/dot_general" source_file="a.py" source_line=1059
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     XLA label: fusion.1265 = fusion(custom-call.224), kind=kOutput
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: bf16[8,4096,8192]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 512.00M
     Allocation type: HLO temp
     ==========================
"""


def test_out_of_memory_messages():
    early = read_oom(EARLY)
    assert early is not None
    assert (early.used_bytes, early.limit_bytes) == (28.5 * 2**30, 15.75 * 2**30)
    assert early.used_is_temporaries
    assert early.largest == ()
    late = read_oom(LATE)
    assert late is not None
    assert late.used_bytes == int(65.05 * 2**30)
    assert late.limit_bytes == 30.75 * 2**30
    assert not late.used_is_temporaries
    assert [item.bytes for item in late.largest] == [2**31, 2**29]
    assert late.largest[0].operator == "jit(step)/jvp()/dot_general"
    assert late.largest[1].shape.startswith("bf16[8,4096,8192]")
    assert read_oom("UNIMPLEMENTED: no") is None
    assert read_oom("Ran out of memory in memory space vmem") is None
