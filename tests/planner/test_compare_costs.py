"""FLOPs, HBM bytes, links and emulated meshes of the three programs, against formulas by hand."""

import dataclasses
from fractions import Fraction
from math import prod

import pytest

from tpu_stack.errors import UserError
from tpu_stack.hardware import get_chip
from tpu_stack.models.presets import get_preset
from tpu_stack.planner import traffic
from tpu_stack.planner.hlo import Collective
from tpu_stack.planner.hlo_source import Part
from tpu_stack.planner.links import MeshLinks, collective_seconds
from tpu_stack.planner.programs import shrink, trace_train
from tpu_stack.planner.serve_programs import block_turns, trace_serve
from tpu_stack.planner.tensors import tensor_rows
from tpu_stack.planner.workload import PrefillStep, Workload
from tpu_stack.sharding.profiles import get_profile

NANO = get_preset("nano")
L, D, F, N, K, H, V = 6, 192, 512, 4, 2, 64, 2048
MATRICES = L * (2 * D * N * H + 2 * D * K * H + 3 * D * F)
TABLE = V * D  # tied: looked up and unembedded
NORMS = L * (2 * D + 2 * H) + D


def _profiles():
    train = get_profile("8t:8", "train").with_mesh("fsdp=4,tensor=2")
    serve = get_profile("8i:4", "serve").with_mesh("data=4,tensor=2")
    return train, serve, tensor_rows(NANO, train, serve, "int4")


def test_train_flops_are_three_forwards_with_dense_attention():
    profile = dataclasses.replace(_profiles()[0], remat="none")
    traced = trace_train(NANO, profile, batch=8, seq_len=128, limit=8)
    per_token = 2 * (MATRICES + TABLE) + L * 4 * N * H * 128
    assert traced.flops.matmul_flops == 3 * 8 * 128 * per_token
    assert not traced.flops.opaque
    assert not traced.flops.unknown_loops


def test_remat_is_in_the_executed_flops_and_not_in_the_models():
    profile = _profiles()[0]
    traced = trace_train(NANO, profile, batch=8, seq_len=128, limit=8)
    model = traffic.train_model_flops(NANO, batch=8, seq_len=128)
    causal = 3 * 8 * 128 * (2 * (MATRICES + TABLE) + L * 4 * N * H * 129 / 2)
    assert model == causal
    without = 3 * 8 * 128 * (2 * (MATRICES + TABLE) + L * 4 * N * H * 128)
    forward_of_layers = 8 * 128 * (2 * MATRICES + L * 4 * N * H * 128)
    assert without < traced.flops.matmul_flops <= without + forward_of_layers


def test_serving_flops_by_hand():
    """Four engines of two slots. Attention walks whole blocks of 128 positions; prefill pads its
    rows to four and unembeds one token of each."""
    serve = _profiles()[1]
    prefill, decode = trace_serve(NANO, serve, "int4", batch=8, context=256, prompt=600, limit=8)
    per_token = 2 * MATRICES + L * 4 * N * H * 256
    assert decode.flops.matmul_flops == 8 * (per_token + 2 * TABLE)
    assert traffic.decode_model_flops(NANO, batch=8, context=256) == decode.flops.matmul_flops
    seen = 128 * (2 + 4 + 5) / 3  # of chunks that end at 256, 512 and 600
    chunk = 256 * (2 * MATRICES + L * 4 * N * H * seen) + 2 * TABLE
    assert prefill.flops.matmul_flops == pytest.approx(4 * 4 * chunk, rel=1e-12)
    assert not (*prefill.flops.opaque, *prefill.flops.unknown_loops)
    assert not (*decode.flops.opaque, *decode.flops.unknown_loops)


def test_the_mean_run_of_prefill_has_its_share_of_a_prompts_model_flops():
    step = PrefillStep.of(600, slots=2)
    assert (step.rows, step.chunk, step.filled, step.tokens) == (4, 256, 2, 512)
    assert (step.ends, step.positions) == ((256, 512, 600), 456)
    prompt = 600 * (2 * MATRICES + L * 4 * N * H * 601 / 2) + 2 * TABLE
    assert traffic.prefill_model_flops(NANO, step) == pytest.approx(prompt * 512 / 600)
    assert PrefillStep.of(20, slots=16).tokens == 4 * 20  # in a program of 64


def test_local_layers_walk_and_read_their_window():
    """The program's loop runs over blocks that any query of the chunk sees."""
    config = NANO.replace(block_pattern=("local", "local", "global"), window=128)
    # a chunk that ends at 1024 starts at 768 and sees 641 on: blocks 5 to 7 of 8
    assert block_turns(config, (1024,), 256) == Fraction(2 * 3 + 8, 3)
    assert block_turns(config, (1024,), 1) == Fraction(2 * 1 + 8, 3)
    serve = get_profile("v5e:1", "serve")
    rows = tensor_rows(config, get_profile("8t:1", "train"), serve, "bf16")
    found = traffic.decode_traffic(config, serve, rows, batch=16, context=1024)
    assert found["kv cache read"] == 16 * 2 * K * H * 2 * (4 * 128 + 2 * 1024)


