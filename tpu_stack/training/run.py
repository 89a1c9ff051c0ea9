"""What `tpu-stack train` does, without its options and tables: a job, and running it.

The verb is these two calls.

    job = make_job("nano", "8t", DataConfig(), TrainConfig(steps=200))
    result = train(job, out=Path("runs/a"))
    result.to_dict()["loss_last"]
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tpu_stack.checkpoint.store import ORIGINAL_FILES, CheckpointStore
from tpu_stack.data.chat_format import CHAT
from tpu_stack.data.pipeline import Corpus, DataConfig, eval_batches, load_corpus
from tpu_stack.data.token_batches import TokenBatches
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.errors import UserError
from tpu_stack.models.abstract import parameter_count, tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.flops import train_flops_per_token
from tpu_stack.models.presets import get_preset
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.sharding.placement import PlacementOptions, devices_for, place
from tpu_stack.sharding.profiles import Profile, require_batch_divides
from tpu_stack.training.allocator import keep_freed_memory
from tpu_stack.training.config import TrainConfig
from tpu_stack.training.evaluate import Evaluation, Evaluator
from tpu_stack.training.hooks import CheckpointHook, EvaluationHook, MetricsHook, StopHook
from tpu_stack.training.layout import StateLayout
from tpu_stack.training.losses import NextTokenLoss
from tpu_stack.training.metrics import MetricsWriter
from tpu_stack.training.optimizer import make_optimizer
from tpu_stack.training.program import TrainProgram
from tpu_stack.training.resume import checkpoint_meta, flat, restore_state
from tpu_stack.training.step import TrainState
from tpu_stack.training.stop import StopRequest
from tpu_stack.training.throughput import peak_flops_per_s
from tpu_stack.training.trainer import AHEAD, Hook, Trainer


@dataclass(frozen=True)
class Job:
    """What is trained, how, where and on what; `init` is the run folder whose newest parameters a
    new run begins with, in place of random ones."""

    config: ModelConfig
    train: TrainConfig
    profile: Profile
    mesh: Mesh
    corpus: Corpus
    data: DataConfig
    init: Path | None = None

    @property
    def dtype(self) -> str:
        """Compute dtype: the run's own, else the profile's."""
        return self.train.compute_dtype or self.profile.precision.compute

    @property
    def remat(self) -> Any:
        """Rematerialization policy: the run's own, else the profile's."""
        return self.train.remat or self.profile.remat

    def layout(self) -> StateLayout:
        """Where its state lives. Raises UserError when a tensor does not divide its mesh."""
        optimizer = make_optimizer(self.train, self.train.steps, self.config)
        return StateLayout.of(self.config, optimizer, self.profile, self.mesh)

    def loss(self) -> NextTokenLoss:
        """What it minimizes."""
        return NextTokenLoss(self.config, self.dtype, self.remat, self.train.unroll)

    def batches(self) -> TokenBatches:
        """Its batches from the first on, this process's rows."""
        return TokenBatches(self.corpus, self.data, jax.process_index(), jax.process_count())

    def settings(self) -> dict[str, Any]:
        """What decides the sequence of its states, but for the batches; see `resume`."""
        return flat({"model": self.config.to_dict(), "train": self.train.trajectory()})


