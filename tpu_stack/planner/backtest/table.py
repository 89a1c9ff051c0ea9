"""Reads published results: one CSV row to one typed record, complaints with line and column.

Columns are those of the project's table of published TPU results; unknown ones are ignored, those
that a prediction needs may be blank, and what follows from a blank is said where it is used.

    rows = read_rows(Path("published.csv"))
    rows[0].chip, rows[0].mesh  # ('v6e', {'fsdp': 256})
"""

import csv
import io
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from tpu_stack.errors import UserError

KINDS = ("train", "prefill", "decode", "serve")
REQUIRED = (
    "id", "kind", "model", "params_b", "layers", "d_model", "d_ff", "n_heads", "n_kv_heads",
    "head_dim", "vocab", "experts", "experts_active", "chip", "n_chips", "n_slices", "mesh",
    "seq_len", "global_batch", "remat_policy", "weight_precision", "activation_precision",
    "concurrency", "input_len", "output_len", "metric", "value",
)  # fmt: skip
_COUNTS = (
    "layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim", "vocab", "experts",
    "experts_active", "n_chips", "n_slices", "seq_len", "global_batch", "concurrency", "mlp_gated",
    "tied_embed",
)  # fmt: skip
_AMOUNTS = ("params_b", "per_device_batch", "input_len", "output_len", "value")


@dataclass(frozen=True)
class Row:
    """One published result. Numbers are None where the table is blank.

    Attributes:
      mesh: axis -> JAX devices of a slice, as printed ("fsdp", ...; "dcn_data" and "dcn_fsdp" count
        slices; -1 is what the other axes leave); empty where it is not printed.
      value: in the unit that `metric` names.
      text: every column as it stands in the file.
    """

    id: str
    kind: str
    chip: str
    metric: str
    value: float
    mesh: dict[str, int]
    numbers: dict[str, float] = field(repr=False)
    text: dict[str, str] = field(repr=False)

    def number(self, column: str) -> float | None:
        """The number in a column, None where it is blank or absent."""
        return self.numbers.get(column)

    def need(self, *columns: str) -> list[float]:
        """The numbers in these columns. Raises UserError naming the first that is blank."""
        found = []
        for column in columns:
            value = self.numbers.get(column)
            if value is None:
                raise UserError(f"{column} is blank")
            found.append(value)
        return found

    @property
    def notes(self) -> str:
        """Free text about the row, lower case."""
        return self.text.get("notes", "").lower()


def read_rows(path: Path) -> list[Row]:
    """All rows of the file, in order.

    Raises UserError with line and column for a missing column, a number that does not parse, an
    unknown kind, a mesh that does not parse, or an id that stands twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    lines: dict[str, int] = {}
    try:
        missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{path}, line 1: column {missing[0]!r} is missing")
        for record in reader:
            row = _row(record, f"{path}, line {reader.line_num}")
            if row.id in lines:
                where = f"{path}, line {reader.line_num}, column 'id'"
                raise UserError(f"{where}: {row.id!r} stands already in line {lines[row.id]}")
            lines[row.id] = reader.line_num
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error
    if not rows:
        raise UserError(f"{path} has no rows below its heading")
    return rows


def _row(record: dict, where: str) -> Row:
    if None in record or None in record.values():
        raise UserError(f"{where}: not as many fields as the heading has columns")
    text = {name: value.strip() for name, value in record.items()}
    if not text["id"]:
        raise UserError(f"{where}, column 'id': blank; every row needs one")
    kind = _one_of(text, "kind", KINDS, where)
    numbers = {}
    for column in (*_COUNTS, *_AMOUNTS):
        value = _number(text, column, where, whole=column in _COUNTS)
        if value is not None:
            numbers[column] = value
    for column in ("value", "n_chips"):
        if not numbers.get(column):
            raise UserError(f"{where}, column {column!r}: {text[column]!r}; it must be above 0")
    return Row(
        text["id"],
        kind,
        text["chip"],
        text["metric"],
        numbers["value"],
        _mesh(text, where),
        numbers,
        text,
    )


def _one_of(text: dict[str, str], column: str, known: tuple[str, ...], where: str) -> str:
    if text[column] not in known:
        options = ", ".join(known)
        raise UserError(f"{where}, column {column!r}: {text[column]!r} is none of {options}")
    return text[column]


def _number(text: dict[str, str], column: str, where: str, *, whole: bool) -> float | None:
    written = text.get(column, "")
    if not written:
        return None
    try:
        value = float(written)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0) or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{where}, column {column!r}: {written[:40]!r} is not {kind} from 0 up")
    return value


def _mesh(text: dict[str, str], where: str) -> dict[str, int]:
    """As in "fsdp=64;tensor=8;dcn_data=2"."""
    sizes: dict[str, int] = {}
    for part in filter(None, text["mesh"].split(";")):
        axis, _, size = part.partition("=")
        if not (axis.strip() and re.fullmatch(r" *(-1|[1-9]\d{0,8}) *", size)):
            raise UserError(
                f"{where}, column 'mesh': {part[:40]!r} is not of the form axis=devices"
            )
        sizes[axis.strip()] = int(size)
    return sizes
