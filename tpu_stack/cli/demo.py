"""`tpu-stack demo`: the main job, end to end, on emulated devices.

Trains `nano` on Python's standard library under 8t, packs it to three formats, evaluates each and
generates under 8i, compares the two profiles, and writes a report.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpu_stack.cli import compare as compare_verb
from tpu_stack.cli import eval as eval_verb
from tpu_stack.cli import generate as generate_verb
from tpu_stack.cli import pack as pack_verb
from tpu_stack.cli import train as train_verb
from tpu_stack.cli.console import print_table, save_json
from tpu_stack.cli.text import TextOptions
from tpu_stack.files import replacing_folder, write_text
from tpu_stack.sharding.mesh import mesh_text
from tpu_stack.sharding.placement import PlacementOptions, start_devices
from tpu_stack.training.config import TrainConfig
from tpu_stack.units import bytes_text

FORMATS = ("bf16", "int8", "int4")
PROMPTS = ("def ", "class ", "import ", "    return ")


RUNGS = {
    "train.loss": "0 reference: plain jnp on virtual CPU devices",
    "train.tokens_per_s": "5 measured, on this CPU; says nothing of a TPU",
    "eval": "0 reference: the packed weights through plain jnp on this CPU",
    "bytes_per_device": "exact, from the shapes",
    "generate.tokens_per_s": "5 measured, on this CPU; says nothing of a TPU",
    "compare.collectives": "counted in the program that XLA:CPU compiled for the emulated mesh",
    "compare.roofline": "4 projected: no 8t or 8i was at hand",
}
"""How far each figure of the report is proven."""


def _train_config() -> TrainConfig:
    return TrainConfig(
        steps=220,
        batch_size=8,
        seq_len=128,
        learning_rate=3e-3,
        warmup_steps=20,
        schedule="cosine",
        decay_steps=220,
        remat="none",
    )


@dataclass(frozen=True)
class Options:
    """Train, pack, evaluate, generate with and compare a small model; writes report.json and .html.

    Example: tpu-stack demo --out runs/demo
    """

    out: Path = Path("runs/demo")
    """Folder of the report; replaced as a whole once the demo succeeds."""
    train: TrainConfig = field(default_factory=_train_config)
    text: TextOptions = field(
        default_factory=lambda: TextOptions(max_bytes=4_000_000, val_fraction=0.06)
    )
    devices: int = 8
    """Virtual CPU devices for training, packing and evaluation; generation uses one."""
    json: Path | None = None
    """Also write the report here."""


def run(options: Options) -> int:
    """Runs every part in order and prints the tables."""
    started = time.perf_counter()
    start_devices(options.devices)
    with replacing_folder(options.out) as folder:
        report = _report(options, folder)
        report["seconds"] = time.perf_counter() - started
        report["peak_memory_bytes"] = _peak_memory_bytes()
        save_json(folder / "report.json", report)
        from tpu_stack.planner.report import render

        write_text(folder / "report.html", render(report))
    _print(report, options.out)
    save_json(options.json, report)
    return 0


def _report(options: Options, folder: Path) -> dict[str, Any]:
    """Runs the stages; returns the report, JSON-ready."""
    place = PlacementOptions(devices=options.devices)
    run_folder = folder / "train"
    with _stage("train nano under 8t"):
        train_options = train_verb.Options(
            out=run_folder, train=options.train, text=options.text, place=place
        )
        job = train_verb.make_job(train_options)
        result = train_verb.train_behind_a_bar(job, run_folder, resume=False)
    if isinstance(result.stopped_by, int):
        raise SystemExit(128 + result.stopped_by)  # which removes the folder
    report: dict[str, Any] = {"train": result.to_dict(), "pack": {}, "eval": {}}
    for format in FORMATS:
        bundle = folder / f"bundle-{format}"
        with _stage(f"pack and evaluate {format} under 8i"):
            report["pack"][format] = pack_verb.pack_run(
                pack_verb.Options(run=run_folder, out=bundle, format=format, place=place)
            )
            report["eval"][format] = eval_verb.evaluate(
                eval_verb.Options(
                    bundle, seq_len=options.train.seq_len, text=options.text, place=place
                )
            )
    with _stage("generate from int4 under 8i"):
        one = PlacementOptions(devices=1)  # on a CPU, a mesh would only slow decoding
        request = generate_verb.Options(
            folder / "bundle-int4", PROMPTS, max_tokens=48, temperature=0.7, place=one
        )
        report["generate"] = generate_verb.generate(request, stream=False)
    with _stage("compare 8t and 8i"):
        report["compare"] = compare_verb.compare_profiles(
            compare_verb.Options(
                model="nano",
                train="8t:8",
                serve="8i:4",
                train_mesh=mesh_text(job.profile.mesh) if options.devices == 8 else None,
            )
        )
    report["rungs"] = RUNGS
    return _without_temporary_paths(report, folder, options.out)


def _without_temporary_paths(value: Any, temporary: Path, final: Path) -> Any:
    """`value` with the folder's temporary name replaced by the one it ends up with."""
    if isinstance(value, dict):
        return {key: _without_temporary_paths(x, temporary, final) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_temporary_paths(x, temporary, final) for x in value]
    return value.replace(str(temporary), str(final)) if isinstance(value, str) else value


@contextmanager
def _stage(name: str) -> Iterator[None]:
    started = time.perf_counter()
    print(f"{name} ...", file=sys.stderr, flush=True)
    yield
    print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


def _peak_memory_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _print(report: dict[str, Any], out: Path) -> None:
    train = report["train"]
    mesh = ", ".join(f"{axis}={size}" for axis, size in train["mesh"].items())
    base = report["eval"]["bf16"]["perplexity"]
    rows = [
        [
            format,
            f"{found['perplexity']:.3f}",
            f"{found['perplexity'] / base:.4f}",
            f"{found['bits_per_byte']:.4f}",
            bytes_text(found["bytes_per_device"]),
        ]
        for format, found in report["eval"].items()
    ]
    print_table(
        f"nano, {train['parameters']:,} parameters, trained under {train['profile']}, mesh {mesh}:"
        f" loss {train['loss_first']:.3f} to {train['loss_last']:.3f}"
        f" at {train['tokens_per_s']:,.0f} tokens/s (this CPU)",
        ["format", "perplexity", "x bf16", "bits per byte", "weights per device"],
        rows,
    )
    compare_verb.print_comparison(report["compare"])
    for row in report["generate"]["rows"]:
        print(f"{row['prompt']!r} -> {row['text']!r}")
    print(
        f"{report['generate']['tokens_per_s']:.1f} tokens/s decoded (this CPU); "
        f"{report['seconds']:.0f} s and {bytes_text(report['peak_memory_bytes'])} in all; "
        f"open {out / 'report.html'}"
    )
