"""`tpu-stack import`: a Hugging Face folder as a checkpoint of this project."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from tpu_stack.cli.console import print_table, progress, save_json
from tpu_stack.cli.placement import Unprefixed
from tpu_stack.sharding.placement import PlacementOptions, devices_for, place


@dataclass(frozen=True)
class Options:
    """Import a Hugging Face folder: Llama 3, Qwen 3, Gemma 3 (its text model), Qwen 3 MoE, Mixtral.

    The folder holds config.json, *.safetensors and tokenizer.json. Nothing is downloaded.

    Example: tpu-stack import models/Qwen3-0.6B --out runs/qwen3
    """

    folder: Positional[Path]
    """The Hugging Face folder."""
    out: Path
    """Run folder to write; it must not exist yet."""
    profile: str = "8t"
    """Training profile whose layout the weights are read into, NAME[:TOPOLOGY]; counts chips."""
    json: Path | None = None
    """Also write the result to this file."""
    place: Annotated[PlacementOptions, Unprefixed] = field(default_factory=PlacementOptions)


def run(options: Options) -> None:
    """Imports with a progress bar and prints what was found."""
    devices_for(options.profile, "train", options.place, emulate=False)
    from tpu_stack.models.abstract import parameter_count, tensor_specs
    from tpu_stack.models.hf.folder import HuggingFaceFolder
    from tpu_stack.serving.huggingface import import_folder

    folder = HuggingFaceFolder.open(options.folder)
    specs = tensor_specs(folder.config)
    profile, mesh = place(options.profile, "train", options.place, specs, emulate=False)
    with progress() as bar:
        task = bar.add_task("import", total=len(folder.tensors), note="")

        def listener(name: str) -> None:
            bar.update(task, advance=1, note=name)

        found = import_folder(folder, options.out, profile, mesh, listener)
    result = {
        "out": str(options.out),
        "architecture": found.architecture,
        "parameters": parameter_count(found.config),
        "tensors": len(folder.tensors),
        "stored_as": found.dtypes,
        "left_out": list(found.left_out),
        "profile": profile.name,
        "mesh": dict(profile.mesh),
        "model": found.config.to_dict(),
    }
    stored = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
    rows = [
        ["architecture", found.architecture],
        ["parameters", f"{result['parameters']:,}"],
        ["tensors", stored],
    ]
    if found.left_out:
        rows.append(["left out, of other modalities", f"{len(found.left_out)} tensors"])
    print_table(f"imported {options.folder} to {options.out}", ["what", "value"], rows)
    save_json(options.json, result)
