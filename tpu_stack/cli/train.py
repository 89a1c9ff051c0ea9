"""`tpu-stack train`: a model, a training profile, some text, a folder for the run."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tpu_stack.cli.console import print_table, progress, save_json
from tpu_stack.cli.placement import Unprefixed
from tpu_stack.cli.text import TextOptions, data_config
from tpu_stack.errors import UserError
from tpu_stack.sharding.placement import PlacementOptions, devices_for, place
from tpu_stack.training.config import TrainConfig

if TYPE_CHECKING:
    from tpu_stack.training.loop import Job, TrainResult


@dataclass(frozen=True)
class Options:
    """Train a model under a training profile; on a CPU the profile's mesh is emulated.

    The model's vocabulary is the tokenizer's, rounded up to a multiple of 64.

    Example: tpu-stack train --model nano --profile 8t --train.steps 100 --out runs/a
    """

    out: Path
    """Folder of the run: checkpoints, metrics.jsonl, TensorBoard events."""
    model: str = "nano"
    """Preset to train; `tpu-stack profiles --help` lists them."""
    profile: str = "8t"
    """Training profile, NAME[:TOPOLOGY]; counts chips."""
    init: Path | None = None
    """Run folder of `train` or `import` to begin from: its model, tokenizer and newest weights,
    with a new optimizer. Takes the place of --model and --text.tokenizer."""
    data: tuple[Path, ...] = ()
    """Files and folders of text; the default is Python's standard library."""
    resume: bool = False
    """Continue from the newest checkpoint in --out, bit for bit."""
    json: Path | None = None
    """Also write the result to this file."""
    train: TrainConfig = field(default_factory=TrainConfig)
    text: TextOptions = field(default_factory=TextOptions)
    place: Annotated[PlacementOptions, Unprefixed] = field(default_factory=PlacementOptions)


def run(options: Options) -> int:
    """Trains, prints what came of it, and returns 128 + signal when one stopped the run early."""
    job = make_job(options)
    result = run_job(job, options.out, options.resume)
    if options.init is not None:
        carry_over(options.init, options.out)
    summary = summarize(job, result)
    print_table(f"run {options.out}", ["what", "value"], _rows(summary))
    save_json(options.json, summary)
    return 128 + result.stopped_by if result.stopped_by else 0


