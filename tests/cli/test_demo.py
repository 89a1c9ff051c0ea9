"""The main job at its smallest: every part runs, and the page stands alone."""

import json
import re

import pytest
from browser import needs_browser, visit

from tpu_stack.cli.main import main
from tpu_stack.planner.report import render


def test_the_demo_writes_a_report_and_a_page_that_needs_nothing_else(tmp_path, capsys):
    out = tmp_path / "demo"
    argv = ["demo", "--out", str(out), "--text.max-bytes", "100000", "--train.steps", "3"]
    assert main([*argv, "--train.decay-steps", "3", "--train.seq-len", "32"]) == 0
    report = json.loads((out / "report.json").read_text())

    train = report["train"]
    assert train["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert train["loss_last"] < train["loss_first"]
    assert train["tokens_per_s"] > 0
    sizes = [report["eval"][name]["bytes_per_device"] for name in ("bf16", "int8", "int4")]
    assert sizes[0] > sizes[1] > sizes[2]
    base = report["eval"]["bf16"]["perplexity"]
    assert report["eval"]["int8"]["perplexity"] <= 1.01 * base
    assert report["eval"]["int4"]["perplexity"] <= 1.05 * base
    assert report["generate"]["tokens_per_s"] > 0
    assert report["compare"]["train"]["mesh"] == train["mesh"]
    for program in report["compare"]["programs"]:
        for line in program["roofline"].values():
            assert line["label"] == "projected"
    assert str(tmp_path) in report["generate"]["bundle"]
    assert not list(tmp_path.glob(".demo*"))

    page = (out / "report.html").read_text()
    assert page == render(report)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert "<script" not in page
    assert page.count("<svg") == 2
    assert page.count("Rung:") >= 8
    assert "projected" in page
    assert "projected" in capsys.readouterr().out


def test_text_from_a_model_is_escaped_in_the_page(tmp_path):
    row = {"prompt": "<b>", "text": "<script>alert(1)</script>"}
    report = _smallest_report(row)
    page = render(report)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@needs_browser
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_a_phone_and_a_desk(tmp_path, width):
    page = render(_smallest_report({"prompt": "def f", "text": "(x):" + "y" * 500}))
    found = visit(page, width, tmp_path)
    assert found["width"] == width
    assert found["scroll"] <= width  # no page scroll sideways: tables scroll inside
    assert not found["wide"]
    assert all(drawn >= 250 for drawn in found["drawn"])


def _smallest_report(row: dict) -> dict:
    """The fields that the page reads, each at its smallest."""
    mesh = {"data": 1}
    side = {"profile": "8t:1", "chips": 1, "devices": 1, "mesh": mesh}
    found = {"perplexity": 2.0, "bits_per_byte": 1.0, "bytes_per_device": 10}
    rungs = ("train.loss", "train.tokens_per_s", "eval", "bytes_per_device",
             "generate.tokens_per_s")  # fmt: skip
    compared = ("roofline", "hbm_bytes", "collectives", "tensors")
    return {
        "seconds": 1.0,
        "peak_memory_bytes": 1,
        "rungs": dict.fromkeys(rungs, "0"),
        "train": {
            "parameters": 1, "profile": "8t", "emulated": True, "mesh": mesh, "steps": 1,
            "compute_dtype": "float32", "loss_first": 1.0, "loss_last": 1.0, "losses": [(1, 1.0)],
            "tokens_per_step": 1, "tokens_per_s": 1.0, "evaluations": [],
        },
        "eval": {"bf16": found},
        "generate": {"format": "int4", "rows": [row], "tokens_per_s": 1.0, "mesh": mesh},
        "compare": {
            "train": dict(side, precision={"params": "float32"}),
            "serve": dict(side, format="int4"),
            "programs": [],
            "tensors": [],
            "totals": {
                "train_state_bytes_per_device": 1, "serve_bits_per_weight": 4.0,
                "serve_bytes_per_device": 1, "reshard_bytes_per_device": 1,
            },
            "rungs": dict.fromkeys(compared, "0"),
        },
    }  # fmt: skip
