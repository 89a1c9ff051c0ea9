"""Why a tensor is sharded so, and what moves it to the serving layout, against both by hand."""

from math import prod

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tpu_stack.cli.compare import Options, why_sharded
from tpu_stack.cli.main import main
from tpu_stack.errors import UserError
from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.presets import get_preset
from tpu_stack.planner.compare.placement import chain, named
from tpu_stack.planner.compare.products import rows_per_device, serve_product, train_product
from tpu_stack.planner.compare.reshard import moves, network_bytes_per_s, plan
from tpu_stack.planner.tensors import tensor_rows
from tpu_stack.planner.workload import Workload
from tpu_stack.sharding.profiles import get_profile

NANO = get_preset("nano")


def _profiles(train="fsdp=4,tensor=2", serve="data=4,tensor=2"):
    return (
        get_profile("8t:8", "train").with_mesh(train),
        get_profile("8i:4", "serve").with_mesh(serve),
    )


def _rows(train, serve, format="int4"):
    return {row.spec.name: row for row in tensor_rows(NANO, train, serve, format)}


def test_the_chain_names_rule_axis_and_size_and_marks_what_splits_nothing():
    train, serve = _profiles("fsdp=8", "tensor=8,data=1")
    spec = named(tensor_specs(NANO), "blocks.mlp.w_up")
    assert [link.text for link in chain(spec, train)] == [
        "dimension 0, 6: layers -> no rule -> whole",
        "dimension 1, 192: embed -> fsdp=8 -> 8 x 24",
        "dimension 2, 512: ffw -> (tensor=1) -> whole",
    ]
    assert [link.text for link in chain(spec, serve)][1:] == [
        "dimension 1, 192: embed -> no rule -> whole",
        "dimension 2, 512: ffw -> tensor=8 -> 8 x 64",
    ]
    norm = named(tensor_specs(NANO), "final_norm.scale")
    assert [link.text for link in chain(norm, train)] == [
        "dimension 0, 192: no logical axis -> whole"
    ]


def test_heads_are_kept_together():
    spec = named(tensor_specs(NANO), "blocks.attention.wq")
    assert chain(spec, _profiles()[0])[2].granule == NANO.head_dim


@pytest.mark.parametrize("asked", ["w_up", "mlp.w_up", "blocks.mlp.w_upp"])
def test_an_unknown_tensor_is_told_the_nearest(asked, capsys):
    with pytest.raises(UserError, match=r"perhaps 'blocks\.mlp\.w_up'"):
        named(tensor_specs(NANO), asked)
    with pytest.raises(SystemExit):
        main(["compare", "--model", "nano", "--train", "8t:8", "--why", asked])
    error = capsys.readouterr().err
    assert error.count("\n") == 1


def test_why_needs_no_compilation_and_covers_both_sides(capsys):
    found = why_sharded(Options(model="llama3_70b", why="unembed"), "unembed")
    assert [link["mesh"] for link in found["train"]] == [{"fsdp": 64}, {"tensor": 1}]
    assert [link["mesh"] for link in found["serve"]] == [{}, {"tensor": 8}]
    assert main(["compare", "--model", "nano", "--train", "8t:8", "--why", "embed"]) == 0
    printed = capsys.readouterr().out
    assert "(tensor=1)" in printed
    assert "fsdp=8" in printed


