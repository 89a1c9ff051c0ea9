"""Results of compiles on disk, by what went into them; an answer from here imports no JAX.

`programs/DIGEST/` holds `result.json`, the program's text `program.hlo.gz`, and what was read of
it, `report.json`. The report is read again from the text when its reader has changed: a better
reader costs no compile.

    Store(None).read(digest_of(key))
"""

import dataclasses
import gzip
import json
import os
from pathlib import Path
from typing import Any

from tpu_stack.files import replacing_file, write_json
from tpu_stack.planner.aot.exposure import Exposure, exposures, links_of
from tpu_stack.planner.aot.recompilation import ROOT, digest_of, source_digests
from tpu_stack.planner.aot.result import (
    OUTCOMES,
    Aborted,
    Allocation,
    Compiled,
    Memory,
    OutOfMemory,
    Refused,
    Result,
    Target,
)
from tpu_stack.planner.hlo_program import ProgramReport, read_program

_KEPT = {name: kind for kind, name in OUTCOMES.items()}


def default_folder() -> Path:
    """Where results are kept unless told otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tpu-stack" / "aot"


def reader_digest() -> str:
    """Changes when the code that reads programs does, or what their links are."""
    parts = sorted(f"planner/{path.name}" for path in (ROOT / "planner").glob("hlo*.py"))
    return digest_of(
        source_digests((*parts, "planner/links.py", "planner/aot/exposure.py", "hardware"))
    )


class Store:
    """A folder of results; `default_folder()` when None."""

    def __init__(self, folder: Path | None):
        self.folder = folder or default_folder()

    def path(self, digest: str) -> Path:
        return self.folder / "programs" / digest

    def read(self, digest: str) -> Result | None:
        """What was kept; None when there is nothing or not what this version writes."""
        try:
            data = json.loads((self.path(digest) / "result.json").read_text())
            return self._result(digest, data)
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return None

    def _result(self, digest: str, data: dict[str, Any]) -> Result:
        kind = _KEPT[data.pop("outcome")]
        target = data["target"] | {"wrap": tuple(data["target"]["wrap"])}
        fields = data | {"target": Target(**target), "cached": True}
        if kind is Compiled:
            fields["memory"] = Memory(**data["memory"])
            fields["hlo"] = self.path(digest) / "program.hlo.gz"
            fields |= self.report(digest, fields["target"])
        if kind is OutOfMemory:
            fields["largest"] = tuple(Allocation(**item) for item in data["largest"])
        return kind(**fields)

    def report(self, digest: str, target: Target) -> dict[str, Any]:
        """The fields `report` and `exposures` of a kept program, by what its text says.

        Read anew, which needs JAX for chip facts, where the reader is another.
        """
        path, reader = self.path(digest) / "report.json", reader_digest()
        try:
            data = json.loads(path.read_text())
            if data["reader"] == reader:
                times = tuple(Exposure(*pair) for pair in data["exposures"])
                return {"report": ProgramReport.from_json(data["report"]), "exposures": times}
        except (OSError, ValueError, KeyError, TypeError):
            pass
        text = gzip.decompress((self.path(digest) / "program.hlo.gz").read_bytes()).decode()
        report = read_program(text, target.mesh)
        links = links_of(target.topology, target.chip, target.mesh, target.wrap)
        times = exposures(report.collectives, links, target.clock_hz)
        pairs = [(item.own_s, item.cover_s) for item in times]
        write_json(path, {"reader": reader, "report": report.as_json(), "exposures": pairs})
        return {"report": report, "exposures": times}

    def keep(self, digest: str, result: Compiled | OutOfMemory | Refused | Aborted) -> None:
        """Writes a result; of a compiled one, the text and report are there already."""
        fields = {"outcome": OUTCOMES[type(result)]} | dataclasses.asdict(result)
        for name in ("cached", "hlo", "report", "exposures"):
            fields.pop(name, None)
        write_json(self.path(digest) / "result.json", fields)

    def keep_text(self, digest: str, compressed: bytes) -> Path:
        """Writes the program's text, gzip-compressed; returns its file."""
        path = self.path(digest) / "program.hlo.gz"
        with replacing_file(path) as partial:
            partial.write_bytes(compressed)
        return path
