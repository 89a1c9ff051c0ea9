"""XLA:TPU's scheduled text: asynchronous pairs, gathers chained through fusions, SparseCore calls.

`data/v5e_2x4_mlp_step.hlo.txt` is a real excerpt (libtpu 0.0.52): the gradient step of
test_hlo_programs.py in bfloat16 on v5e:2x4, with computations that neither loop nor communicate
left out and backend configs cut down to what names the collective's emitter. The expected figures
are those of the formulas there.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from tpu_stack.planner.hlo import collectives, summarize
from tpu_stack.planner.hlo_program import read_program
from tpu_stack.planner.hlo_text import arrays, elements, parse

MESH = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
DATA = Path(__file__).parent / "data"
EXCERPT = DATA / "v5e_2x4_mlp_step.hlo.txt"
L, D, F, B = 3, 256, 512, 64
WEIGHT = D * F // 2 * 2  # bytes of one weight gathered over fsdp: bfloat16, tensor = 2


def test_v5e_excerpt_agrees_with_the_formulas():
    found = collectives(EXCERPT.read_text(), MESH)
    figures: dict[tuple[str, str], int] = {}
    for row in summarize(found):
        figures[row.kind, row.axes_label] = row.bytes
    # The two weight gradients are summed over fsdp, one as a fused reduce-scatter.
    assert figures.pop(("reduce-scatter", "fsdp")) == L * WEIGHT
    assert figures.pop(("all-reduce", "fsdp")) == L * WEIGHT
    assert figures == {
        ("all-gather", "fsdp"): 4 * L * WEIGHT,
        ("all-reduce", "tensor"): 2 * L * (B // 4) * D * 2,
        ("all-reduce", "data"): 2 * L * WEIGHT // 2,
        ("all-reduce", "data+fsdp"): 4,
    }


def test_v5e_loops_without_known_trip_count():
    text = EXCERPT.read_text()
    assert "known_trip_count" not in text
    assert {c.trips for c in collectives(text, MESH) if "while" in c.op_name} == {L}


def test_gather_chained_through_fusions_counts_once_and_as_overlapped():
    """The text repeats three gathers in a start, one or two overlapped and a done fusion."""
    text = EXCERPT.read_text()
    assert text.count('chain_id="') == 10
    gathers = [c for c in collectives(text, MESH) if c.kind == "all-gather"]
    assert [c.overlapped for c in gathers] == [False, True, True, True]
    (row,) = summarize(gathers)
    assert (row.sites, row.count) == (4, 4 * L)
    assert row.overlapped_bytes == 3 * L * WEIGHT


def test_fused_all_reduce_scatter_is_a_reduce_scatter():
    found = collectives(EXCERPT.read_text(), MESH)
    (scatter,) = (c for c in found if c.kind == "reduce-scatter")
    assert scatter.shapes == ((D, F // 2),)
    assert scatter.notes == ("fused all-reduce and slice",)
    assert scatter.op_name.endswith("dot_general")


# Forms that the excerpt does not have: the SparseCore calls and the permute are as libtpu 0.0.52
# printed them for tpu7x, the other pairs are written by hand after XLA's own conventions.
ASYNC = (DATA / "async_forms.hlo.txt").read_text()


def test_asynchronous_pairs_count_once_with_the_right_payload():
    found = collectives(ASYNC, MESH)
    assert [(c.kind, c.axes, c.bytes) for c in found] == [
        ("collective-permute", ("data",), 1024 * 1024 * 2),
        ("reduce-scatter", ("fsdp",), 1024 * 1024 * 2),
        ("all-gather", ("tensor",), (16 + 8) * 128 * 2),
        ("all-reduce", ("fsdp",), 8 * 128 * 2 + 4 * 4),
        ("all-gather", ("data", "fsdp", "tensor"), 64 * 128 * 2),
        ("reduce-scatter", ("tensor",), 8 * 128 * 2),
    ]
    assert all(c.overlapped and c.trips == 1 for c in found)
    assert found[0].op_name == "jit(f)/shard_map/ppermute"
    assert found[3].dtype == "bf16+f32"


def test_computation_called_twice_counts_twice_and_loops_nest():
    text = (DATA / "nested_loops.hlo.txt").read_text()
    found = collectives(text, MESH)
    assert [c.trips for c in found] == [7 * 4, 7 * 4]  # 8, 6, 4, 2
    (row,) = summarize(found)
    assert (row.count, row.bytes) == (56, 56 * 32)
    unknown = collectives(text.replace(', backend_config={"known_trip_count":{"n":"7"}}', ""), MESH)
    assert [c.trips for c in unknown] == [None, None]  # the counter never moves


def test_types():
    assert [a.bytes for a in arrays("(s4[3,5]{1,0:E(4)}, pred[7], f8e4m3fn[4], bf16[<=6])")] == [
        8,
        7,
        4,
        12,
    ]
    assert elements("((f32[2], s32[]), /*index=1*/bf16[4]{0:T(8,128)(2,1)})") == [
        "(f32[2], s32[])",
        "bf16[4]{0:T(8,128)(2,1)}",
    ]
    assert [a.shape for a in arrays("f4e2m1fn[2,3]")] == [(2, 3)]
    assert arrays("token[]") == ()


def test_parse_reads_headers():
    module = parse(ASYNC)
    assert (module.name, module.partitions, module.replicas) == ("async", 8, 1)
    assert module.entry.root == "collective-permute-done"


# Splash attention's forward step (libtpu 0.0.52, v5p), whose backend configs are cut to cycles.
SPLASH = (DATA / "splash_attention.hlo.txt").read_text()


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        '"more": {\n"tiles": [\n{\n}\n]\n}\n',  # a line that is but a brace ends nothing here
        '"open": "{ \\" {"\n',  # nor does one in a string open anything
    ],
)
def test_a_kernels_metadata_goes_over_several_lines(metadata):
    """Its last line starts with the braces that close it, and ends no computation."""
    first = "kernel_metadata={\n"
    assert SPLASH.count(first) == 1
    assert "\n}}, metadata={op_name=" in SPLASH
    text = SPLASH.replace(first, first + metadata)
    module = parse(text)
    assert module.entry.root == "convert_reduce_fusion"
    kernel = module.entry.instructions["splash_mha_fwd_no_residuals.1"]
    assert kernel.op_name.endswith("/pallas_call")
    assert len(kernel.operands) == 6
    report = read_program(text, {"data": 1})
    assert report.cycles == 2530 + 2217 + 2432
    assert report.unestimated == 1


PROGRAM = """
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, PartitionSpec as P
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = Mesh(np.array(devices).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
turn = lambda c, _: (jax.lax.psum(c @ c, "fsdp"), None)
f = lambda x: jax.lax.scan(turn, x, None, length=6)[0]
s = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
print(jax.jit(s).lower(jax.ShapeDtypeStruct((256, 256), "bfloat16")).compile().as_text())
"""


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu (the aot extra)")
def test_installed_tpu_compiler():
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (reduce,) = collectives(done.stdout, MESH)
    assert (reduce.kind, reduce.axes, reduce.bytes) == ("all-reduce", ("fsdp",), 256 * 256 * 2)
    assert reduce.trips == 6
