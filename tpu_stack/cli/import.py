"""`tpu-stack import`: a Hugging Face folder or a GGUF file as a checkpoint of this project."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from tpu_stack.cli.console import print_table, progress, save_json
from tpu_stack.cli.placement import Unprefixed
from tpu_stack.sharding.placement import PlacementOptions, devices_for, place


@dataclass(frozen=True)
class Options:
    """Import a Hugging Face folder: Llama 3, Qwen 3, Gemma 3 (its text model), Qwen 3 MoE, Mixtral;
    or a GGUF file of a Llama, Mixtral, Qwen 3 or Qwen 3 MoE (needs the extra `gguf`).

    The folder holds config.json, *.safetensors and tokenizer.json. Nothing is downloaded.

    Example: tpu-stack import models/Qwen3-0.6B --out runs/qwen3
    """

    model: Positional[Path]
    """The Hugging Face folder, or the GGUF file."""
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
    from tpu_stack.serving.huggingface import import_model
    from tpu_stack.serving.published import Published

    published = Published.open(options.model)
    model = published.model
    specs = tensor_specs(model.config)
    profile, mesh = place(options.profile, "train", options.place, specs, emulate=False)
    with progress() as bar:
        task = bar.add_task("import", total=len(model.pieces()), note="")

        def listener(name: str) -> None:
            bar.update(task, advance=1, note=name)

        import_model(published, options.out, profile, mesh, listener)
    result = {
        "out": str(options.out),
        "architecture": model.family.architecture,
        "parameters": parameter_count(model.config),
        "tensors": len(model.pieces()),
        "stored_as": dict(published.dtypes),
        "left_out": list(model.left_out),
        "profile": profile.name,
        "mesh": dict(profile.mesh),
        "model": model.config.to_dict(),
    }
    stored = ", ".join(f"{count} {dtype}" for dtype, count in published.dtypes.items())
    rows = [
        ["architecture", model.family.architecture],
        ["parameters", f"{result['parameters']:,}"],
        ["tensors", stored],
    ]
    if model.left_out:
        rows.append(["left out, of other modalities", f"{len(model.left_out)} tensors"])
    print_table(f"imported {options.model} to {options.out}", ["what", "value"], rows)
    save_json(options.json, result)
