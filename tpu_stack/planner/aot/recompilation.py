"""What makes a compiled program this one and no other: versions, sources, and a digest of a dict.

The readable dict is the cache key (its digest names the file), so two results can be laid side by
side to see why the second needed a compile of its own.

    changed(first.key, second.key)  # {'shapes.batch': (128, 256)}
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
"""The folder of the package's sources, tpu_stack/."""


def versions() -> dict[str, str]:
    """Versions of what lowers and compiles; "not installed" where there is none."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def source_digests(parts: Sequence[str], root: Path = ROOT) -> dict[str, str]:
    """Part of the package (folder or file; "" is all of it) -> digest of its code and tile data."""
    return {f"{part or root.name}": _source_digest(root / part) for part in parts}


def _source_digest(path: Path) -> str:
    files = [path] if path.is_file() else sorted(_sources(path))
    found = hashlib.sha256()
    for file in files:
        found.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _sources(folder: Path) -> list[Path]:
    """Python and JSON files below, through the link to the kernels."""
    found: list[Path] = []
    for parent, folders, names in folder.walk(follow_symlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found += [parent / name for name in names if name.endswith((".py", ".json"))]
    return found


def digest_of(key: Mapping[str, Any]) -> str:
    """The name that a key is filed under."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40]


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two keys differ: dotted path -> (before, after); what is absent is None."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= {f"{name}.{inner}": pair for inner, pair in changed(old, new).items()}
        elif old != new:
            found[name] = (old, new)
    return found
