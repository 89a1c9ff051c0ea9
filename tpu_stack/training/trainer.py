"""The training loop: it feeds batches to a step, and tells its hooks what happens.

All that a run does besides stepping is a hook (see `hooks`): checkpoints, evaluation, metrics, a
progress bar. The loop never makes the devices wait: it dispatches a step, prepares the next batch
while that step runs, and reads metrics when they are logged, at least one dispatch later.

    from tpu_stack.training.hooks import CheckpointHook

    trainer = Trainer(program, batches, [CheckpointHook(store, 100, describe)])
    state = trainer.run(state, steps=200)
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import jax

from tpu_stack.errors import UserError
from tpu_stack.training.batches import Batches
from tpu_stack.training.step import Metrics, TrainState
from tpu_stack.training.throughput import StepClock

AHEAD = 2
"""Steps that may be dispatched beyond the last known to have ended: enough to keep the devices
busy, and few enough that batches do not pile up on them. On a CPU there is nothing to keep busy: a
step that waits for the one before holds one of the threads that compute it."""

READ_EVERY = 100
"""Steps after which metrics are read though none are logged."""


class Step(Protocol):
    """What the trainer calls; `program.TrainProgram` is one."""

    def place(self, batch: Any) -> Any:
        """A host batch on the devices."""
        ...

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """The next state and its metrics, with the bool "finite" among them; consumes `state`."""
        ...


class NotFinite(UserError):
    """A step's loss or gradient was NaN or infinite. `step` counts from 1; `values` are its
    metrics. The state is still that of the step before."""

    def __init__(self, step: int, values: dict[str, float]):
        self.step, self.values = step, values
        super().__init__(
            f"the loss is {values.get('loss')} and its gradient's norm {values.get('grad_norm')} at"
            f" step {step}; lower the learning_rate, or look at that step's batch"
        )


class Hook:
    """Override what is of interest. Hooks are told in the order in which the trainer was given
    them; an exception in one ends the run, and `on_failure` is then called for all."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step."""

    def on_step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """After every dispatch. `metrics` are on the devices; reading them waits for the step."""

    def on_metrics(self, trainer: "Trainer", step: int, values: dict[str, float]) -> None:
        """For every step in order, once its metrics are on the host; `trainer.step` is further."""

    def on_evaluation(self, trainer: "Trainer", found: Any) -> None:
        """After an evaluation of `trainer.state`; `found` is what the evaluation returned."""

    def on_checkpoint(self, trainer: "Trainer") -> None:
        """After `trainer.state` was handed to the store."""

    def on_failure(self, trainer: "Trainer", error: BaseException) -> None:
        """When the run ends by an exception. For NotFinite, `trainer.step`, `state` and `position`
        are of the last good step."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last step, which has ended and was finite; also of a run that was stopped."""


class Trainer:
    """Steps through batches. Hooks get the trainer, and may read what it holds:

    Attributes:
      state: after `step` steps, perhaps not computed yet. The next dispatch consumes it: copy what
        must outlive the hook's call.
      step: steps dispatched, those of earlier runs included. last_step: where the run ends.
      position: the batches' state after the batch of `step`.
      clock: steps per second, and the time spent.
      stopped_by: why the run ends before its last step: a signal's number, or a hook's own words;
        None while it does not.
    """

    def __init__(
        self,
        step: Step,
        batches: Batches,
        hooks: Sequence[Hook] = (),
        *,
        log_every: int = 10,
        ahead: int = AHEAD,
    ):
        self._advance, self._batches, self._hooks = step, batches, tuple(hooks)
        self._log_every, self._ahead = log_every, ahead
        self._unread: deque[tuple[int, Metrics, Any]] = deque()  # step, metrics, position before it
        self.state: Any = None
        self.step = self.last_step = 0
        self.position: Any = None
        self.clock = StepClock()
        self.stopped_by: int | str | None = None
        self._is_paused = False

    def run(self, state: TrainState, steps: int) -> TrainState:
        """Steps from `state`, which it consumes, until step number `steps`; the last state.

        Ends early when the batches end or a hook calls `stop`. What goes wrong is told to the hooks
        and raised: NotFinite, and whatever the batches, the step or a hook raise.
        """
        self.state, self.step, self.last_step = state, int(state.step), steps
        self.position = self._batches.get_state()
        self.clock = StepClock()
        try:
            self._tell("on_start")
            self._loop()
            with self.paused():
                self._tell("on_end")
        except BaseException as error:
            self._tell_failure(error)
            raise
        return self.state

    def stop(self, reason: int | str) -> None:
        """Makes the run end after the step that was dispatched last."""
        self.stopped_by = reason

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, every dispatched step has ended and was finite, and the clock stands still.

        Raises NotFinite.
        """
        if self._is_paused:
            yield
            return
        self._read(self.step)
        self.clock.pause()
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self.clock.resume(self.step)

    def evaluated(self, found: Any) -> None:
        """Tells the hooks what an evaluation of `state` found."""
        self._tell("on_evaluation", found)

    def saved(self) -> None:
        """Tells the hooks that `state` is a checkpoint."""
        self._tell("on_checkpoint")

    def _loop(self) -> None:
        batch = self._fetch()
        while batch is not None:
            self.state, metrics = self._advance(self.state, batch)
            self.step += 1
            self._unread.append((self.step, metrics, self.position))
            self.position = self._batches.get_state()
            self._tell("on_step", metrics)
            batch = self._fetch()  # while the step runs
            self._catch_up()

    def _fetch(self) -> Any:
        """The next batch on the devices; None when there is no further step."""
        if self.stopped_by is not None or self.step >= self.last_step:
            return None
        try:
            return self._advance.place(next(self._batches))
        except StopIteration:
            return None

    def _catch_up(self) -> None:
        """Reads what was to be logged before the step under way, and waits while too far ahead."""
        before = self.step - 1
        overdue = len(self._unread) > READ_EVERY
        if overdue or (self._log_every and before % self._log_every == 0):
            self._read(before)
        too_far = self.step - self._ahead
        if self._unread and self._unread[0][0] <= too_far:
            _, metrics, _ = self._unread[too_far - self._unread[0][0]]
            jax.block_until_ready(metrics)
            self.clock.ended(too_far)

    def _read(self, last: int) -> None:
        """Brings the metrics of all steps up to `last` to the host, and tells the hooks."""
        entries = []
        while self._unread and self._unread[0][0] <= last:
            entries.append(self._unread.popleft())
        if not entries:
            return
        on_host = jax.device_get([metrics for _, metrics, _ in entries])  # waits for them
        self.clock.ended(entries[-1][0])
        for (step, _, position), metrics in zip(entries, on_host, strict=True):
            values = {name: float(value) for name, value in metrics.items()}
            finite = bool(values.pop("finite"))
            if not (finite and math.isfinite(values["loss"])):
                self._unread.clear()
                self.step, self.position = step - 1, position
                raise NotFinite(step, values)
            self._tell("on_metrics", step, values)

    def _tell(self, event: str, *news: Any) -> None:
        for hook in self._hooks:
            getattr(hook, event)(self, *news)

    def _tell_failure(self, error: BaseException) -> None:
        """Tells every hook, whatever others make of it; the first error is the one to raise."""
        for hook in self._hooks:
            try:
                hook.on_failure(self, error)
            except Exception as second:
                error.add_note(f"then {type(hook).__name__}.on_failure raised {second!r}")
