"""How much memory do packing, importing and opening take, beside what a model of that size needs?

    python experiments/memory_of_verbs.py --models 135m 253m --devices 1 8

A model with random weights is saved as a checkpoint and exported as a Hugging Face folder; every
verb then runs in a process of its own, whose peak resident memory the operating system reports.
Asked: the float32 model, two of its largest tensors, and 300 MB for Python, JAX and its compiler.

Hardware: any; about a minute per verb on two cores. Cost: none. Expected result: every row within
what is asked; the program exits with 1 otherwise.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.presets import get_preset

OVERHEAD = 300e6
Verb = Literal["make", "pack", "import", "open"]


def config_of(model: str) -> ModelConfig:
    """SmolLM2-135M, or an untied model of 253M parameters whose tables are a quarter of it."""
    if model == "135m":
        return get_preset("smollm2_135m")
    return get_preset("llama3_8b").replace(
        vocab_size=31_232,
        d_model=1024,
        n_layers=10,
        n_heads=16,
        n_kv_heads=8,
        head_dim=64,
        d_ff=5120,
    )


@dataclass(frozen=True)
class Options:
    """Measure peak memory of verbs, each in its own process."""

    models: tuple[Literal["135m", "253m"], ...] = ("135m", "253m")
    devices: tuple[int, ...] = (1, 8)
    verbs: tuple[Verb, ...] = ("pack", "import", "open")
    format: str = "int4"
    json: Path | None = None
    """Also write the rows to this file."""
    child: tuple[Verb, str, int, Path] | None = None
    """One measurement, in this process: verb, model, devices, folder."""


def main(options: Options) -> int:
    """Measures every case and prints the table."""
    if options.child is not None:
        verb, model, devices, folder = options.child
        run_verb(verb, model, devices, folder, options.format)
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        return 0
    rows = []
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            measure("make", model, 1, Path(folder), options.format)
            for verb in options.verbs:
                rows += [
                    row(verb, model, devices, Path(folder), options.format)
                    for devices in options.devices
                ]
    print_table(
        "peak resident memory, MB",
        ["verb", "parameters", "devices", "asked at most", "measured"],
        [[r["verb"], r["model"], r["devices"], r["asked"] // 1e6, r["peak"] // 1e6] for r in rows],
    )
    save_json(options.json, {"rows": rows})
    return int(any(r["peak"] > r["asked"] for r in rows))


def row(verb: Verb, model: str, devices: int, folder: Path, format: str) -> dict[str, Any]:
    """One case: what is asked, and what was measured, in bytes."""
    from tpu_stack.models.abstract import tensor_specs

    sizes = [4 * spec.size for spec in tensor_specs(config_of(model))]
    asked = sum(sizes) + 2 * max(sizes) + OVERHEAD
    peak = measure(verb, model, devices, folder, format)
    print(f"{verb} {model} on {devices}: {peak / 1e6:.0f} of {asked / 1e6:.0f} MB", file=sys.stderr)
    return {"verb": verb, "model": model, "devices": devices, "asked": asked, "peak": peak}


def measure(verb: Verb, model: str, devices: int, folder: Path, format: str) -> int:
    """Peak resident bytes of a process that runs the verb."""
    arguments = [sys.executable, __file__, "--format", format]
    arguments += ["--child", verb, model, str(devices), str(folder)]
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    run = subprocess.run(arguments, stdout=subprocess.PIPE, env=environment, check=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def run_verb(verb: Verb, model: str, devices: int, folder: Path, format: str) -> None:
    """Runs one verb; its output folder is one per number of devices."""
    run, exported, bundle = folder / "run", folder / "exported", folder / f"bundle-{devices}"
    where = ["--devices", str(devices)]
    if verb == "make":
        make(config_of(model), run)
        command("export", str(run), "--out", str(exported))
    elif verb == "pack":
        command("pack", str(run), "--format", format, "--out", str(bundle), *where)
    elif verb == "import":
        command("import", str(exported), "--out", str(folder / f"imported-{devices}"), *where)
    else:
        open_bundle(bundle, devices)


def command(*arguments: str) -> None:
    """One verb as the command line runs it. Raises SystemExit when it fails."""
    from tpu_stack.cli.main import main as run

    if status := run(list(arguments)):
        raise SystemExit(status)


def open_bundle(bundle: Path, devices: int) -> None:
    """What `serve` does before it compiles."""
    import jax

    from tpu_stack.serving.bundle import Bundle
    from tpu_stack.serving.layout import with_groups
    from tpu_stack.sharding.placement import PlacementOptions, place

    jax.config.update("jax_platforms", "cpu")
    opened = Bundle.open(bundle)
    specs = with_groups(opened.config, opened.manifest.format)
    placed = place("8i", "serve", PlacementOptions(devices=devices), specs)
    jax.block_until_ready(opened.load(*placed, split=True))


def make(config: ModelConfig, run: Path) -> None:
    """Saves a checkpoint of random weights, as `import` leaves one."""
    import jax
    import numpy as np

    from tpu_stack.checkpoint.store import CheckpointStore
    from tpu_stack.data.sources import Document
    from tpu_stack.data.tokenizer import build_tokenizer
    from tpu_stack.models.decoder import init_params

    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    tokenizer = build_tokenizer("chars", [Document("abcdefgh", "text")])
    meta = {"model": config.to_dict(), "tokenizer": tokenizer.to_json()}
    with CheckpointStore(run, in_background=False) as store:
        store.save(0, {"params": params, "optimizer": {"count": np.int32(0)}}, meta)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
