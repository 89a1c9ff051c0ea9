"""`tpu-stack chips`: what is known of each chip, and who says so."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from tpu_stack.cli.console import print_table, save_json


@dataclass(frozen=True)
class Options:
    """Show the facts of every chip, or of one with its sources; figures that disagree stay visible.

    Example: tpu-stack chips 8i
    """

    name: Positional[str | None] = None
    """v4, v5e, v5p, v6e, 7x, 8t, 8i or cpu; the default is all."""
    json: Path | None = None
    """Also write the facts to this file."""


def run(options: Options) -> None:
    """Prints one row per fact and one column per chip."""
    from tpu_stack.hardware import CHIP_NAMES, CHIPS, chip_as_json, chip_rows, get_chip

    names = [get_chip(options.name).name] if options.name else list(CHIP_NAMES)
    rows = chip_rows(names)
    if len(names) == 1:
        columns = ["fact", names[0], "source"]
        cells = [[row.fact, row.values[names[0]], row.source] for row in rows]
        print_table(CHIPS[names[0]].title, columns, cells)
    else:
        print_table(
            "TPU chips (per chip; `tpu-stack chips NAME` names the sources)",
            ["fact", *names],
            [[row.fact, *(row.values[name] for name in names)] for row in rows],
        )
    save_json(options.json, {name: chip_as_json(CHIPS[name]) for name in names})
