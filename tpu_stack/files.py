"""Writing files so that a reader never sees half of one.

Everything is written beside its destination and renamed into place; on any failure, a full disk or
Ctrl-C included, what was there before is untouched and the partial copy is removed.

>>> write_text(Path("report.json"), "{}")
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tpu_stack.errors import UserError


def _explain(error: OSError, path: Path) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}; nothing was left there")


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path in `path`'s folder that becomes `path` when the block succeeds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _explain(error, path) from error
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that becomes `path` when the block succeeds.

    An existing `path` is replaced only at the very end.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _explain(error, path) from error
    try:
        yield partial
        partial.chmod(0o755)
        if path.exists():
            old = partial.with_name(partial.name + ".old")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path`, whole or not at all. Raises UserError on a failed write."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
