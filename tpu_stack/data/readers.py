"""Text out of each supported kind of file, with errors that name the file and the record.

Kept apart from `sources` so that adding a format means adding one function and one table entry.

>>> _ = Path("corpus.jsonl").write_text('{"text": "first"}\\n{"text": "second"}\\n')
>>> list(read_file(Path("corpus.jsonl"), "text"))
[(':1', 'first'), (':2', 'second')]
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tpu_stack.errors import UserError

Records = Iterator[tuple[str, str]]


def suffix_of(path: Path) -> str | None:
    """Returns which of `SUFFIXES` the file's name ends in, or None. Case does not matter."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def read_file(path: Path, text_field: str) -> Records:
    """Yields (record, text) of a file whose suffix is one of `SUFFIXES`.

    `record` is "" for a text file and ":N" otherwise: line N of JSON Lines (blank lines count) or
    row N of Parquet, from 1. Line endings are kept as they are and a byte-order mark is dropped.
    Raises UserError, naming the file and the record, for anything unreadable.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise UserError(f"cannot read {path}: the suffix is not one of {', '.join(SUFFIXES)}")
    try:
        yield from _READERS[suffix](path, text_field)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"cannot read {path}: damaged gzip data ({error})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise UserError(
            f"{where} is not UTF-8 text: byte 0x{byte:02x} at offset {error.start}"
        ) from error


def _read_text(path: Path, text_field: str) -> Records:
    yield "", _decode(path.read_bytes(), str(path))


def _read_json_lines(path: Path, text_field: str) -> Records:
    with path.open("rb") as lines:
        yield from _parse_json_lines(lines, path, text_field)


def _read_gzip_json_lines(path: Path, text_field: str) -> Records:
    with gzip.open(path, "rb") as lines:
        yield from _parse_json_lines(lines, path, text_field)


def _parse_json_lines(lines: Iterable[bytes], path: Path, text_field: str) -> Records:
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        text = _decode(line, where)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise UserError(f"{where} is not valid JSON: {reason}") from error
        yield f":{number}", _field(record, text_field, where)


def _field(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{where} is a JSON {type(record).__name__}, not an object with fields")
    if text_field not in record:
        known = ", ".join(sorted(record)) or "none"
        raise UserError(f"{where} has no field {text_field!r}; its fields: {known}")
    return _checked(record[text_field], text_field, where)


def _checked(value: Any, text_field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: field {text_field!r} is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise UserError(
            f"{where}: field {text_field!r} has a lone surrogate at character {error.start}"
        ) from error
    return value


def _read_parquet(path: Path, text_field: str) -> Records:
    import pyarrow  # a tenth of a second that only Parquet users pay
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UserError(
                    f"{path} has no field {text_field!r}; its fields: {', '.join(names)}"
                )
            number = 0
            for batch in file.iter_batches(columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f":{number}", _checked(value, text_field, f"{path}:{number}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as Parquet: {error}") from error


_READERS: dict[str, Callable[[Path, str], Records]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_gzip_json_lines,
    ".parquet": _read_parquet,
}
SUFFIXES: tuple[str, ...] = tuple(_READERS)
