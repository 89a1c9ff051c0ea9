"""The backtest on made-up tables: reading, recipes, constants recovered, errors, the verb."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tpu_stack.cli.main import main
from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import get_chip
from tpu_stack.planner.backtest import recipe, serving, training
from tpu_stack.planner.backtest.baselines import baselines
from tpu_stack.planner.backtest.calibrate import ERRORS, SHARES, fit
from tpu_stack.planner.backtest.calibration import Calibration, Fit, family
from tpu_stack.planner.backtest.predict import evaluate, predict
from tpu_stack.planner.backtest.score import backtest
from tpu_stack.planner.backtest.table import REQUIRED, read_rows

COLUMNS: tuple[str, ...] = (
    *REQUIRED, "per_device_batch", "kv_cache_precision", "mlp_gated", "tied_embed",
    "other_metrics", "flops_convention", "publish_date", "source", "notes",
)  # fmt: skip

LLAMA_8B = {
    "id": "a", "kind": "train", "model": "Llama3.1-8B", "params_b": 8.03, "layers": 32,
    "d_model": 4096, "d_ff": 14336, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128,
    "vocab": 128256, "chip": "v6e", "n_chips": 8, "n_slices": 1, "mesh": "fsdp=8",
    "seq_len": 8192, "global_batch": 24, "remat_policy": "full", "weight_precision": "fp32",
    "activation_precision": "bf16", "metric": "tokens_per_s_per_chip", "value": 7000,
    "mlp_gated": 1, "tied_embed": 0, "publish_date": "2025-07-17",
}  # fmt: skip
DECODE_70B = {
    "id": "d", "kind": "decode", "model": "Llama3.1-70B", "params_b": 70.55, "layers": 80,
    "d_model": 8192, "d_ff": 28672, "n_heads": 64, "n_kv_heads": 8, "head_dim": 128,
    "vocab": 128256, "chip": "v5e", "n_chips": 16, "n_slices": 1, "mesh": "tensor=16",
    "weight_precision": "int8", "activation_precision": "bf16", "kv_cache_precision": "int8",
    "concurrency": 8, "input_len": 2048, "metric": "ms_per_token", "value": 6.3,
}  # fmt: skip
SERVE_70B = DECODE_70B | {
    "id": "s", "kind": "serve", "chip": "v6e", "n_chips": 8, "mesh": "tensor=8",
    "weight_precision": "bf16", "kv_cache_precision": "", "concurrency": 64, "input_len": 1000,
    "output_len": 1000, "metric": "out_tok_s_per_chip", "value": 311.85,
}  # fmt: skip


def write_table(path: Path, *rows: dict[str, Any]) -> Path:
    """Writes the rows; columns that a row lacks stay blank."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(tmp_path: Path, *rows: dict[str, Any]):
    return read_rows(write_table(tmp_path / "published.csv", *rows))


def test_columns_become_numbers_and_a_mesh(tmp_path):
    (row,) = rows_of(tmp_path, LLAMA_8B | {"mesh": "fsdp=4;tensor=2"})
    assert (row.id, row.kind, row.chip, row.value) == ("a", "train", "v6e", 7000)
    assert row.mesh == {"fsdp": 4, "tensor": 2}
    assert row.number("layers") == 32
    assert row.number("experts") is None


@pytest.mark.parametrize(
    ("changes", "column", "why"),
    [
        ({"value": "fast"}, "value", "'fast' is not a number"),
        ({"value": "nan"}, "value", "'nan' is not a number"),
        ({"value": ""}, "value", "must be above 0"),
        ({"layers": "3.5"}, "layers", "is not a whole number"),
        ({"layers": "-3"}, "layers", "is not a whole number"),
        ({"kind": "dream"}, "kind", "none of train, prefill, decode, serve"),
        ({"mesh": "fsdp"}, "mesh", "axis=devices"),
        ({"mesh": "fsdp=-2"}, "mesh", "axis=devices"),
        ({"id": ""}, "id", "blank"),
    ],
)
def test_a_malformed_cell_names_its_line_and_column(tmp_path, changes, column, why):
    with pytest.raises(UserError, match=rf"line 3, column '{column}'") as error:
        rows_of(tmp_path, LLAMA_8B | {"id": "first"}, LLAMA_8B | changes)
    assert why in str(error.value)