def test_decode_traffic_by_hand():
    _, serve, rows = _profiles()
    found = traffic.decode_traffic(NANO, serve, rows, batch=8, context=256)
    matrices, table = MATRICES // 2 * 4.5 / 8, (V // 2) * (D + 4)
    looked_up = table * 2 // V  # two rows a device, of a table in two parts
    cache = 2 * L * 2 * 256 * (K // 2) * H * 2
    assert found == {
        "weights": matrices + table + 2 * NORMS + looked_up,
        "kv cache read": cache,
        "kv cache write": cache // 256,
        "logits": 2 * 4 * 2 * V // 2,
    }


def test_train_traffic_by_hand():
    train, _, rows = _profiles()
    found = traffic.train_traffic(NANO, train, rows, batch=16, seq_len=128)
    tokens, sharded = 4 * 128, MATRICES + TABLE
    kept, gathered = sharded // 8 + NORMS, sharded // 2 + NORMS
    assert found == {
        "weights": 6 * kept + 2 * 3 * gathered,
        "gathered copies": 2 * 2 * gathered,
        "gradient": 12 * kept + 8 * gathered,
        "optimizer state": 24 * kept,
        "activations": 2 * L * tokens * D * 2,
        "logits": 4 * 4 * tokens * V // 2,
    }


def test_without_fsdp_nothing_is_gathered():
    train = get_profile("8t:8", "train").with_mesh("data=4,tensor=2")
    rows = tensor_rows(NANO, train, _profiles()[1], "int4")
    found = traffic.train_traffic(NANO, train, rows, batch=16, seq_len=128)
    assert found["gathered copies"] == 0
    assert found["gradient"] == 12 * ((MATRICES + TABLE) // 2 + NORMS)


def test_untied_table_is_looked_up_and_not_read_whole():
    config = NANO.replace(tie_embeddings=False)
    serve = get_profile("v5e:1", "serve")
    rows = tensor_rows(config, get_profile("8t:1", "train"), serve, "bf16")
    found = traffic.decode_traffic(config, serve, rows, batch=16, context=64)
    assert found["weights"] == 2 * (MATRICES + TABLE + NORMS) + 16 * D * 2


def _collective(kind: str, axes: tuple[str, ...] | None, size: int, group: int, trips: int = 1):
    return Collective(
        kind, "f32", ((size // 4,),), size, trips, axes, group, "", False,
        (Part(kind, "f32", size),),
    )  # fmt: skip


def _links(topology=(4, 4, 4), **mesh: int) -> MeshLinks:
    return MeshLinks(get_chip("8t"), topology, mesh)


def test_a_mesh_axis_over_three_torus_axes_uses_three_links():
    links = _links(data=1, fsdp=64, tensor=1)
    found = links.links(("fsdp",), 64)
    assert (found.kind, found.n) == ("ring", 64)
    assert found.bytes_per_s_one_way == 3 * 200e9
    gather = _collective("all-gather", ("fsdp",), 64 << 20, 64, trips=10)
    seconds = collective_seconds([gather], links)
    assert seconds == {("all-gather", ("fsdp",)): pytest.approx(10 * (63 << 20) / 1.2e12)}
    small = _collective("all-gather", ("fsdp",), 64, 64)
    assert collective_seconds([small], links)["all-gather", ("fsdp",)] == pytest.approx(6e-6)


def test_mesh_axes_share_the_torus():
    links = _links(data=1, fsdp=16, tensor=4)
    assert links.links(("tensor",), 4).bytes_per_s_one_way == 200e9
    assert links.links(("fsdp",), 16).bytes_per_s_one_way == 400e9
    assert links.links(("fsdp", "tensor"), 64).bytes_per_s_one_way == 600e9


def test_an_axis_that_fits_no_torus_axes_has_one_link_and_the_slices_hops():
    links = _links(topology=(4, 4, 8), data=1, fsdp=64, tensor=2)
    found = links.links(("fsdp",), 64)
    assert found.bytes_per_s_one_way == 200e9
    assert found.hops * found.hop_s == pytest.approx((2 + 2 + 4) * 1e-6)


def test_an_axis_that_does_not_wrap_is_a_line():
    """A 2x4x4 has axes of 4 as a cube has, and none of them wraps: it is no whole cube."""
    open_grid = _links(topology=(2, 4, 4), data=1, fsdp=16, tensor=2)
    found = open_grid.links(("fsdp",), 16)
    assert (found.kind, found.bytes_per_s_one_way) == ("line", 2 * 200e9)
    assert found.hops * found.hop_s == pytest.approx((3 + 3) * 1e-6)
    assert open_grid.links(None, 4).kind == "line"  # one axis of 4, open
    proxy = dataclasses.replace(open_grid, wrap=(False, True, True))
    assert proxy.links(("fsdp",), 16).kind == "ring"
    assert proxy.links(("tensor",), 2).kind == "line"
    assert proxy.links(None, 4).kind == "ring"
    assert proxy.links(None, 8).kind == "line"  # no whole axes have 8


def test_only_an_axis_of_16_wraps_on_a_2d_slice():
    links = MeshLinks(get_chip("v6e"), (8, 16), {"data": 8, "tensor": 16})
    assert links.links(("tensor",), 16).kind == "ring"
    assert links.links(("data",), 8).kind == "line"
    assert links.links(("data", "tensor"), 128).kind == "line"


def test_kinds_cost_what_the_ring_formulas_say():
    links = _links(topology=(4,), data=1, fsdp=4, tensor=1)
    size = 1 << 30
    gather = size * 3 / 4 / 400e9
    want = {
        "all-gather": gather,
        "reduce-scatter": gather,
        "all-reduce": 2 * gather,
        "all-to-all": 4 * size / 4 / 400e9,  # the whole array is four times a device's part
        "collective-permute": size / 200e9,
    }
    for kind, seconds in want.items():
        found = collective_seconds([_collective(kind, ("fsdp",), size, 4)], links)
        assert found == {(kind, ("fsdp",)): pytest.approx(seconds)}


def test_what_two_devices_of_a_chip_exchange_is_free():
    links = MeshLinks(get_chip("8i"), (1,), {"data": 1, "tensor": 2})
    reduce = _collective("all-reduce", ("tensor",), 1 << 20, 2)
    assert collective_seconds([reduce], links) == {("all-reduce", ("tensor",)): 0.0}
    wider = MeshLinks(get_chip("8i"), (4,), {"data": 4, "tensor": 2})
    assert collective_seconds([reduce], wider) == {("all-reduce", ("tensor",)): 0.0}
    assert wider.links(("data",), 4).bytes_per_s_one_way == 600e9  # two devices share 1.2 TB/s
    assert wider.links(("data",), 4).max_hops == 3  # four members are never seven hops apart


def test_groups_of_one_and_unknown_loops_cost_nothing():
    links = _links(data=1, fsdp=64, tensor=1)
    alone = _collective("all-reduce", (), 1 << 20, 1)
    unknown = dataclasses.replace(_collective("all-gather", ("fsdp",), 64, 64), trips=None)
    assert collective_seconds([alone, unknown], links) == {}


def test_devices_must_fill_chips():
    with pytest.raises(UserError, match="7 devices do not fill 8i chips of 2"):
        _ = MeshLinks(get_chip("8i"), (), {"data": 7, "tensor": 1}).chips


def test_shrinking_keeps_tensor_and_divides_the_rest():
    profile = get_profile("8t:1024", "train").with_mesh("data=4,fsdp=64,tensor=4")
    assert shrink(profile, 1024) is profile
    assert dict(shrink(profile, 512).mesh) == {"data": 2, "fsdp": 64, "tensor": 4}
    assert dict(shrink(profile, 64).mesh) == {"data": 1, "fsdp": 16, "tensor": 4}
    assert prod(shrink(profile, 3).mesh.values()) == 2


def test_flops_are_the_whole_mesh_even_when_it_is_shrunk():
    profile = get_profile("8t:16", "train").with_mesh("fsdp=8,tensor=2")
    whole = trace_train(NANO, profile, batch=16, seq_len=64, limit=4)
    half = trace_train(NANO, profile, batch=8, seq_len=64, limit=4)
    assert dict(whole.mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2}
    assert whole.flops.matmul_flops == 2 * half.flops.matmul_flops


def test_workload_defaults():
    train, serve = get_profile("8t:4x4x4", "train"), get_profile("8i:8", "serve")
    work = Workload.of(get_preset("llama3_8b"), train, serve)
    assert work == Workload(128, 4096, 16, 4096, 1024)
    assert Workload.of(NANO, train, serve) == Workload(512, 1024, 16, 1024, 512)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 3}, "batch size 3 does not divide"),
        ({"serve_batch": 0}, "serve_batch is 0"),
        ({"seq_len": 2000}, "at most 1024 tokens"),
        ({"context": 64, "prompt": 64}, "prompt 64 leaves no room in context 64"),
    ],
)
def test_workload_refuses(sizes, message):
    train, serve = get_profile("8t:4x4x4", "train"), get_profile("8i:4", "serve")
    with pytest.raises(UserError, match=message):
        Workload.of(NANO, train, serve, **sizes)
