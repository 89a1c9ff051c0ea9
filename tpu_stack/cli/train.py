"""`tpu-stack train`: a model, a training profile, some text, a folder for the run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tpu_stack.cli.console import print_table, progress, save_json
from tpu_stack.cli.placement import Unprefixed
from tpu_stack.cli.text import TextOptions, data_config
from tpu_stack.errors import UserError
from tpu_stack.sharding.placement import PlacementOptions
from tpu_stack.training.config import TrainConfig

if TYPE_CHECKING:
    from tpu_stack.training.run import Job, TrainResult


@dataclass(frozen=True)
class Options:
    """Train a model under a training profile; on a CPU the profile's mesh is emulated.

    The vocabulary is the tokenizer's, rounded up to a multiple of 64; --init keeps its model's.

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
    with a new optimizer state; instead of --model and --text.tokenizer."""
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
    """Trains, prints the result, and returns 128 + signal where a signal stopped the run early."""
    result = train_behind_a_bar(make_job(options), options.out, options.resume)
    summary = result.to_dict()
    print_table(f"run {options.out}", ["what", "value"], _rows(summary))
    save_json(options.json, summary)
    return 128 + result.stopped_by if isinstance(result.stopped_by, int) else 0


def make_job(options: Options) -> "Job":
    """The job that the options describe; see `training.run.make_job`."""
    init = options.init
    for flag, given, usual in (
        ("--model", options.model, Options.model),
        ("--text.tokenizer", options.text.tokenizer, TextOptions.tokenizer),
    ):
        if init is not None and given != usual:
            raise UserError(f"{flag} {given}: --init {init} brings its own; leave {flag} out")
    from tpu_stack.training import run

    train = options.train
    data = data_config(
        options.data, options.text, seq_len=train.seq_len, batch_size=train.batch_size
    )
    model = None if init else options.model
    return run.make_job(model, options.profile, data, train, init=init, placement=options.place)


def train_behind_a_bar(job: "Job", out: Path | None, resume: bool) -> "TrainResult":
    """Trains with a progress bar on standard error."""
    from tpu_stack.training.run import train
    from tpu_stack.training.trainer import Hook

    with progress() as bar:
        task = bar.add_task("train", total=job.train.steps, note="compiling")
        notes: dict[str, float] = {}

        class Bar(Hook):
            def on_step(self, trainer, metrics) -> None:
                bar.update(task, completed=trainer.step)

            def on_metrics(self, trainer, step, values) -> None:
                self._note(loss=values["loss"])

            def on_evaluation(self, trainer, found) -> None:
                self._note(val_loss=found.loss)

            def _note(self, **news: float) -> None:
                notes.update(news)
                text = " ".join(f"{name} {value:.3f}" for name, value in notes.items())
                bar.update(task, note=text)

        return train(job, out, resume=resume, hooks=[Bar()])


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
    rows.append(["MFU", "unknown for this device" if mfu is None else f"{mfu:.1%}"])
    if summary["stopped_by"]:
        rows.append(["stopped by signal", str(summary["stopped_by"])])
    return rows
