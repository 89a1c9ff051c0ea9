"""The source line of an instruction, from the tables at the head of a program's text.

XLA prints `stack_frame_id=N` with an instruction and the frames once per module. It prints parent
ids plus one, so a parent of 1 means no caller (libtpu 0.0.52 and XLA:CPU of jaxlib 0.12).

    frames = Frames.of(compiled.as_text())
    frames.source(instruction.attributes)
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
"""The folder of the package's sources."""

_ID = re.compile(r"stack_frame_id=(\d+)")
_NAMES = re.compile(r'^(\d+) "([^"]*)"$', re.M)
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)", re.M)
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}", re.M)
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_PACKAGE = "/tpu_stack/"
_PREFERRED = ("models/", "serving/", "training/")
_MAX_DEPTH = 200


class Source(NamedTuple):
    """A function and a line of the package's sources, as in `models/layers.py:88`."""

    function: str
    place: str

    def __str__(self) -> str:
        return f"{self.function} ({self.place})"

    def line(self, root: Path = ROOT) -> str:
        """The text of the line in the sources as they are now; "" when there is no such line."""
        name, _, number = self.place.rpartition(":")
        try:
            return (root / name).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        except (OSError, ValueError, IndexError):
            return ""


@dataclass(frozen=True)
class Frames:
    """The frames of a module. `callers` maps a frame to its (source, caller); 0 is no frame."""

    callers: dict[int, tuple[Source, int]]

    @classmethod
    def of(cls, text: str) -> "Frames":
        """Reads the tables; no frames where the text was printed without them."""
        tables = _tables(text)
        files = {int(i): name for i, name in _NAMES.findall(tables["FileNames"])}
        functions = {int(i): name for i, name in _NAMES.findall(tables["FunctionNames"])}
        places = {
            int(i): Source(functions.get(int(name), ""), f"{files.get(int(file), '')}:{line}")
            for i, file, name, line in _LOCATION.findall(tables["FileLocations"])
        }
        return cls(
            {
                int(i): (places.get(int(place), Source("", "")), int(parent) - 1)
                for i, place, parent in _FRAME.findall(tables["StackFrames"])
            }
        )

    def stack(self, attributes: str) -> list[Source]:
        """The frames of an instruction's metadata, the innermost first."""
        match = _ID.search(attributes)
        frame, found = int(match[1]) if match else 0, []
        while frame in self.callers and len(found) < _MAX_DEPTH:
            source, frame = self.callers[frame]
            found.append(source)
        return found

    def source(self, attributes: str) -> Source | None:
        """The innermost frame in a model, a trainer or a server, else in the package, else None."""
        own = [
            Source(_short(frame.function), place)
            for frame in self.stack(attributes)
            if (place := _in_package(frame.place))
        ]
        preferred = [frame for frame in own if frame.place.startswith(_PREFERRED)]
        return next(iter(preferred or own), None)


def _in_package(place: str) -> str:
    """`/a/tpu_stack/tpu_stack/models/layers.py:8` as `models/layers.py:8`; "" outside the package.

    A checkout may have the package's name, and hold tests and an environment of its own.
    """
    _, found, inside = place.rpartition(_PACKAGE)
    known = found and (ROOT / inside.partition("/")[0].partition(":")[0]).exists()
    return inside if known else ""


def _short(function: str) -> str:
    """`make_train_step.<locals>.gradient` as `gradient`; `Attention.__call__` stays."""
    return function.rpartition("<locals>.")[2]


def _tables(text: str) -> dict[str, str]:
    """The text of each table; they stand between the first line and the first computation."""
    found, current = dict.fromkeys(_TABLES, ""), ""
    lines: dict[str, list[str]] = {name: [] for name in _TABLES}
    for line in text.splitlines()[1:]:
        if line.endswith("{"):
            break
        if line in lines:
            current = line
        elif current:
            lines[current].append(line)
    return found | {name: "\n".join(rows) for name, rows in lines.items()}
