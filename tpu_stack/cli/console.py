"""What the verbs print: tables, progress bars, and the `--json` file.

>>> print_table("chips", ["chip", "HBM"], [["8i", "288 GB"]])
chips...
8i   │ 288 GB
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
    """Prints a table to standard output, 180 columns wide where that is no terminal."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    console = Console() if sys.stdout.isatty() else Console(width=180)
    console.print(table, highlight=False, markup=False)


def progress(description: str = "{task.description}") -> Progress:
    """A progress bar on standard error, so that standard output holds only the result.

    Every task needs the field `note`, which is shown after the bar.
    """
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
    """Writes `value` as JSON to `path`, the verb's `--json FILE`; nothing where it is None."""
    if path is not None:
        write_json(path, value)
