"""`tpu-stack profiles`: the rules of a profile, and how they shard every tensor of a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.units import bytes_text

if TYPE_CHECKING:
    from tpu_stack.models.config import ModelConfig
    from tpu_stack.sharding.profiles import Profile


@dataclass(frozen=True)
class Options:
    """List the profiles, or show how one lays out a model: tensor, axes, spec, bytes per device.

    Models: nano, llama3_8b, llama3_70b, qwen3_0_6b, qwen3_8b, qwen3_32b, gemma3_1b, gemma3_27b.

    Example: tpu-stack profiles 8i:8 --model llama3_8b --format int4
    """

    name: Positional[str | None] = None
    """Profile, NAME[:TOPOLOGY]; counts chips. The default lists all."""
    model: str = "nano"
    """Preset to lay out."""
    role: Literal["train", "serve"] | None = None
    """Role of the profile; the default is serve for 8i and train for any other chip."""
    mesh: str | None = None
    """Axis sizes, such as fsdp=16,tensor=4; the default is the nearest legal mesh."""
    format: str = "bf16"
    """Weight format of a serving profile."""
    json: Path | None = None
    """Also write the table to this file."""


def run(options: Options) -> None:
    """Prints the list or the layout."""
    if options.name is None:
        _list(options)
        return
    result = describe(options)
    mesh = ", ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    rows = [
        [row["tensor"], row["axes"], row["spec"], row["stored_as"], bytes_text(row["bytes"])]
        for row in result["tensors"]
    ]
    rows.append(["total", "", "", "", bytes_text(result["bytes_per_device"])])
    columns = ["tensor", "logical axes", "spec", "stored as", "bytes per device"]
    title = f"{options.model} under {options.name} ({result['role']}), mesh {mesh}"
    print_table(title, columns, rows)
    save_json(options.json, result)


def _list(options: Options) -> None:
    from tpu_stack.hardware import CHIP_NAMES
    from tpu_stack.sharding.profiles import get_profile

    rows, found = [], []
    for name in CHIP_NAMES:
        profile = get_profile(name, options.role)
        rules = "; ".join(f"{axis} -> {'+'.join(to)}" for axis, to in profile.rules.table.items())
        precision = profile.precision
        stored = f"{precision.params} weights, {precision.compute} compute"
        stored += f", {precision.cache} cache" if precision.cache else ""
        rows.append([name, profile.role, ", ".join(profile.mesh), rules, stored, profile.remat])
        found.append(
            dict(zip(("name", "role", "mesh", "rules", "precision"), rows[-1], strict=False))
        )
    columns = ["profile", "role", "mesh axes", "rules", "precision", "remat"]
    print_table("profiles (any chip takes either role: --role)", columns, rows)
    save_json(options.json, found)


def describe(options: Options) -> dict[str, Any]:
    """The layout, JSON-ready; nothing is allocated and no device is started."""
    from tpu_stack.models.abstract import tensor_specs
    from tpu_stack.models.presets import get_preset
    from tpu_stack.sharding.profiles import get_profile

    assert options.name is not None
    config = get_preset(options.model)
    profile = get_profile(options.name, options.role)
    if options.mesh:
        profile = profile.with_mesh(options.mesh)
        profile.check(tensor_specs(config))
    else:
        profile = profile.fit(tensor_specs(config))
    tensors = _rows(config, profile, options.format)
    return {
        "profile": profile.name,
        "role": profile.role,
        "model": options.model,
        "mesh": dict(profile.mesh),
        "tensors": tensors,
        "bytes_per_device": sum(row["bytes"] for row in tensors),
    }


def _rows(config: "ModelConfig", profile: "Profile", format: str) -> list[dict[str, Any]]:
    from math import prod

    from tpu_stack.models.abstract import tensor_specs
    from tpu_stack.serving.layout import packed_bytes_per_device

    rows = []
    for spec in tensor_specs(config):
        shards = prod(profile.mesh[a] for axis in spec.axes for a in profile.rules.mesh_axes(axis))
        if profile.role == "train":
            stored, size = "float32", 4 * spec.size // shards
        else:
            stored, size = packed_bytes_per_device(spec, format, profile)
        rows.append(
            {
                "tensor": spec.name,
                "axes": ", ".join(axis or "-" for axis in spec.axes),
                "spec": str(profile.rules.partition_spec(spec.axes, spec.name)),
                "stored_as": stored,
                "bytes": size,
            }
        )
    return rows
