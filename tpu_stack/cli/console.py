"""What the verbs print: tables, sizes, progress bars, and the `--json` file.

>>> print_table("chips", ["chip", "HBM"], [["8i", bytes_text(288e9)]])
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tpu_stack.files import write_json


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table to standard output; wide enough for its content when it is not a terminal."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    console = Console() if sys.stdout.isatty() else Console(width=180)
    console.print(table, highlight=False, markup=False)


def progress(description: str = "{task.description}") -> Progress:
    """A progress bar on standard error that leaves standard output to the result."""
    return Progress(
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def save_json(path: Path | None, value: Any) -> None:
    """Writes the verb's result for machines where `--json FILE` asks for it."""
    if path is not None:
        write_json(path, value)


def bytes_text(count: float | None) -> str:
    """1536 -> '1.5 KiB'. None prints as a dash."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def seconds_text(seconds: float | None) -> str:
    """0.00123 -> '1.23 ms'. None prints as a dash."""
    if seconds is None:
        return "-"
    for scale, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
