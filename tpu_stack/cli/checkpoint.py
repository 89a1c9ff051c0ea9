"""`tpu-stack checkpoint`: the digest and the settings of a run folder's checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.sharding.placement import start_devices


@dataclass(frozen=True)
class Options:
    """Inspect a checkpoint: `digest` prints one hash over parameters and optimizer state.

    Example: tpu-stack checkpoint digest runs/a
    """

    action: Positional[Literal["digest", "show"]]
    """digest: one BLAKE3 hash of names, dtypes, shapes and bytes. show: steps and settings."""
    run: Positional[Path]
    """A run folder: the --out of `tpu-stack train` or `tpu-stack import`."""
    step: int | None = None
    """Step to inspect; the default is the newest."""
    json: Path | None = None
    """Also write the result to this file."""


def run(options: Options) -> None:
    """Prints the digest alone on a line, or a table."""
    start_devices(1)
    from tpu_stack.checkpoint.store import CheckpointStore

    with CheckpointStore(options.run, read_only=True) as store:
        step = store.latest() if options.step is None else options.step
        if options.action == "digest":
            digest = store.digest(step)
            print(digest)
            save_json(options.json, {"step": step, "digest": digest})
            return
        meta = store.meta(step)
        settings = meta["run"]
        tensors = sum(len(names) for names in meta["checksums"].values())
        rows = [["steps", ", ".join(map(str, store.steps))], ["tensors", tensors]]
        rows += [[name, value] for name, value in settings.items() if value is not None]
        print_table(f"checkpoint of step {step} in {options.run}", ["what", "value"], rows)
        save_json(options.json, {"step": step, "steps": store.steps, "run": settings})