def test_other_damage_names_its_line(tmp_path):
    with pytest.raises(UserError, match=r"line 3, column 'id': 'a' stands already in line 2"):
        rows_of(tmp_path, LLAMA_8B, LLAMA_8B)
    path = write_table(tmp_path / "short.csv", LLAMA_8B)
    path.write_text(path.read_text() + "b,train\n")
    with pytest.raises(UserError, match="line 3: not as many fields"):
        read_rows(path)
    path.write_text("id,kind\na,train\n")
    with pytest.raises(UserError, match="line 1: column 'model' is missing"):
        read_rows(path)
    with pytest.raises(UserError, match="no rows"):
        read_rows(write_table(tmp_path / "empty.csv"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        read_rows(path)


def test_notes_complete_the_architecture(tmp_path):
    notes = (
        "MLA q_lora1536; first 3 layers dense d_ff=18432; 1 shared expert; dropless; mu_dtype=bf16"
    )
    deepseek = LLAMA_8B | {
        "model": "DeepSeek-V3-671B", "layers": 61, "d_model": 7168, "d_ff": 2048, "n_heads": 128,
        "n_kv_heads": 128, "head_dim": "", "vocab": 129280, "experts": 256, "experts_active": 8,
        "notes": notes,
    }  # fmt: skip
    (row,) = rows_of(tmp_path, deepseek)
    arch = recipe.architecture(row)
    assert arch.total_parameters == pytest.approx(671e9, rel=0.01)
    assert arch.active_parameters == pytest.approx(37.5e9, rel=0.03)  # its report: 37B
    assert (arch.dense_layers, arch.dense_ff, arch.shared_ff) == (3, 18432, 2048)
    assert recipe.optimizer_bytes(row) == 24.0
    assert recipe.capacity(row) == 0.0


def test_a_plain_llama_has_its_parameters(tmp_path):
    (row,) = rows_of(tmp_path, LLAMA_8B)
    assert recipe.architecture(row).total_parameters == pytest.approx(8.03e9, rel=0.001)


def test_a_blank_mesh_is_assumed_and_said(tmp_path):
    (row,) = rows_of(tmp_path, LLAMA_8B | {"mesh": "", "remat_policy": ""})
    assumed: list[str] = []
    assert evaluate(row, Fit(), assumed) > 0
    assert any("mesh not given: fsdp=8" in text for text in assumed)
    assert any("remat policy not given" in text for text in assumed)


def test_an_open_axis_takes_what_the_others_leave(tmp_path):
    (row,) = rows_of(tmp_path, LLAMA_8B | {"n_chips": 64, "mesh": "fsdp=-1;tensor=4"})
    assert training.layout_of(row, []).text == "fsdp=16,tensor=4"


def test_a_known_family_needs_no_notes(tmp_path):
    """Kimi K2 has DeepSeek's attention and a dense layer; the columns alone do not say so."""
    kimi = LLAMA_8B | {
        "model": "Kimi-K2", "layers": 61, "d_model": 7168, "d_ff": 2048, "n_heads": 64,
        "n_kv_heads": 64, "head_dim": "", "vocab": 163840, "experts": 384, "experts_active": 8,
    }  # fmt: skip
    (row,) = rows_of(tmp_path, kimi)
    arch = recipe.architecture(row)
    assert arch.total_parameters == pytest.approx(1.026e12, rel=0.01)  # its report: 1.04T
    assert arch.latent is not None


def test_what_cannot_fit_is_said(tmp_path):
    rows = rows_of(
        tmp_path, SERVE_70B | {"n_chips": 1, "mesh": "tensor=1"}, SERVE_70B | {"id": "b"}
    )
    large, fitting = (predict(row, Calibration.load()) for row in rows)
    assert "does not fit: 141 GB" in large.extrapolated
    assert "does not fit" not in fitting.extrapolated


def test_decode_and_serving_are_told_in_either_metric(tmp_path):
    for base, batch, chips in ((DECODE_70B, 8, 16), (SERVE_70B, 64, 8)):
        ms, rate = rows_of(
            tmp_path,
            base | {"id": "ms", "metric": "ms_per_token"},
            base | {"id": "rate", "metric": "out_tok_s_per_chip"},
        )
        ms_per_token = evaluate(ms, Fit(), [])
        expected = batch / chips / (ms_per_token / 1e3)
        assert evaluate(rate, Fit(), []) == pytest.approx(expected)


def test_expert_parallelism_in_the_notes_leaves_experts_whole(tmp_path):
    moe = SERVE_70B | {"experts": 16, "experts_active": 2, "d_ff": 4096}
    notes = "TP=8 with --enable-expert-parallel"
    rows = rows_of(tmp_path, moe, moe | {"id": "ep", "notes": notes}, SERVE_70B | {"id": "dense"})
    layouts = [serving.serve_job(row)[0].layout.text for row in rows]
    assert layouts == ["tensor=8", "expert=8", "tensor=8"]


def test_a_data_axis_that_counts_the_slices_is_understood(tmp_path):
    (row,) = rows_of(tmp_path, LLAMA_8B | {"n_chips": 64, "n_slices": 4, "mesh": "data=4;fsdp=16"})
    assert training.layout_of(row, []).text == "fsdp=16"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mesh": "fsdp=16"}, "16 devices"),
        ({"mesh": "ring=8"}, "mesh axis 'ring'"),
        ({"global_batch": ""}, "global_batch is blank"),
        ({"layers": ""}, "layers is blank"),
        ({"activation_precision": "int3"}, "int3"),
        ({"chip": "v9"}, "unknown chip 'v9'"),
        ({"metric": "ms_per_token"}, "none of tokens_per_s_per_chip"),
        ({"experts": 8}, "experts_active is blank"),
    ],
)
def test_what_cannot_be_predicted_is_listed_with_its_reason(tmp_path, changes, reason):
    rows = rows_of(tmp_path, LLAMA_8B | changes, LLAMA_8B | {"id": "b"})
    result = backtest(rows, Calibration.load())
    assert [row["id"] for row in result["rows"]] == ["a", "b"]
    assert result["rows"][0]["predicted"] is None
    assert reason in result["rows"][0]["reason"]
    assert result["summary"]["train"]["rows"] == 1
    assert result["summary"]["train"]["unpredicted"] == 1