def test_a_split_that_both_sides_have_stays_and_fsdp_is_gathered():
    train, serve = _profiles()
    row = _rows(train, serve)["blocks.mlp.w_up"]
    gather, send = moves(row, train, serve)
    size = 4 * 6 * 192 * 512 // 2  # float32, in two parts over tensor
    assert (gather.kind, gather.axes, gather.dims) == ("all-gather", ("fsdp",), (1,))
    assert gather.shards == 4
    assert (gather.bytes, gather.wire_bytes) == (size, size * 3 // 4)
    # fsdp=4 lies on two axes of the 2x2x2 torus, both too short to wrap: two lines of 200 GB/s
    assert gather.seconds == pytest.approx(size * 3 / 4 / 400e9)
    assert (send.kind, send.bytes) == ("send", row.reshard_bytes)
    # 8t: at most 400 Gb/s a chip, 8 chips; 8i publishes none
    assert send.seconds == pytest.approx(row.reshard_total_bytes / (8 * 50e9))


def test_a_split_that_changes_dimension_is_an_all_to_all_and_the_rest_is_gathered():
    train, serve = _profiles("fsdp=8", "data=4,tensor=2")
    row = _rows(train, serve)["blocks.mlp.w_down"]  # [layers, ffw, embed]
    exchange, gather, _ = moves(row, train, serve)
    held = 4 * 6 * 192 * 512 // 8
    assert (exchange.kind, exchange.axes, exchange.dims) == ("all-to-all", ("fsdp",), (2, 1))
    assert (exchange.shards, exchange.bytes, exchange.wire_bytes) == (2, held, held // 2)
    assert (gather.kind, gather.shards, gather.bytes) == ("all-gather", 4, 4 * held)


def test_a_replicated_tensor_is_only_sent():
    train, serve = _profiles()
    row = _rows(train, serve)["final_norm.scale"]
    assert [move.kind for move in moves(row, train, serve)] == ["send"]


def test_on_one_machine_nothing_is_sent():
    train = get_profile("v5p:4", "train").with_mesh("fsdp=2,tensor=2")
    serve = get_profile("v5p:4", "serve").with_mesh("data=2,tensor=2")
    rows = tensor_rows(NANO, train, serve, "bf16")
    found = plan(rows, train, serve)
    assert {total["kind"] for total in found["totals"]} == {"all-gather"}
    assert found["same_machine"]
    assert found["send_s"] == 0
    same = get_profile("v5p:4", "train").with_mesh("tensor=4")
    tensor = get_profile("v5p:4", "serve").with_mesh("tensor=4")
    wide = NANO.replace(n_kv_heads=4)
    assert plan(tensor_rows(wide, same, tensor, "bf16"), same, tensor)["totals"] == []


def test_a_send_of_unknown_rate_has_no_time_and_says_whose_figure_is_missing():
    train = get_profile("8i:4", "train").with_mesh("fsdp=8")
    serve = get_profile("8i:1", "serve").with_mesh("tensor=2")
    assert network_bytes_per_s(train, serve) is None
    found = plan(tensor_rows(NANO, train, serve, "int4"), train, serve)
    assert found["send_s"] is None
    assert found["network_figure_missing_for"] == ["8i", "8i"]
    assert found["collective_s"] > 0


_SIZES = st.sampled_from([1, 2, 4, 8])


@settings(max_examples=25, deadline=None)
@given(fsdp=_SIZES, tensor=st.sampled_from([1, 2]), parts=st.sampled_from([1, 2]), data=_SIZES)
def test_replaying_the_moves_ends_in_the_serving_layout(fsdp, tensor, parts, data):
    """An independent replay: parts per dimension before, after each move, and what is held."""
    assume(2 not in (fsdp * tensor, parts * data))  # no slice has two chips
    train = get_profile("8t:" + str(fsdp * tensor), "train")
    train = train.with_mesh(f"fsdp={fsdp},tensor={tensor}")
    serve = get_profile("v6e:" + str(parts * data), "serve")
    serve = serve.with_mesh(f"data={data},tensor={parts}")
    for row in tensor_rows(NANO, train, serve, "int4"):
        state = [link.shards for link in chain(row.spec, train)]
        for move in moves(row, train, serve):
            before = 4 * row.spec.size // prod(state)
            if move.kind == "all-to-all":
                source, target = move.dims
                state[source] //= move.shards
                state[target] *= move.shards
                assert move.bytes == before
            elif move.kind == "all-gather":
                state[move.dims[0]] //= move.shards
            elif move.kind == "slice":
                state[move.dims[0]] *= move.shards
            if move.kind in ("all-gather", "slice"):
                assert move.bytes == 4 * row.spec.size // prod(state)
        assert state == [link.shards for link in chain(row.spec, serve)]


def test_tiles_and_support_on_both_sides():
    train, serve = _profiles()
    rows = _rows(train, serve)
    work = Workload.of(NANO, train, serve, serve_batch=16, context=256, prompt=100)
    counts = rows_per_device(rows["blocks.mlp.w_up"].spec, serve, work)
    assert counts == {"prefill": 4 * 256, "decode": 4}
    up = serve_product(NANO, rows["blocks.mlp.w_up"], serve, counts)
    assert up is not None
    assert (up["support"], up["computed_as"]) == ("native", ["bfloat16", "int4"])
    assert up["implementation"] == "pallas"  # on each of eight devices
    decode = up["kernel"]["decode"]
    assert (decode["rows"], decode["k"], decode["n"]) == (4, 192, 256)
    assert all(decode["tile"][side] > 0 for side in ("bm", "bk", "bn"))
    assert up["kernel"]["prefill"]["tile"]["bm"] >= decode["tile"]["bm"]
    table = serve_product(
        NANO, rows["embed"], serve, rows_per_device(rows["embed"].spec, serve, work)
    )
    assert table is not None
    assert (table["kernel"]["prefill"]["rows"], table["kernel"]["prefill"]["n"]) == (4, 1024)
    trained = train_product(NANO, rows["blocks.mlp.w_up"], train)
    assert trained is not None
    assert (trained["support"], trained["tile"]) == ("native", None)
    assert "XLA" in trained["tile_reason"]
    assert train_product(NANO, rows["final_norm.scale"], train) is None


def test_plain_weights_have_no_kernel():
    train, serve = _profiles()
    row = _rows(train, serve, "bf16")["blocks.mlp.w_up"]
    found = serve_product(NANO, row, serve, {"decode": 4})
    assert found is not None
    assert found["implementation"] == "dot"
    assert found["kernel"]["decode"]["tile"] is None
    assert "XLA" in found["kernel"]["decode"]["refused"]
