"""The hooks that runs are made of: checkpoints, evaluation, metrics, stopping.

A system of its own adds hooks of its own: see `trainer.Hook`.

    hooks = [StopHook(request), CheckpointHook(store, 100, describe), EvaluationHook(evaluate, 50)]
    Trainer(program, batches, hooks).run(state, steps=200)
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.training.metrics import MetricsWriter
from tpu_stack.training.step import Metrics
from tpu_stack.training.stop import StopRequest
from tpu_stack.training.trainer import Hook, Trainer


class Found(Protocol):
    """What an evaluation found."""

    def metrics(self) -> dict[str, float]:
        """Figures to log, by name."""
        ...


class CheckpointHook(Hook):
    """Saves every so many steps (0: never), and at the end. `describe` says the meta item."""

    def __init__(
        self,
        store: CheckpointStore,
        every: int,
        describe: Callable[[Trainer], Mapping[str, Any]],
    ):
        self._store, self._every, self._describe = store, every, describe

    def items(self, trainer: Trainer) -> dict[str, Any]:
        """What is saved, by name; override it to save more."""
        return {"params": trainer.state.params, "optimizer": trainer.state.opt_state}

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if is_due(trainer.step, self._every):
            with trainer.paused():
                self._save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.step not in self._store.steps:
            self._store.save(trainer.step, self.items(trainer), self._describe(trainer))
            trainer.saved()


class EvaluationHook(Hook):
    """Evaluates every so many steps (0: never), and at the end, unless a signal stopped the run.

    `evaluate(trainer, final)` gets `final` at the end, when a cheaper evaluation would not do.
    """

    def __init__(self, evaluate: Callable[[Trainer, bool], Found], every: int):
        self._evaluate, self._every = evaluate, every

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if is_due(trainer.step, self._every) and trainer.step < trainer.last_step:
            with trainer.paused():
                trainer.evaluated(self._evaluate(trainer, False))

    def on_end(self, trainer: Trainer) -> None:
        if not isinstance(trainer.stopped_by, int):
            trainer.evaluated(self._evaluate(trainer, True))


class MetricsHook(Hook):
    """Writes the metrics of every so many steps, with `rates(trainer)`, and every evaluation."""

    def __init__(
        self, writer: MetricsWriter, every: int, rates: Callable[[Trainer], dict[str, float]]
    ):
        self._writer, self._every, self._rates = writer, every, rates

    def on_metrics(self, trainer: Trainer, step: int, values: dict[str, float]) -> None:
        if is_due(step, self._every):
            rows = {**values, **self._rates(trainer)}
            self._writer.write(step, {f"train/{name}": value for name, value in rows.items()})

    def on_evaluation(self, trainer: Trainer, found: Found) -> None:
        values = {f"val/{name}": value for name, value in found.metrics().items()}
        self._writer.write(trainer.step, values)


class StopHook(Hook):
    """Ends the run after the step under way when a signal has asked for it."""

    def __init__(self, request: StopRequest):
        self._request = request

    def on_start(self, trainer: Trainer) -> None:
        self._look(trainer)

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if self._request.signal is not None:
            trainer.stop(self._request.signal)


def is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps is done after `step`; never where `every` is 0."""
    return every > 0 and step % every == 0
