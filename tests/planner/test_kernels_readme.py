"""The published matrix: how it is written, and that the one published has every case."""

import pytest

from tpu_stack.errors import UserError
from tpu_stack.planner.kernels import table
from tpu_stack.planner.kernels.case_registry import get_case, registry

CASES = [
    get_case("quantized_matmul", "int4", "bf16"),
    get_case("kv_attention", "int8", "bf16"),
]
RESULT = {
    "case": "quantized_matmul int4 bf16",
    "op": "quantized_matmul", "format": "int4", "activation": "bf16",
    "interpret": {"error": 1.3e-3, "ok": True},
    "lowered": {"8t": {"ok": True}, "8i": {"ok": False, "error": "no"}, "7x": {"ok": True}},
    "compiled": {
        "v6e": {"ok": True, "fraction": 0.987, "bound": "HBM", "bundles": 1295,
                "support": "emulated"},
        "7x": {"ok": False, "error": "aborted", "support": "native"},
        "v5e": {"ok": None, "not_run": "libtpu not installed"},
    },
    "failed": ["quantized_matmul int4 bf16: compiled for 7x: aborted"],
}  # fmt: skip
FAILED = "- quantized_matmul int4 bf16: compiled for 7x: aborted"
ROW = (
    "| quantized_matmul | int4 | bf16 | 1.3e-03 | yes | no | yes "
    "| not run | not run | 0.99 HBM, 1295 (e) | refused (n) |"
)


@pytest.fixture
def readme(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "registry", lambda: CASES)
    path = tmp_path / "README.md"
    path.write_text(f"Before.\n\n{table.BEGIN}\nstale\n{table.END}\n\nAfter.\n")
    return path


def test_the_matrix_is_written_between_its_markers(readme):
    table.write_readme([RESULT], readme)
    text = readme.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "stale" not in text
    for line in (table.header(), ROW, FAILED):
        assert line in text.splitlines()
    assert "| kv_attention | int8 | bf16 | not run |" in text  # registered, and not in this run
    table.write_readme([RESULT], readme)
    assert readme.read_text() == text


def test_a_run_over_some_cases_keeps_the_others(readme, monkeypatch):
    table.write_readme([RESULT], readme)
    other = RESULT | {"case": CASES[1].name, "op": "kv_attention", "format": "int8", "failed": []}
    table.write_readme([other], readme)
    lines = readme.read_text().splitlines()
    assert ROW in lines
    assert FAILED in lines
    assert ROW.replace("quantized_matmul | int4", "kv_attention | int8") in lines
    table.write_readme([RESULT | {"failed": []}], readme)
    assert FAILED not in readme.read_text()
    monkeypatch.setattr(table, "libtpu_version", lambda: "9.9.9")
    table.write_readme([other], readme)  # rows of another compiler are not kept
    assert "| quantized_matmul | int4 | bf16 | not run |" in readme.read_text()
    monkeypatch.setattr(table, "registry", lambda: CASES[1:])
    table.write_readme([other], readme)  # nor rows of a case that is gone
    assert "quantized_matmul" not in readme.read_text()


def test_a_file_without_markers_is_left_alone(readme):
    readme.write_text("no markers")
    with pytest.raises(UserError, match="does not have the markers"):
        table.write_readme([RESULT], readme)
    assert readme.read_text() == "no markers"


def test_the_published_matrix_has_a_row_per_case():
    text = table.README.read_text()
    generated = text[text.index(table.BEGIN) : text.index(table.END)].splitlines()
    assert any(line.startswith("Made with jax ") for line in generated)
    rows = [line.split("|")[1:4] for line in generated if line.startswith("| ")]
    published = [" ".join(cell.strip() for cell in row) for row in rows[1:]]
    assert published == [case.name for case in registry()]