def test_every_metric_of_a_training_row_tells_the_same_step(tmp_path):
    convention = "6*N_total + 12*L*S*H*Dh (non-causal)"
    speed, step, mfu = rows_of(
        tmp_path,
        LLAMA_8B,
        LLAMA_8B | {"id": "b", "metric": "step_time_s"},
        LLAMA_8B | {"id": "c", "metric": "mfu", "flops_convention": convention},
    )
    tokens_per_s = evaluate(speed, Fit(), [])
    assert evaluate(step, Fit(), []) == pytest.approx(24 * 8192 / 8 / tokens_per_s)
    peak = get_chip("v6e").require("bf16_flops_per_s")
    flops = 6 * 8.03e9 + 12 * 32 * 8192 * 4096
    assert evaluate(mfu, Fit(), []) == pytest.approx(tokens_per_s * flops / peak)


def test_fitting_recovers_constants_that_made_the_rows(tmp_path):
    """Rows made with other constants than the priors; the fit must explain them to what rows are
    trusted to."""
    truth = Fit(Fit().train.with_changes({"mxu_v6e": 0.6, "passes": 50.0, "flash_wide": 1.2}))
    made = []
    for n, (width, seq_len) in enumerate([(1024, 2048), (2048, 8192), (4096, 2048), (8192, 32768)]):
        row = LLAMA_8B | {"id": str(n), "d_model": width, "seq_len": seq_len, "model": f"M{n}"}
        (parsed,) = rows_of(tmp_path, row)
        made.append(row | {"value": evaluate(parsed, truth, [])})
    rows = rows_of(tmp_path, *made)
    before = [abs(math.log(evaluate(row, Fit(), []) / row.value)) for row in rows]
    found = fit(rows)
    after = [abs(math.log(evaluate(row, found, []) / row.value)) for row in rows]
    assert max(before) > 2 * ERRORS["train"]
    assert max(after) < ERRORS["train"]


def test_a_share_is_held_at_1_and_a_constant_that_no_row_touches_at_its_prior(tmp_path):
    """Rows that want a share of 2: the search ends at the bound, and moves nothing else there."""
    truth = Fit(Fit().train.with_changes({"flash_wide": 2.0}))
    made = []
    for n, seq_len in enumerate((8192, 32768, 131072)):
        row = LLAMA_8B | {"id": str(n), "seq_len": seq_len, "model": f"M{n}"}
        (parsed,) = rows_of(tmp_path, row)
        made.append(row | {"value": evaluate(parsed, truth, [])})
    found = fit(rows_of(tmp_path, *made)).train
    assert 0.99 < found.flash_wide <= 1.0
    for name in ("host", "expert", "mxu_v4", "flash"):
        assert getattr(found, name) == pytest.approx(getattr(Fit().train, name), rel=1e-3), name


