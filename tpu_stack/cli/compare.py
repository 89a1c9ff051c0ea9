"""`tpu-stack compare`: one model under a training and a serving profile, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_stack.cli.compare_tables import print_comparison, print_why
from tpu_stack.cli.console import progress, save_json
from tpu_stack.files import write_text


@dataclass(frozen=True)
class Options:
    """Compare a training and a serving profile of one model: tensors, resharding, and what each
    program costs. Nothing is allocated; speeds are projected. A profile is NAME:TOPOLOGY and counts
    chips.

    Models: nano, llama3_8b, llama3_70b, qwen3_0_6b, qwen3_8b, qwen3_32b, gemma3_1b, gemma3_27b.

    Example: tpu-stack compare --model llama3_8b --train 8t:4x4x4 --serve 8i:8 --json compare.json
    """

    model: str = "llama3_8b"
    """Preset to compare."""
    train: str = "8t:4x4x4"
    """Training profile."""
    serve: str = "8i:8"
    """Serving profile."""
    train_mesh: str | None = None
    """Axis sizes, such as fsdp=16,tensor=4; the default is the nearest legal mesh to pure fsdp."""
    serve_mesh: str | None = None
    """Axis sizes, such as data=2,tensor=8; the default is the nearest legal mesh to pure tensor."""
    format: str = "int4"
    """Weight format of serving; any format of `tpu-stack pack`."""
    batch_size: int | None = None
    """Sequences per train step; the default makes about 8192 tokens a device."""
    seq_len: int | None = None
    """Tokens per training sequence (default 4096, at most the model's window)."""
    serve_batch: int | None = None
    """Sequences decoded together (default 16 per data-parallel replica)."""
    context: int | None = None
    """Positions that the cache holds per row (default 4096, at most the model's window)."""
    prompt: int | None = None
    """Tokens of a prompt (default 1024, at most half the context); prefill runs it in chunks of at
    most 256."""
    why: str | None = None
    """Explain only how both profiles shard this tensor, such as blocks.mlp.w_up."""
    html: Path | None = None
    """Also write the comparison as one offline page: rooflines, breakdowns, tensors."""
    json: Path | None = None
    """Also write the comparison to this file."""


def run(options: Options) -> None:
    """Prints the comparison, or with `--why` one tensor's sharding, and writes the files."""
    if options.why is not None:
        print_why(why_sharded(options, options.why))
        if options.json is None and options.html is None:
            return
    result = compare_profiles(options)
    if options.why is None:
        print_comparison(result)
    save_json(options.json, result)
    if options.html is not None:
        from tpu_stack.planner.report import render_comparison

        write_text(options.html, render_comparison(result))


def compare_profiles(options: Options) -> dict[str, Any]:
    """The comparison, JSON-ready, with a progress bar; see `api.planning.compare`."""
    from tpu_stack.api import planning
    from tpu_stack.planner import compare as planner

    total = len(planner.STEPS) + len(planner.PROGRAMS)
    with progress() as bar:
        task = bar.add_task("compare", total=total, note="")
        return planning.compare(
            options.model,
            train=options.train,
            serve=options.serve,
            progress=lambda name: bar.update(task, advance=1, note=name),
            **_sizes(options),
        )


def why_sharded(options: Options, name: str) -> dict[str, Any]:
    """Why the tensor is sharded as it is, JSON-ready: nothing is compiled for this.

    Raises UserError for a tensor that the model does not have, with the nearest name.
    """
    from tpu_stack.models.abstract import tensor_specs
    from tpu_stack.planner.compare.placement import chain, named

    request = _request(options)
    spec = named(tensor_specs(request.config), name)
    sides = {"train": request.train, "serve": request.serve}
    return {
        "tensor": spec.name,
        "shape": list(spec.shape),
        "profiles": {role: profile.name for role, profile in sides.items()},
        **{role: [link.as_json() for link in chain(spec, side)] for role, side in sides.items()},
    }


def _request(options: Options) -> Any:
    from tpu_stack.planner.request import make_request

    return make_request(options.model, options.train, options.serve, **_sizes(options))


def _sizes(options: Options) -> dict[str, Any]:
    names = ("train_mesh", "serve_mesh", "format", "batch_size", "seq_len", "serve_batch",
             "context", "prompt")  # fmt: skip
    return {name: getattr(options, name) for name in names}
