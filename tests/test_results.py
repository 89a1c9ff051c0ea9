"""The page of long figures: a section is replaced whole and alone; what is unknown is refused."""

import importlib.util
from pathlib import Path

import pytest

from tpu_stack.errors import UserError

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("results", ROOT / "experiments" / "results.py")
assert spec is not None
assert spec.loader is not None
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)

PAGE = "# Results\n\n## a\nold a\n\n## b\nold b\n\n## c\nold c\n"


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_one_section_is_replaced_and_the_others_stay(name):
    page = results.replaced(PAGE, name, f"## {name}\nnew\n")
    others = [other for other in "abc" if other != name]
    assert f"## {name}\nnew\n" in page
    assert f"old {name}" not in page
    assert all(f"## {other}\nold {other}\n" in page for other in others)
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## a",
        "## b",
        "## c",
    ]


def test_a_new_section_is_appended():
    page = results.replaced(PAGE, "d", "## d\nnew\n")
    assert page == f"{PAGE.rstrip()}\n\n## d\nnew\n"


def test_a_section_holds_its_command_and_what_it_prints():
    section = results.Section("exact", ("tpu-stack profiles 8i:8 --model nano --format int4",))
    text = results.section_text("profiles", section, "2026-11-30")
    assert text.startswith("## profiles\n2026-11-30, ")
    assert "$ tpu-stack profiles 8i:8 --model nano --format int4\n" in text
    assert "tensor" in text.split("$ tpu-stack", 1)[1].split("\n", 1)[1]


def test_unknown_sections_and_missing_data_are_refused(monkeypatch):
    with pytest.raises(UserError, match="no section is called 'demmo'"):
        results.main(results.Options(sections=("demmo",)))
    monkeypatch.delenv("PUBLISHED_CSV", raising=False)
    with pytest.raises(UserError, match="needs the environment variable PUBLISHED_CSV"):
        results.section_text("backtest", results.SECTIONS["backtest"], "2026-11-30")


def test_every_section_names_a_script_that_exists():
    for section in results.SECTIONS.values():
        for command in section.commands:
            for word in command.split():
                assert not word.startswith("experiments/") or (ROOT / word).is_file(), command
