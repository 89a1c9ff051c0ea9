"""The training loop: everything around the pure step that has side effects.

Feeds batches, logs, evaluates, checkpoints, resumes bit for bit, and on SIGTERM or Ctrl-C saves
before it leaves.

>>> job = Job(config, TrainConfig(steps=200), profile, mesh, corpus, data)
>>> result = train(job, out=Path("runs/a"))
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.data.pipeline import Corpus, DataConfig, eval_batches, train_iterator
from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.sharding.profiles import Profile, require_batch_divides
from tpu_stack.training.allocator import keep_freed_memory
from tpu_stack.training.config import TrainConfig
from tpu_stack.training.evaluate import Evaluation, Evaluator, place_batch
from tpu_stack.training.layout import StateLayout
from tpu_stack.training.metrics import MetricsWriter
from tpu_stack.training.optimizer import make_optimizer
from tpu_stack.training.resume import checkpoint_meta, restore_state
from tpu_stack.training.step import TrainState, make_train_step
from tpu_stack.training.stop import StopRequest
from tpu_stack.training.throughput import Throughput

Listener = Callable[[int, dict[str, float]], None]


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
    def remat(self) -> str:
        """Rematerialization policy: the run's own, else the profile's."""
        return self.train.remat or self.profile.remat


@dataclass
class TrainResult:
    """What a run produced. `losses` and `evaluations` are (step, value), steps counted from 1."""

    state: TrainState
    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)
    compile_s: float = 0.0
    tokens_per_s: float | None = None
    mfu: float | None = None
    stopped_by: int | None = None


def compile_step(job: Job, layout: StateLayout):
    """The train step, compiled for the job's mesh and batch; donates the state."""
    step = make_train_step(
        job.config, layout.optimizer, job.train, dtype=job.dtype, remat=job.remat
    )
    batch = layout.abstract_batch(job.train.batch_size, job.train.seq_len)
    with sharding_scope(job.mesh, job.profile.rules):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout.shardings, None))
        return jitted.lower(layout.abstract, batch).compile()


def train(
    job: Job,
    out: Path | None = None,
    *,
    resume: bool = False,
    listener: Listener = lambda step, values: None,
) -> TrainResult:
    """Runs the job to `train.steps`, from its last checkpoint in `out` when `resume`.

    `listener` is told every step's loss and every evaluation. Without `out` nothing is written.
    Raises UserError when a mesh or batch does not divide, `out` already holds a run and `resume`
    is off, or the checkpoint is of another job.
    """
    require_batch_divides(job.profile, job.train.batch_size // job.train.accumulate)
    layout = StateLayout.of(
        job.config, make_optimizer(job.train, job.config), job.profile, job.mesh
    )
    if job.mesh.devices.flat[0].platform == "cpu":
        keep_freed_memory()
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        store = metrics = None
        batches = train_iterator(job.corpus, job.data, jax.process_index(), jax.process_count())
        if out is not None:
            store = stack.enter_context(CheckpointStore(out))
            if store.steps and not resume:
                raise UserError(f"{out} already holds a run; add --resume or choose another --out")
        if store is not None and store.steps:
            state = restore_state(
                job.config, job.train, job.data, job.corpus, layout, store, batches
            )
        else:
            state = _first_state(job, layout)
        first = int(state.step)
        if first > job.train.steps:
            raise UserError(f"--train.steps {job.train.steps}: the checkpoint is at step {first}")
        if out is not None:
            metrics = stack.enter_context(MetricsWriter(out, resume_at=first))
        return _Run(job, layout, batches, listener, stop, store, metrics).steps(state)


def _first_state(job: Job, layout: StateLayout) -> TrainState:
    if job.init is None:
        return layout.init(job.train.seed)
    with CheckpointStore(job.init, read_only=True) as store:
        params = store.restore(store.latest(), "params", layout.abstract.params)
    return layout.begin(params, job.train.seed)


@dataclass
class _Run:
    """One run's collaborators; `steps` is the loop itself."""

    job: Job
    layout: StateLayout
    batches: Any
    listener: Listener
    stop: StopRequest
    store: CheckpointStore | None
    metrics: MetricsWriter | None

    def __post_init__(self) -> None:
        job, layout = self.job, self.layout
        self.evaluator = Evaluator(
            job.config, dtype=job.dtype, batch=layout.batch, unroll=job.train.unroll
        )
        self.throughput = Throughput(job.config, job.profile, job.train, job.mesh)

    def steps(self, state: TrainState) -> TrainResult:
        """Steps from `state` to the end or to a stop, with a final evaluation and checkpoint."""
        job, started = self.job, time.perf_counter()
        step_function = compile_step(job, self.layout)
        result = TrainResult(state, compile_s=time.perf_counter() - started)
        step = int(state.step)
        saved = None
        while step < job.train.steps and not self.stop.signal:
            batch = place_batch(next(self.batches), self.layout.batch)
            with self.throughput:
                result.state, metrics = step_function(result.state, batch)
                loss, grad_norm = (float(metrics[name]) for name in ("loss", "grad_norm"))
            step += 1
            self._note_step(step, loss, grad_norm, result)
            if _due(step, job.train.eval_every) and step < job.train.steps:
                self._evaluate(step, result, job.train.eval_batches or None)
            if _due(step, job.train.checkpoint_every):
                self._save(step, result.state)
                saved = step
        result.tokens_per_s, result.mfu = self.throughput.tokens_per_s, self.throughput.mfu
        result.stopped_by = self.stop.signal
        if saved != step:
            self._save(step, result.state)
        if not self.stop.signal:
            self._evaluate(step, result, None)
        return result

    def _note_step(self, step: int, loss: float, grad_norm: float, result: TrainResult) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise UserError(
                f"the loss is {loss} and its gradient's norm {grad_norm} at step {step};"
                f" lower --train.learning_rate ({self.job.train.learning_rate})"
            )
        result.losses.append((step, loss))
        self.listener(step, {"loss": loss})
        if self.metrics is not None and _due(step, self.job.train.log_every):
            values = {"train/loss": loss, "train/grad_norm": grad_norm}
            if self.throughput.tokens_per_s is not None:
                values["train/tokens_per_s"] = self.throughput.tokens_per_s
            if self.throughput.mfu is not None:
                values["train/mfu"] = self.throughput.mfu
            self.metrics.write(step, values)

    def _evaluate(self, step: int, result: TrainResult, limit: int | None) -> None:
        job = self.job
        batches = eval_batches(
            job.corpus, job.data, "val", jax.process_index(), jax.process_count()
        )
        with sharding_scope(job.mesh, job.profile.rules):
            found = self.evaluator.run(result.state.params, batches, job.corpus.val, limit)
        result.evaluations.append((step, found))
        self.listener(step, {"val_loss": found.loss})
        if self.metrics is not None:
            self.metrics.write(step, {"val/loss": found.loss, "val/perplexity": found.perplexity})

    def _save(self, step: int, state: TrainState) -> None:
        if self.store is not None and step not in self.store.steps:
            meta = checkpoint_meta(
                self.job.config, self.job.train, self.job.data, self.job.corpus, state, self.batches
            )
            self.store.save(step, {"params": state.params, "optimizer": state.opt_state}, meta)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
