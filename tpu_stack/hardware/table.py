"""Chip facts as rows to print and as JSON: what `tpu-stack chips` shows.

Conflicts are printed beside the figure used, never hidden in a footnote.

>>> chip_rows(["8i"])[0].fact
'evidence'
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tpu_stack.hardware.chips import CHIP_NAMES, FACT_NAMES, Chip, get_chip
from tpu_stack.hardware.fact import SOURCES, Fact

# Pairs a reader asks about first: (label, lhs, rhs).
MATMUL_PAIRS = (
    ("bf16 x bf16", "bfloat16", "bfloat16"),
    ("bf16 x fp8", "bfloat16", "float8_e4m3fn"),
    ("bf16 x int4", "bfloat16", "int4"),
    ("fp8 x fp8", "float8_e4m3fn", "float8_e4m3fn"),
    ("fp8 x int4", "float8_e4m3fn", "int4"),
    ("int8 x int8", "int8", "int8"),
    ("int4 x int4", "int4", "int4"),
    ("fp4 x fp4", "float4_e2m1fn", "float4_e2m1fn"),
)

_PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
_BINARY = (("GiB", 2**30), ("MiB", 2**20))
_SHORT_UNITS = {"bytes": "B", "bytes/s": "B/s", "FLOP/s": "FLOP/s", "OP/s": "OP/s", "W": "W"}


class Row(NamedTuple):
    """One fact across chips: text per chip name ("-" where missing), and the sources used."""

    fact: str
    values: dict[str, str]
    source: str


def format_value(value: int | float | str, unit: str) -> str:
    """Four significant digits and a prefix: "6.528 TB/s", "128 MiB" when binary and exact, "2x"."""
    if isinstance(value, str):
        return value
    if unit == "USD/hour":
        return f"${value:.2f}/hour"
    if unit == "ratio":
        return f"{value:g}x"
    if unit == "bytes" and value:
        for name, size in _BINARY:
            if value % size == 0:
                return f"{value // size} {name}"
    if unit in ("FLOP/s", "OP/s") and value == 0:
        return "not available"
    short = _SHORT_UNITS.get(unit, "")
    if unit in ("bytes", "bytes/s", "FLOP/s", "OP/s"):
        for prefix, size in _PREFIXES:
            if value >= size:
                return f"{value / size:.4g} {prefix}{short}"
    return f"{value:g} {short}".strip()


def _cell(fact: Fact | None) -> str:
    if fact is None:
        return "-"
    text = format_value(fact.value, fact.unit)
    said = [f"{format_value(f.value, f.unit)} {f.source}" for f in fact.disagreements]
    note = fact.note if fact.unit == "ratio" or "derived" in fact.note else ""
    extra = "; ".join([*([note.split(":")[0]] if note else []), *said])
    return f"{text} ({extra})" if extra else text


def _matmul_cell(chip: Chip, lhs: str, rhs: str) -> str:
    if chip.bf16_flops_per_s is None:
        return "-"
    rate = chip.peak_flops_per_s(lhs, rhs)
    text = f"{rate.support} {format_value(rate.flops_per_s_per_chip, 'FLOP/s')}"
    if rate.support == "emulated":
        text += f" as {rate.computed_as[0]} x {rate.computed_as[1]}"
    return text + " (projected)" * chip.is_projected


def chip_rows(names: Sequence[str] | None = None) -> list[Row]:
    """Rows to display: the evidence, every fact, then the rate of each matmul operand pair.

    `names`: chips; None for all. Raises UserError for an unknown name.
    """
    chips = [get_chip(name) for name in (CHIP_NAMES if names is None else names)]
    rows = [Row("evidence", {chip.name: evidence(chip) for chip in chips}, "")]
    for fact_name in FACT_NAMES:
        facts = {chip.name: chip.facts()[fact_name] for chip in chips}
        used = [fact.source for fact in facts.values() if fact is not None]
        cells = {name: _cell(fact) for name, fact in facts.items()}
        rows.append(Row(fact_name, cells, ", ".join(dict.fromkeys(used))))
    for label, lhs, rhs in MATMUL_PAIRS:
        cells = {chip.name: _matmul_cell(chip, lhs, rhs) for chip in chips}
        rows.append(Row(f"matmul {label}", cells, "JX"))
    return rows


def evidence(chip: Chip) -> str:
    """What a chip's figures rest on, in a few words."""
    if chip.name == "cpu":
        return "emulation only"
    return "published, unmeasured: projected" if chip.is_projected else "published"


def chip_as_json(chip: Chip) -> dict[str, Any]:
    """JSON-ready: every fact with value, unit, source and disagreements; None where missing."""
    matmuls = {}
    if chip.bf16_flops_per_s is not None:
        for label, lhs, rhs in MATMUL_PAIRS:
            matmuls[label] = chip.peak_flops_per_s(lhs, rhs).as_json()
    facts = {name: fact.as_json() if fact else None for name, fact in chip.facts().items()}
    return {
        "name": chip.name,
        "title": chip.title,
        "device_kinds": list(chip.device_kinds),
        "evidence": evidence(chip),
        "projected": chip.is_projected,
        "facts": facts,
        "matmul": matmuls,
        "sources": SOURCES,
    }