@dataclass
class TrainResult:
    """What a run produced. `losses` and `evaluations` are (step, value), steps counted from 1.

    stopped_by: why it ended before its last step, as `Trainer.stopped_by`: 15 for SIGTERM.
    """

    job: Job
    state: TrainState
    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)
    compile_s: float = 0.0
    tokens_per_s: float | None = None
    mfu: float | None = None
    stopped_by: int | str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The run in JSON-ready fields."""
        job, losses = self.job, [loss for _, loss in self.losses]
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
            "losses": self.losses,
            "evaluations": [(step, found.to_dict()) for step, found in self.evaluations],
            "compile_s": self.compile_s,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "stopped_by": self.stopped_by,
        }


def make_job(
    model: str | None,
    profile: str,
    data: DataConfig,
    train: TrainConfig,
    *,
    init: Path | None = None,
    placement: PlacementOptions = PlacementOptions(),  # noqa: B008
) -> Job:
    """Loads the corpus, fits the vocabulary to its tokenizer and lays the model on its mesh.

    Args:
      model: a preset; None where `init` is given, a run folder whose model, tokenizer and newest
        weights the run begins with.
      profile: NAME[:TOPOLOGY]; on a CPU its mesh is emulated.
      data: its rows are as many and as long as `train` says.

    Raises UserError for bad input of any of them.
    """
    data = replace(data, batch_size=train.batch_size, seq_len=train.seq_len)
    lay_out = partial(place, profile, "train", placement)
    if init is not None:
        devices_for(profile, "train", placement)  # opening a checkpoint starts JAX
        with CheckpointStore(init, read_only=True) as store:
            meta = store.meta(store.latest())
        config = ModelConfig.from_dict(meta["model"])
        tokenizer = Tokenizer.from_json(meta["tokenizer"], where=f"the tokenizer of {init}")
        placed, mesh = lay_out(tensor_specs(config))
        return Job(config, train, placed, mesh, load_corpus(data, tokenizer), data, init)
    if model is None:
        raise UserError("a run needs a model, or a run folder to begin from")
    preset = get_preset(model)
    lay_out(tensor_specs(preset))  # refuse before reading
    corpus = load_corpus(data)
    config = preset.replace(vocab_size=-(-corpus.tokenizer.vocab_size // 64) * 64)
    placed, mesh = lay_out(tensor_specs(config))
    return Job(config, train, placed, mesh, corpus, data)


def train(
    job: Job, out: Path | None = None, *, resume: bool = False, hooks: Sequence[Hook] = ()
) -> TrainResult:
    """Runs the job to `train.steps`, from its last checkpoint in `out` when `resume`.

    SIGTERM and the first Ctrl-C end it after the step under way, saved, with the signal's number in
    `stopped_by`; a second Ctrl-C raises KeyboardInterrupt.

    `hooks` are told after the run's own. Without `out` nothing is written. Raises UserError when a
    mesh or batch does not divide, `out` already holds a run and `resume` is off, or the checkpoint
    is of another job; NotFinite when the loss is not finite: then nothing of it is saved.
    """
    require_batch_divides(job.profile, job.train.batch_size // job.train.accumulate)
    layout, batches = job.layout(), job.batches()
    on_cpu = job.mesh.devices.flat[0].platform == "cpu"
    if on_cpu:
        keep_freed_memory()
    with ExitStack() as stack:
        own: list[Hook] = [StopHook(stack.enter_context(StopRequest()))]
        store = None if out is None else stack.enter_context(CheckpointStore(out))
        if store is not None and store.steps and not resume:
            raise UserError(f"{out} already holds a run; resume it or choose another folder")
        state = _first_state(job, layout, batches, store)
        first = int(state.step)
        if first > job.train.steps:
            raise UserError(
                f"steps is {job.train.steps}; the checkpoint is at step {first} already"
            )
        result = TrainResult(job, state)
        own += [_History(result)]
        if out is not None and store is not None:
            writer = stack.enter_context(MetricsWriter(out, resume_at=first))
            describe = partial(_describe, job, {**job.settings(), **batches.fingerprint()})
            own += [
                MetricsHook(writer, job.train.log_every, partial(_rates, job)),
                CheckpointHook(store, job.train.checkpoint_every, describe),
            ]
        own += [EvaluationHook(_evaluation(job, layout), job.train.eval_every), *hooks]
        program = TrainProgram.compile(
            job.loss(), layout, batches.element_spec, accumulate=job.train.accumulate
        )
        result.compile_s = program.compile_s
        if job.init is not None and out is not None:
            _carry_over(job.init, out)  # before the first checkpoint, which stands alone
        ahead = 0 if on_cpu else AHEAD
        trainer = Trainer(program, batches, own, log_every=job.train.log_every, ahead=ahead)
        result.state = trainer.run(state, job.train.steps)
    result.stopped_by = trainer.stopped_by
    rates = _rates(job, trainer)
    result.tokens_per_s, result.mfu = rates.get("tokens_per_s"), rates.get("mfu")
    return result


class _History(Hook):
    """Keeps every loss and every evaluation in a result."""

    def __init__(self, result: TrainResult):
        self._result = result

    def on_metrics(self, trainer: Trainer, step: int, values: dict[str, float]) -> None:
        self._result.losses.append((step, values["loss"]))

    def on_evaluation(self, trainer: Trainer, found: Any) -> None:
        self._result.evaluations.append((trainer.step, found))


def _first_state(
    job: Job, layout: StateLayout, batches: TokenBatches, store: CheckpointStore | None
) -> TrainState:
    if store is not None and store.steps:
        # Fields of the model that came after the checkpoint are what they were without being told.
        saved = store.meta(store.latest())["model"]
        defaults = flat({"model": ModelConfig.from_dict(saved).to_dict()})
        settings = {**job.settings(), **batches.fingerprint()}
        return restore_state(store, layout, batches, settings, defaults)
    if job.init is None:
        return layout.init(job.train.seed)
    with CheckpointStore(job.init, read_only=True) as initial:
        params = initial.restore(initial.latest(), "params", layout.abstract.params)
    return layout.begin(params, job.train.seed)


def _describe(job: Job, settings: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """The meta item; `model` and `tokenizer` make a checkpoint stand alone."""
    alone = {"model": job.config.to_dict(), "tokenizer": job.corpus.tokenizer.to_json()}
    return {**alone, **checkpoint_meta(trainer, settings)}


def _evaluation(job: Job, layout: StateLayout) -> Callable[[Trainer, bool], Evaluation]:
    evaluator = Evaluator(job.config, dtype=job.dtype, batch=layout.batch, unroll=job.train.unroll)

    def evaluate(trainer: Trainer, final: bool) -> Evaluation:
        processes = (jax.process_index(), jax.process_count())
        batches = eval_batches(job.corpus, job.data, "val", *processes)
        limit = None if final else job.train.eval_batches or None
        with sharding_scope(job.mesh, job.profile.rules):
            return evaluator.run(trainer.state.params, batches, job.corpus.val, limit)

    return evaluate


def _rates(job: Job, trainer: Trainer) -> dict[str, float]:
    """Tokens per second over all devices, and MFU where the chip is known; {} before step 2."""
    steps_per_s = trainer.clock.steps_per_s
    if steps_per_s is None:
        return {}
    rates = {"tokens_per_s": steps_per_s * job.train.batch_size * job.train.seq_len}
    peak = peak_flops_per_s(job.mesh)
    if peak is not None:
        flops = train_flops_per_token(job.config, job.train.seq_len)
        rates["mfu"] = rates["tokens_per_s"] * flops / peak
    return rates


def _carry_over(init: Path, out: Path) -> None:
    """Copies what belongs to the model and is no weight: its chat format, and the small files of
    the Hugging Face folder that it came from, which `export` asks for."""
    if (init / CHAT).is_file():
        shutil.copyfile(init / CHAT, out / CHAT)
    if (init / ORIGINAL_FILES).is_dir():
        shutil.copytree(init / ORIGINAL_FILES, out / ORIGINAL_FILES, dirs_exist_ok=True)