def test_a_row_of_the_fit_is_predicted_without_its_family(tmp_path):
    (row,) = rows_of(tmp_path, LLAMA_8B)
    changed = Fit(Fit().train.with_changes({"mxu_v6e": 0.5}))
    known = Calibration(Fit(), {"llama3": changed}, frozenset({"a"}), {})
    unknown = Calibration(Fit(), {"llama3": changed}, frozenset({"z"}), {})
    assert predict(row, known).value == evaluate(row, changed, [])
    assert predict(row, known).in_sample == evaluate(row, Fit(), [])
    assert predict(row, known).held_out == "llama3"
    assert predict(row, unknown).value == evaluate(row, Fit(), [])
    assert predict(row, unknown).held_out == ""


def test_a_known_id_under_another_model_is_a_new_row(tmp_path):
    (row,) = rows_of(tmp_path, LLAMA_8B | {"model": "Unheard-of 8B"})
    known = Calibration(Fit(), {"llama3": Fit()}, frozenset({"a"}), {})
    assert predict(row, known).held_out == ""
    assert predict(row, known).value == evaluate(row, Fit(), [])


def test_extrapolation_is_said(tmp_path):
    seen, larger, unseen = rows_of(
        tmp_path,
        LLAMA_8B,
        LLAMA_8B | {"id": "b", "params_b": 9000},
        DECODE_70B | {"chip": "v5p", "n_chips": 16},
    )
    calibration = Calibration.load()
    assert predict(seen, calibration).extrapolated == ""
    assert "9000B parameters" in predict(larger, calibration).extrapolated
    assert "no decode row on v5p" in predict(unseen, calibration).extrapolated


def test_the_shipped_constants_are_whole():
    calibration = Calibration.load()
    assert Calibration.from_json(calibration.as_json()) == calibration
    assert len(calibration.rows) > 100
    for name, found in {"all": calibration.full, **calibration.without}.items():
        assert 0.5 < found.train.mxu("v5e") < 1.0, name
        assert 0.5 < found.serve.weights_hbm <= 1.0, name
        values = vars(found.train) | vars(found.serve)
        assert {share for share in SHARES if values[share] > 1} == set(), name


def test_families_are_told_apart(tmp_path):
    names = {"Llama3.1-8B": "llama3", "Llama-3.3-70B": "llama3", "Kimi K2": "kimi",
             "custom Mixtral-like MoE": "mixtral-like", "gpt-oss-120b": "gpt-oss"}  # fmt: skip
    rows = rows_of(
        tmp_path, *(LLAMA_8B | {"id": str(n), "model": name} for n, name in enumerate(names))
    )
    assert [family(row) for row in rows] == list(names.values())


def test_baselines_are_leave_one_out(tmp_path):
    rows = rows_of(
        tmp_path,
        *(LLAMA_8B | {"id": str(n), "value": value} for n, value in enumerate([5e3, 7e3, 9e3])),
        DECODE_70B,
    )
    found = baselines(rows)
    assert found["chip_median"]["0"] == pytest.approx(8000)
    assert found["chip_median"]["1"] == pytest.approx(7000)
    assert found["half"]["0"] == pytest.approx(found["roofline"]["0"] / 2)
    # 70B weights of one byte and 8 x 2048 cached positions, over 16 x 819 GB/s
    moved = 69.5e9 + 8 * 2048 * 80 * 2 * 8 * 128
    assert found["roofline"]["d"] == pytest.approx(1e3 * moved / (16 * 819e9), rel=0.01)
    assert found["half"]["d"] == pytest.approx(2 * found["roofline"]["d"])


def test_serving_and_decode_rows_are_predicted(tmp_path):
    result = backtest(rows_of(tmp_path, DECODE_70B, SERVE_70B), Calibration.load())
    assert all(abs(row["error"]) < 0.4 for row in result["rows"])
    assert result["summary"]["decode"]["new"] == 1


def test_the_verb_prints_and_writes_json(tmp_path, capsys):
    path = write_table(tmp_path / "published.csv", LLAMA_8B, DECODE_70B, SERVE_70B)
    target = tmp_path / "out.json"
    assert main(["plan", "backtest", str(path), "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert [row["id"] for row in result["rows"]] == ["a", "d", "s"]
    assert set(result["summary"]) == {"train", "prefill", "decode", "serve"}
    printed = capsys.readouterr().out
    assert "90th percentile" in printed
    assert "projected" in printed


def test_the_verb_refuses_a_malformed_table_in_one_line(tmp_path, capsys):
    path = write_table(tmp_path / "published.csv", LLAMA_8B | {"value": "x"})
    with pytest.raises(SystemExit) as stop:
        main(["plan", "backtest", str(path)])
    assert stop.value.code == 2
    assert "line 2, column 'value'" in capsys.readouterr().err
