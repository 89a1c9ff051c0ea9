"""What `tune --write` keeps is what kernels then do by default."""

import json
import shutil
from types import SimpleNamespace

import pytest

from tpu_stack.errors import UserError
from tpu_stack.kernels.grouped_matmul import tiles as grouped_tiles
from tpu_stack.kernels.kv_attention import plan
from tpu_stack.kernels.quantize_rows import pallas_tpu
from tpu_stack.kernels.quantized_matmul import tiles as kernel_tiles
from tpu_stack.planner.kernels import grouped_settings, matmul_settings, tune, winners
from tpu_stack.planner.kernels.case_registry import get_case
from tpu_stack.planner.kernels.settings import distinct_settings
from tpu_stack.planner.kernels.targets import compile_target

DECODE = (16, 4096, 14336)


def test_winners_are_what_the_kernel_reads(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    shutil.copy(matmul_settings.TILES_FILE, path)
    before = json.loads(path.read_text())
    monkeypatch.setattr(winners, "libtpu_version", lambda: before["libtpu"])
    won = [
        (
            get_case("quantized_matmul", format, "bf16"),
            "v6e",
            DECODE,
            tune.Candidate((16, 1024, 512), mode, 1),
        )
        for format, mode in (
            ("int4", "after_group"),
            ("ternary_g128", "before"),  # where bytes are the default
            ("int2", "after_group"),
            ("int1", "after_group"),
            ("nvfp4", "before"),
        )
    ]
    shared = (get_case("quantized_matmul", "int4_g128", "bf16"), *won[0][1:3])
    other = tune.Candidate((16, 512, 512), "before", 1)
    written = winners.write_winners([*won, (*shared, other)], path)
    assert written == [case.name for case, *_ in won]  # int4_g128 has int4's entry
    table_now = json.loads(path.read_text())
    assert table_now["tiles"]["default"] == before["tiles"]["default"]
    assert [p.name for p in tmp_path.iterdir()] == ["tiles.json"]
    monkeypatch.setattr(kernel_tiles, "read_tiles", lambda: table_now)
    for case, _, shape, winner in won:
        plan = matmul_settings.plan_of(case, shape, "TPU v6 lite")
        assert (plan.bm, plan.bk, plan.bn) == winner.tiles
        assert plan.scale_mode == winner.scale_mode


def test_winners_of_another_compiler_are_not_mixed_in(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    shutil.copy(matmul_settings.TILES_FILE, path)
    before = path.read_text()
    monkeypatch.setattr(winners, "libtpu_version", lambda: "9.9.9")
    winner = tune.Candidate((16, 1024, 512), "before", 1)
    with pytest.raises(UserError, match=r"tuned with libtpu .* this is 9\.9\.9"):
        winners.write_winners(
            [(get_case("quantized_matmul", "int8", "bf16"), "v6e", DECODE, winner)], path
        )
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("op", "format", "shape", "tiles"),
    [
        ("kv_attention", "fp8_e4m3", (16, 4096, 32), (16, 8)),
        ("kv_attention", "bf16", (16, 4096, 32), (2, 4)),
        ("kv_attention", "int8", (16, 8192, 32), (32, 2)),
        ("quantize_rows", "int8", (2048, 4096), (32,)),
        ("quantize_rows", "fp8_e4m3", (2048, 1024), (512,)),
    ],
)
@pytest.mark.parametrize("chip", ["v6e", "7x"])
def test_winners_of_other_ops_are_what_their_kernels_read(
    op, format, shape, tiles, chip, tmp_path, monkeypatch
):
    case, family = get_case(op, format, "bf16"), winners.family_of(op)
    path = tmp_path / "tiles.json"
    shutil.copy(family.TILES_FILE, path)
    monkeypatch.setattr(winners, "libtpu_version", lambda: json.loads(path.read_text())["libtpu"])
    before = json.loads(path.read_text())
    winner = tune.Candidate(tiles, None, 1)
    assert winners.write_winners([(case, chip, shape, winner)], path) == [case.name]
    table = json.loads(path.read_text())
    assert table["default"] == before["default"]
    module = plan if op == "kv_attention" else pallas_tpu
    monkeypatch.setattr(module, "read_tiles", lambda: table)
    target = compile_target(chip)
    found = distinct_settings(case, target, shape)[0]
    assert found.tiles == tiles
    if chip == "7x":  # TPU 8 is taken to be like it
        target = SimpleNamespace(device_kind="TPU8i")
        assert next(iter(family.settings(case, target, shape))) == found


@pytest.mark.parametrize(
    ("format", "rows", "mode", "chip", "name", "kept"),
    [
        ("int8", "bf16", "after", "v6e", "int8", {"bk": 2048, "bn": 512}),
        ("int8", "fp8", "after", "v5p", "int8", {"bk": 2048, "bn": 512}),
        (
            "int4_g64",
            "bf16",
            "after_group",
            "v6e",
            "int4",
            {"bk": 2048, "bn": 512, "after_group_min": 64},
        ),
        (
            "int4_g64",
            "int8",
            "after_group",
            "v6e",
            "int4@int8",
            {"bk": 2048, "bn": 512, "after_group_min": 64},
        ),
        (
            "int4_g64",
            "bf16",
            "before",
            "v5p",
            "int4",
            {"bk": 2048, "bn": 512, "after_group_rows_max": 15},
        ),
        (
            "int4",
            "bf16",
            "before",
            "7x",
            "int4",
            {"bk": 2048, "bn": 512, "after_group_rows_max": 31},
        ),
    ],
)
def test_winners_of_experts_say_what_differs(
    format, rows, mode, chip, name, kept, tmp_path, monkeypatch
):
    case = get_case("grouped_matmul", format, rows)
    path = tmp_path / "tiles.json"
    path.write_text('{"libtpu": "1", "tuned": {}}')
    monkeypatch.setattr(winners, "libtpu_version", lambda: "1")
    monkeypatch.setattr(grouped_tiles, "read_tiles", lambda: json.loads(path.read_text()))
    kind = compile_target(chip).device_kind
    (found,) = [
        s
        for s in distinct_settings(case, compile_target(chip), case.large)
        if s.tiles[1:] == (2048, 512) and s.scale_mode == mode
    ]
    winner = tune.Candidate(found.tiles, mode, 1)
    assert winners.write_winners([(case, chip, case.large, winner)], path) == [case.name]
    assert json.loads(path.read_text())["tuned"][kind] == {name: {"decode": kept}}
    assert distinct_settings(case, compile_target(chip), case.large)[0] == found
    assert not json.loads(grouped_settings.TILES_FILE.read_text()).keys() - {"libtpu", "tuned"}


def test_an_op_without_tiles_is_refused():
    with pytest.raises(UserError, match="unknown op 'grouped_matmull'; did you mean 'grouped_mat"):
        winners.family_of("grouped_matmull")
