"""Where text comes from: files, folders, or the Python standard library that every machine has.

>>> _ = Path("notes.txt").write_text("to do")
>>> [(document.name, document.text) for document in read_documents(["notes.txt"])]
[('notes.txt', 'to do')]
"""

import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tpu_stack.data.readers import SUFFIXES, read_file, suffix_of
from tpu_stack.errors import UserError

# Folders of the standard library left out of the corpus: tests, IDLE, lib2to3, installed packages,
# the character tables of `encodings` and the generated help text of `pydoc_data`.
_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data"),
    *("site-packages", "dist-packages", "__pycache__"),
}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")  # build settings: they differ between machines


@dataclass(frozen=True)
class Document:
    """One text; attention never crosses from one document to another.

    Invariants: `text` is not empty and encodes to UTF-8. `name` does not depend on where the corpus
    lies: a path relative to the folder given, with `:N` for line N of JSON Lines, row N of Parquet.
    """

    text: str
    name: str


def read_documents(paths: Sequence[str | Path], text_field: str = "text") -> list[Document]:
    """Reads every document under `paths`, in the order given and sorted within each folder.

    A text file is one document; a `.jsonl`, `.jsonl.gz` or `.parquet` file is one per record, whose
    text stands in the field `text_field`. Folders are searched recursively for the supported
    suffixes; hidden files and folders are left out, links to folders are not followed, a file
    reached twice is read once, and empty texts are dropped.

    Raises UserError, naming the file and the record, for a missing path, a folder without a
    supported file, an unsupported suffix, text that is not UTF-8, a malformed record, a missing
    field, or when no text is left.
    """
    seen: set[Path] = set()
    documents: list[Document] = []
    for given in paths:
        for path, name in _files_under(Path(given)):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            documents.extend(
                Document(text, name + record)
                for record, text in read_file(path, text_field)
                if text
            )
    if not documents:
        where = ", ".join(str(path) for path in paths) or "no paths were given"
        raise UserError(f"the corpus is empty: no text in {where}")
    return documents


def _files_under(path: Path) -> list[tuple[Path, str]]:
    """Returns (file, name) for a file, or for every supported file below a folder, sorted."""
    if path.is_file():
        if suffix_of(path) is None:
            raise UserError(f"cannot read {path}: the suffix is not one of {', '.join(SUFFIXES)}")
        return [(path, path.name)]
    if not path.is_dir():
        raise UserError(f"no such file or folder: {path}")
    found = [
        (file, file.relative_to(path).as_posix())
        for file in _walk(path)
        if suffix_of(file) is not None
    ]
    if not found:
        raise UserError(f"the folder {path} holds no file ending in {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda pair: pair[1])


def _walk(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    files: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return [file for file in files if file.is_file()]


def default_corpus(root: Path | None = None) -> list[Document]:
    """Returns the `.py` sources of the running Python's standard library, sorted by path.

    Tests, IDLE, lib2to3, installed packages, `encodings`, `pydoc_data` and per-machine build
    settings are left out; so are the few files that are not UTF-8 or cannot be read. About 8 MB
    for Python 3.12.

    Args:
      root: the folder to read instead of the standard library's.
    Raises UserError when there are no sources, as in a Python installed as bytecode only.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    documents: list[Document] = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if _SKIPPED_FOLDERS.intersection(parts) or parts[0].startswith(_SKIPPED_PREFIXES):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text:
            documents.append(Document(text, "/".join(parts)))
    if not documents:
        raise UserError(
            f"this Python has no standard-library sources in {root}: name your own text"
        )
    return documents
