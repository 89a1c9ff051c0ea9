"""The comparison end to end on nano, and the verb around it."""

import json
from pathlib import Path

import pytest

from tpu_stack.cli.compare import Options, compare_profiles, print_comparison
from tpu_stack.cli.main import main
from tpu_stack.planner.compare.crossing import two_by_two
from tpu_stack.planner.compare.simulated import on_chip
from tpu_stack.sharding.profiles import get_profile


@pytest.fixture(scope="module")
def too_large():
    """16 training devices on 8 virtual ones, one chip for both profiles, plain bf16."""
    options = Options(model="nano", train="v5e:4x4", serve="v5e:1", format="bf16")
    return compare_profiles(options)


def _programs(result):
    return {program["name"]: program for program in result["programs"]}


def test_the_result_is_json_and_names_every_rung(nano):
    assert json.loads(json.dumps(nano, allow_nan=False)) == nano
    assert set(nano["rungs"]) == {
        "tensors", "flops", "model_flops", "hbm_bytes", "collectives", "roofline", "memory",
        "products", "reshard", "two_by_two", "simulated",
    }  # fmt: skip
    assert nano["train"]["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert (nano["train"]["mesh_by"], nano["serve"]["mesh_by"]) == ("given", "profile default")
    assert (nano["serve"]["chips"], nano["serve"]["devices"]) == (1, 2)


def test_totals_are_the_sums_of_their_columns(nano):
    rows, totals = nano["tensors"], nano["totals"]
    assert totals["serve_bytes_per_device"] == sum(r["serve"]["bytes_per_device"] for r in rows)
    assert totals["reshard_bytes"] == sum(r["reshard_bytes"] for r in rows)
    state = sum(r["train"]["state_bytes_per_device"] for r in rows)
    assert totals["train_state_bytes_per_device"] == state
    assert 4.5 < totals["serve_bits_per_weight"] < 8


def test_native_and_emulated_formats_are_told_apart(nano):
    rows = {row["name"]: row["serve"]["matmul"] for row in nano["tensors"]}
    assert rows["blocks.mlp.w_up"]["support"] == "native"
    assert rows["blocks.mlp.w_up"]["computed_as"] == ["bfloat16", "int4"]
    assert rows["embed"]["support"] == "emulated"  # int8 rows, unembedded on 8i
    assert rows["final_norm.scale"] is None


def test_every_program_is_priced_on_both_chips_and_projected(nano):
    for name, program in _programs(nano).items():
        assert set(program["roofline"]) == {"8t", "8i"}
        own = program["roofline"][program["chip"]]
        assert own["flops_per_chip"] == program["flops_per_chip"], name
        assert own["hbm_bytes_per_chip"] == program["hbm_bytes_per_chip"], name
        for found in program["roofline"].values():
            assert (found["label"], found["rung"]) == ("projected", 4)
            roofs = (found["compute_s"], found["hbm_s"], found["ici_s"])
            assert found["time_s"] == pytest.approx(max(roofs))
            assert found["time_s"] <= found["time_no_overlap_s"]
            assert found["memory"]["fits"]


def test_a_breakdown_adds_up_to_its_time(nano, too_large):
    for result in (nano, too_large):
        for program in result["programs"]:
            for found in program["roofline"].values():
                parts = dict(found["breakdown"])
                hidden = parts.pop("hidden_ici_s")
                assert sum(parts.values()) == pytest.approx(found["time_s"])
                assert hidden + parts["exposed_ici_s"] == pytest.approx(found["ici_s"])
                assert sum(found["hbm_terms_s"].values()) == pytest.approx(found["hbm_s"])


def test_the_two_by_two_has_every_program_on_both_chips(nano, too_large):
    cells = {(cell["program"], cell["chip"]): cell for cell in nano["two_by_two"]}
    assert set(cells) == {(p, c) for p in ("train_step", "prefill", "decode") for c in ("8t", "8i")}
    for (program, chip), cell in cells.items():
        price = _programs(nano)[program]["roofline"][chip]
        assert cell["label"] == "projected"
        assert cell["own"] == (chip == ("8t" if program == "train_step" else "8i"))
        assert cell["tokens_per_s_per_chip"] == price["tokens_per_s_per_chip"]
        best = max(c["tokens_per_s_per_chip"] for (p, _), c in cells.items() if p == program)
        assert cell["of_best"] == pytest.approx(cell["tokens_per_s_per_chip"] / best)
    assert {cell["chip"] for cell in too_large["two_by_two"]} == {"v5e"}


def test_every_cell_is_simulated_too_and_never_beats_its_roofline(nano, too_large):
    for cell in (*nano["two_by_two"], *too_large["two_by_two"]):
        found = cell["simulated"]
        assert sum(found["terms_s"].values()) == pytest.approx(found["step_s"])
        assert found["label"] == "projected"
        tokens = cell["tokens_per_s_per_chip"] * cell["time_s"]
        assert found["tokens_per_s_per_chip"] * found["step_s"] == pytest.approx(tokens)
        # of the roofline, what the simulator has as well; it takes no collective's least hops
        parts = cell["breakdown"]
        assert found["step_s"] >= parts["memory_s"] + parts["compute_s"]
        assert found["extrapolated"] == (cell["chip"] in ("8t", "8i"))
    best = [c for c in nano["two_by_two"] if c["simulated"]["of_best"] == 1]
    assert {cell["program"] for cell in best} == {"train_step", "prefill", "decode"}


def test_a_profile_moves_to_another_chip_with_its_devices():
    moved = on_chip(get_profile("8t:4x4x4", "train"), "8i")
    assert (moved.name, moved.chips, moved.devices) == ("8i:32", 32, 64)
    assert on_chip(get_profile("8i:8", "serve"), "8t").chips == 16


def test_what_does_not_fit_has_no_rate_to_compare():
    fits = {"memory": {"fits": True, "share": 0.5}, "tokens_per_s_per_chip": 10.0}
    common = dict.fromkeys(
        ("chips", "devices", "time_s", "time_no_overlap_s", "bound", "bound_by_hops", "mfu",
         "breakdown", "label", "rung"), 1,
    )  # fmt: skip
    too_big = {"memory": {"fits": False, "share": 2.0}, "tokens_per_s_per_chip": 99.0}
    roofline = {"8i": common | too_big, "8t": common | fits, "7x": {"unavailable": "why"}}
    cells = two_by_two([{"name": "decode", "chip": "8i", "roofline": roofline}])
    assert [cell["of_best"] for cell in cells] == [None, 1.0, None]
    assert cells[2]["unavailable"] == "why"


def test_both_sides_are_as_they_were(nano):
    """Golden: every tensor's chain, bytes, format and moves on both sides, in words.

    After an intended change: `tests/planner/data/compare_nano.txt` is `golden(nano)`.
    """
    assert golden(nano) == (Path(__file__).parent / "data" / "compare_nano.txt").read_text()


def golden(result) -> str:
    """A comparison's tensors, a paragraph each."""
    lines = []
    for tensor in result["tensors"]:
        train, serve = tensor["train"], tensor["serve"]
        lines.append(f"{tensor['name']} {tensor['shape']}")
        lines += [f"  train {link['text']}" for link in train["why"]]
        lines += [f"  serve {link['text']}" for link in serve["why"]]
        lines.append(
            f"  train {train['dtype']} {train['bytes_per_device']} B,"
            f" state {train['state_bytes_per_device']} B, {_product(train['matmul'])}"
        )
        lines.append(
            f"  serve {serve['format']} {serve['bytes_per_device']} B, {_product(serve['matmul'])}"
        )
        for move in result["reshard"]["tensors"][tensor["name"]]:
            lines.append(
                f"  {move['kind']} {move['axes']} {move['dims']} by {move['shards']}:"
                f" {move['bytes']} B, {move['wire_bytes']} B sent"
            )
    return "\n".join(lines) + "\n"


def _product(product) -> str:
    if product is None:
        return "no product"
    types = " x ".join(product["computed_as"])
    return f"{product['support']} {types} by {product['implementation']}"


def test_decode_of_a_small_batch_on_one_8i_is_bound_by_memory(nano):
    decode = _programs(nano)["decode"]
    found = decode["roofline"]["8i"]
    assert found["bound"] == "memory"
    assert found["ici_s"] == 0  # the two devices share the chip
    assert found["time_s"] == pytest.approx(decode["hbm_bytes_per_chip"] / 8.6e12, rel=1e-3)
    assert found["tokens_per_s"] == pytest.approx(16 / found["time_s"])


def test_the_same_devices_are_twice_the_chips_on_8t(nano):
    found = _programs(nano)["decode"]["roofline"]
    assert (found["8i"]["chips"], found["8t"]["chips"]) == (1, 2)
    assert found["8t"]["flops_per_chip"] * 2 == found["8i"]["flops_per_chip"]


def test_remat_shows_as_the_models_share(nano):
    programs = _programs(nano)
    assert programs["train_step"]["model_share_of_flops"] < 0.8
    assert programs["decode"]["model_share_of_flops"] == 1.0


def test_collectives_name_their_axes(nano):
    programs = _programs(nano)
    serve = {axis for row in programs["decode"]["collectives"] for axis in row["axes"]}
    assert serve == {"tensor"}
    reduced = [r for r in programs["decode"]["collectives"] if r["kind"] == "all-reduce"]
    assert sum(row["count"] for row in reduced) >= 2 * 6  # attention and MLP of every layer
    train = {(row["kind"], *row["axes"]) for row in programs["train_step"]["collectives"]
             if row["axes"]}  # fmt: skip
    assert {("all-gather", "fsdp"), ("all-reduce", "tensor")} <= train
    seconds = sum(r["projected_s"]["8t"] for r in programs["train_step"]["collectives"])
    assert seconds == pytest.approx(programs["train_step"]["roofline"]["8t"]["ici_s"])


def test_a_mesh_larger_than_the_machine_is_shrunk_and_said_so(too_large):
    train = _programs(too_large)["train_step"]
    assert train["collectives_of_smaller_mesh"]
    assert train["collectives_of_mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert any("fsdp=8" in note for note in too_large["notes"])
    assert list(train["roofline"]) == ["v5e"]  # one chip, one column
    assert not _programs(too_large)["decode"]["collectives"]
    assert train["roofline"]["v5e"]["chips"] == 16


def test_tables_say_projected(nano, too_large, capsys):
    print_comparison(nano)
    print_comparison(too_large)
    printed = capsys.readouterr().out
    assert "projected time" in printed
    assert "all-gather fsdp" in printed
    assert "each program on either chip" in printed
    assert "emulated compile" in printed
    assert "-, fsdp, tensor" in printed
    assert "note: train_step" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lama3_8b"], "perhaps 'llama3_8b'"),
        (["--train", "cpu:8"], "it only emulates"),
        (["--train", "8t"], "--train 8t: say how many chips, as in 8t:2x2x1"),
        (["--serve", "8i:4x4"], "8i is Boardfly"),
        (["--serve", "9z:8"], "unknown chip '9z'"),
        (["--train-mesh", "fsdp=3"], "has 3 devices, and 8t:4x4x4 has 64"),
        (["--train-mesh", "pipeline=64"], "no axis 'pipeline'"),
        (["--serve-mesh", "tensor=16"], "nearest that works: tensor=8"),
        (["--format", "int5"], "unknown weight format 'int5'"),
        (["--batch-size", "3"], "batch size 3 does not divide"),
        (["--trian", "8t:8"], "perhaps you meant --train"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_chip_that_cannot_hold_the_devices_says_why(capsys):
    from tpu_stack.errors import UserError
    from tpu_stack.hardware import get_chip
    from tpu_stack.planner.pricing import mesh_links
    from tpu_stack.sharding.profiles import get_profile

    with pytest.raises(UserError, match="1 devices do not fill 8i chips of 2"):
        mesh_links(get_profile("8t:1", "train"), get_chip("8i"))
    links = mesh_links(get_profile("8t:8", "train"), get_chip("8t"))
    assert links.topology == (2, 2, 2)  # a count says no shape: the nearest to a cube


def test_the_verb_writes_json(tmp_path, capsys, monkeypatch, nano):
    from tpu_stack.cli import compare

    monkeypatch.setattr(compare, "compare_profiles", lambda options: nano)
    out = tmp_path / "compare.json"
    assert main(["compare", "--model", "nano", "--json", str(out)]) == 0
    assert json.loads(out.read_text()) == nano
    assert "projected" in capsys.readouterr().out
