"""`tpu-stack export`: a checkpoint as a Hugging Face folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from tpu_stack.cli.console import print_table, progress, save_json
from tpu_stack.cli.placement import Unprefixed
from tpu_stack.sharding.placement import PlacementOptions, devices_for, place
from tpu_stack.units import bytes_text

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Options:
    """Export a checkpoint as a Hugging Face folder: config.json, safetensors, tokenizer.json.

    A checkpoint that was imported and not trained is exported bit for bit.

    Example: tpu-stack export runs/qwen3 --out models/qwen3-tuned --dtype bfloat16
    """

    run: Positional[Path]
    """A run folder: the --out of `tpu-stack train` or `tpu-stack import`."""
    out: Path
    """Hugging Face folder to write; it must not exist yet."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights; the default is each tensor's dtype at import, else float32."""
    step: int | None = None
    """Step to export; the default is the newest."""
    profile: str = "8i"
    """Profile whose layout the weights are read into, NAME[:TOPOLOGY]; counts chips."""
    json: Path | None = None
    """Also write the result to this file."""
    place: Annotated[PlacementOptions, Unprefixed] = field(default_factory=PlacementOptions)


def run(options: Options) -> None:
    """Exports with a progress bar and prints what was written."""
    devices_for(options.profile, "serve", options.place)
    from tpu_stack.checkpoint.store import CheckpointStore
    from tpu_stack.models.abstract import tensor_specs
    from tpu_stack.models.config import ModelConfig
    from tpu_stack.serving.huggingface import export_folder

    with CheckpointStore(options.run, read_only=True) as store:
        step = store.latest() if options.step is None else options.step
        config = ModelConfig.from_dict(store.meta(step)["model"])
    profile, mesh = place(options.profile, "serve", options.place, tensor_specs(config))
    with progress() as bar:
        task = bar.add_task("export", total=None, note="")

        def listener(name: str) -> None:
            bar.update(task, advance=1, note=name)

        result = export_folder(
            options.run,
            options.out,
            profile,
            mesh,
            step=step,
            dtype=_NAMES[options.dtype] if options.dtype else None,
            listener=listener,
        )
    rows = [
        ["architecture", result["architecture"]],
        ["step", result["step"]],
        ["weights", bytes_text(result["bytes"])],
    ]
    print_table(f"exported {options.run} to {options.out}", ["what", "value"], rows)
    save_json(options.json, dict(result, out=str(options.out)))