def make_job(options: Options) -> "Job":
    """Loads the corpus, fits the vocabulary and lays the model on its mesh."""
    from tpu_stack.data.pipeline import load_corpus
    from tpu_stack.models.abstract import tensor_specs
    from tpu_stack.models.presets import get_preset
    from tpu_stack.training.loop import Job

    train = options.train
    if options.init is not None:
        return _continued(options, options.init)
    preset = get_preset(options.model)
    data = data_config(
        options.data, options.text, seq_len=train.seq_len, batch_size=train.batch_size
    )
    place(options.profile, "train", options.place, tensor_specs(preset))  # refuse before reading
    corpus = load_corpus(data)
    config = preset.replace(vocab_size=-(-corpus.tokenizer.vocab_size // 64) * 64)
    profile, mesh = place(options.profile, "train", options.place, tensor_specs(config))
    return Job(config, train, profile, mesh, corpus, data)


def _continued(options: Options, init: Path) -> "Job":
    """A job that begins with the weights of another run."""
    for flag, given, usual in (
        ("--model", options.model, Options.model),
        ("--text.tokenizer", options.text.tokenizer, TextOptions.tokenizer),
    ):
        if given != usual:
            raise UserError(f"{flag} {given}: --init {init} brings its own; leave {flag} out")
    devices_for(options.profile, "train", options.place)  # opening a checkpoint starts JAX
    from tpu_stack.checkpoint.store import CheckpointStore
    from tpu_stack.data.pipeline import load_corpus
    from tpu_stack.data.tokenizer import Tokenizer
    from tpu_stack.models.abstract import tensor_specs
    from tpu_stack.models.config import ModelConfig
    from tpu_stack.training.loop import Job

    with CheckpointStore(init, read_only=True) as store:
        meta = store.meta(store.latest())
    config = ModelConfig.from_dict(meta["model"])
    tokenizer = Tokenizer.from_json(meta["tokenizer"], where=f"the tokenizer of {init}")
    profile, mesh = place(options.profile, "train", options.place, tensor_specs(config))
    train = options.train
    data = data_config(
        options.data, options.text, seq_len=train.seq_len, batch_size=train.batch_size
    )
    corpus = load_corpus(data, tokenizer)
    return Job(config, train, profile, mesh, corpus, data, init)


def carry_over(init: Path, out: Path) -> None:
    """Copies what belongs to the model and is no weight: its chat format, and the small files of
    the Hugging Face folder that it came from, which `export` asks for."""
    from tpu_stack.data.chat_format import CHAT
    from tpu_stack.serving.huggingface import ORIGINAL_FILES

    if (init / CHAT).is_file():
        shutil.copyfile(init / CHAT, out / CHAT)
    if (init / ORIGINAL_FILES).is_dir():
        shutil.copytree(init / ORIGINAL_FILES, out / ORIGINAL_FILES, dirs_exist_ok=True)


def run_job(job: "Job", out: Path | None, resume: bool) -> "TrainResult":
    """Trains behind a progress bar."""
    from tpu_stack.training.loop import train

    with progress() as bar:
        task = bar.add_task("train", total=job.train.steps, note="compiling")
        notes: dict[str, float] = {}

        def listener(step: int, values: dict[str, float]) -> None:
            notes.update(values)
            note = " ".join(f"{name} {value:.3f}" for name, value in notes.items())
            bar.update(task, completed=step, note=note)

        return train(job, out, resume=resume, listener=listener)


def summarize(job: "Job", result: "TrainResult") -> dict[str, Any]:
    """The run in JSON-ready fields."""
    from tpu_stack.models.abstract import parameter_count

    losses = [loss for _, loss in result.losses]
    return {
        "parameters": parameter_count(job.config),
        "profile": job.profile.name,
        "emulated": job.profile.emulated,
        "mesh": dict(job.profile.mesh),
        "device": job.mesh.devices.flat[0].device_kind,
        "compute_dtype": job.dtype,
        "steps": job.train.steps,
        "tokens_per_step": job.train.batch_size * job.train.seq_len,
        "train_tokens": len(job.corpus.train),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "losses": result.losses,
        "evaluations": [(step, found.to_dict()) for step, found in result.evaluations],
        "compile_s": result.compile_s,
        "tokens_per_s": result.tokens_per_s,
        "mfu": result.mfu,
        "stopped_by": result.stopped_by,
    }


def _rows(summary: dict[str, Any]) -> list[list[str]]:
    mesh = ", ".join(f"{axis}={size}" for axis, size in summary["mesh"].items())
    on = f"emulated on {summary['device']}" if summary["emulated"] else summary["device"]
    rows = [
        ["parameters", f"{summary['parameters']:,}"],
        [
            "profile",
            f"{summary['profile']} ({on}), mesh {mesh}, compute {summary['compute_dtype']}",
        ],
    ]
    if summary["losses"]:
        first, last = summary["losses"][0], summary["losses"][-1]
        rows.append(["loss", f"{first[1]:.3f} at step {first[0]}, {last[1]:.3f} at step {last[0]}"])
    for step, found in summary["evaluations"][-1:]:
        text = f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.3f}"
        if found["bits_per_byte"] is not None:
            text += f", {found['bits_per_byte']:.4f} bits per byte"
        rows.append([f"validation at step {step}", text])
    if summary["tokens_per_s"] is not None:
        rows.append(["tokens/s (measured)", f"{summary['tokens_per_s']:,.0f}"])
    mfu = summary["mfu"]
    rows.append(["MFU", "not known on this device" if mfu is None else f"{mfu:.1%}"])
    if summary["stopped_by"]:
        rows.append(["stopped by signal", str(summary["stopped_by"])])
    return rows
