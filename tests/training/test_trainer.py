"""The loop itself: what it tells hooks and when, what it saves when something fails, and that it
never waits for the devices where it need not."""

import operator
from typing import Any

import clip_regression as clips
import jax
import numpy as np
import pytest

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.errors import UserError
from tpu_stack.training.evaluate import Evaluation
from tpu_stack.training.hooks import CheckpointHook, EvaluationHook
from tpu_stack.training.resume import checkpoint_meta, restore_state
from tpu_stack.training.throughput import StepClock
from tpu_stack.training.trainer import AHEAD, READ_EVERY, Hook, NotFinite, Trainer

FOUND = Evaluation(1.0, 1, None)
MESH = "data=2,fsdp=2,tensor=2"


@pytest.fixture(scope="module")
def bench() -> clips.Bench:
    return clips.Bench.on(MESH)


@pytest.fixture(scope="module")
def program(bench):
    return bench.program(accumulate=2)


class Log(Hook):
    """What was told, in order; `at` makes one event raise or stop."""

    def __init__(self, at: tuple[str, int] | None = None, act: Any = None):
        self.told: list[tuple] = []
        self._at, self._act = at, act

    def _note(self, trainer: Trainer, event: str, *news: Any) -> None:
        self.told.append((event, *news))
        if self._at == (event, trainer.step):
            self._act(trainer)

    def on_start(self, trainer):
        self._note(trainer, "start", trainer.step)

    def on_step(self, trainer, metrics):
        assert set(metrics) == {"loss", "error", "noise", "grad_norm", "finite"}
        self._note(trainer, "step", trainer.step)

    def on_metrics(self, trainer, step, values):
        self._note(trainer, "metrics", step)

    def on_evaluation(self, trainer, found):
        self._note(trainer, "evaluation", trainer.step)

    def on_checkpoint(self, trainer):
        self._note(trainer, "checkpoint", trainer.step)

    def on_failure(self, trainer, error):
        self._note(trainer, "failure", type(error).__name__, trainer.step)

    def on_end(self, trainer):
        self._note(trainer, "end", trainer.step)

    def of(self, event: str) -> list[int]:
        return [entry[1] for entry in self.told if entry[0] == event]


def described(trainer: Trainer) -> dict[str, Any]:
    return checkpoint_meta(trainer, clips.Clips().fingerprint())


def run(bench, program, steps: int, *hooks: Hook, batches: Any = None, **options: Any):
    trainer = Trainer(program, batches or clips.Clips(), hooks, **options)
    trainer.run(bench.layout.init(0), steps)
    return trainer


def values_of(state: Any) -> list[np.ndarray]:
    return [
        np.asarray(leaf) for leaf in jax.tree.leaves((state.step, state.params, state.opt_state))
    ]


def test_what_hooks_are_told(bench, program, tmp_path):
    log, seen = Log(), []
    with CheckpointStore(tmp_path) as store:

        def evaluate(trainer: Trainer, final: bool) -> Evaluation:
            seen.append((trainer.step, final))
            return FOUND

        evaluation = EvaluationHook(evaluate, 3)
        run(bench, program, 7, CheckpointHook(store, 4, described), evaluation, log, log_every=2)
    assert log.told == [
        ("start", 0), ("step", 1), ("step", 2),
        ("metrics", 1), ("metrics", 2), ("metrics", 3), ("evaluation", 3), ("step", 3),
        ("metrics", 4), ("checkpoint", 4), ("step", 4), ("step", 5),
        ("metrics", 5), ("metrics", 6), ("evaluation", 6), ("step", 6), ("step", 7),
        ("metrics", 7), ("checkpoint", 7), ("evaluation", 7), ("end", 7),
    ]  # fmt: skip
    assert seen == [(3, False), (6, False), (7, True)]
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert store.steps == [4, 7]


@pytest.mark.parametrize("saved_at", [3, 4])
def test_resuming_is_bit_for_bit(bench, program, tmp_path, saved_at):
    """With a position, a key and an optimizer that matter; the batch made ahead is made again."""
    straight = run(bench, program, 8)
    with CheckpointStore(tmp_path) as store:
        run(bench, program, saved_at, CheckpointHook(store, 0, described))
        store.wait()
        batches = clips.Clips()
        state = restore_state(store, bench.layout, batches, batches.fingerprint())
        assert batches.get_state() == {"index": saved_at}
        log = Log()
        resumed = Trainer(program, batches, [log])
        resumed.run(state, 8)
        with pytest.raises(UserError, match=r"cannot resume .*: clips\.seed was 0 and is now 1"):
            restore_state(store, bench.layout, batches, {"clips.seed": 1})
    assert log.of("metrics") == list(range(saved_at + 1, 9))
    for one, other in zip(values_of(straight.state), values_of(resumed.state), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("log_every", [0, 1, 3, 50])
def test_a_bad_loss_is_named_and_poisons_nothing(bench, program, log_every):
    """However late it is read: good batches follow the bad one, and the state stays before it."""
    bad = 5
    good = run(bench, program, bad - 1)
    log = Log()
    trainer = Trainer(program, clips.Clips(spoil=bad - 1), [log], log_every=log_every)
    with pytest.raises(NotFinite, match=rf"the loss is nan .* at step {bad};") as failure:
        trainer.run(bench.layout.init(0), 12)
    assert failure.value.step == bad
    assert log.of("metrics") == list(range(1, bad))
    assert log.told[-1] == ("failure", "NotFinite", bad - 1)
    assert not log.of("end")
    assert trainer.step == bad - 1
    assert trainer.position == {"index": bad - 1}
    for one, other in zip(values_of(trainer.state), values_of(good.state), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("every", [2, 5, 0])
def test_no_checkpoint_holds_what_followed_a_bad_step(bench, program, tmp_path, every):
    """Step 5 is bad: step 4 is saved where it was due, and neither 5 nor the end."""
    with CheckpointStore(tmp_path) as store:
        hook = CheckpointHook(store, every, described)
        with pytest.raises(NotFinite):
            run(bench, program, 9, hook, batches=clips.Clips(spoil=4), log_every=0)
        store.wait()
        assert store.steps == ([2, 4] if every == 2 else [])


def test_a_hook_may_save_what_a_failure_left(bench, program, tmp_path):
    """And the run goes on from there, with other batches, as if nothing had been."""
    with CheckpointStore(tmp_path) as store:

        class Rescue(CheckpointHook):
            def on_failure(self, trainer, error):
                self._save(trainer)

        with pytest.raises(NotFinite):
            run(bench, program, 8, Rescue(store, 0, described), batches=clips.Clips(spoil=3))
        store.wait()
        assert store.steps == [3]
        batches = clips.Clips()
        state = restore_state(store, bench.layout, batches, batches.fingerprint())
        rescued = Trainer(program, batches).run(state, 8)
    straight = run(bench, program, 8)
    for one, other in zip(values_of(straight.state), values_of(rescued), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "event", [("start", 0), ("step", 3), ("metrics", 4), ("end", 6), ("evaluation", 6)]
)
def test_a_hook_that_raises_ends_the_run_and_all_are_told(bench, program, event):
    def fall(trainer: Trainer) -> None:
        raise RuntimeError("the hook fell")

    class AlsoFails(Hook):
        def on_failure(self, trainer, error):
            raise ValueError("and this one")

    first, last = Log(), Log()
    evaluation = EvaluationHook(lambda trainer, final: FOUND, 0)
    hooks = (first, evaluation, Log(event, fall), AlsoFails(), last)
    with pytest.raises(RuntimeError, match="the hook fell") as failure:
        run(bench, program, 6, *hooks, log_every=3)
    (note,) = failure.value.__notes__
    assert note == "then AlsoFails.on_failure raised ValueError('and this one')"
    for log in (first, last):
        assert log.told[-1] == ("failure", "RuntimeError", event[1])


def test_stopping_and_running_out(bench, program):
    log = Log(("step", 4), operator.methodcaller("stop", 15))
    stopped = run(bench, program, 9, log, EvaluationHook(lambda trainer, final: FOUND, 0))
    assert (stopped.step, stopped.stopped_by) == (4, 15)
    assert stopped.position == {"index": 4}
    assert log.of("metrics") == [1, 2, 3, 4]
    assert log.told[-1] == ("end", 4)  # and no evaluation
    log = Log(("step", 2), operator.methodcaller("stop", "good enough"))
    run(bench, program, 9, log, EvaluationHook(lambda trainer, final: FOUND, 0))
    assert log.told[-2:] == [("end", 2), ("evaluation", 2)]
    log = Log(("start", 0), operator.methodcaller("stop", 2))
    assert run(bench, program, 9, log).step == 0
    ended = run(bench, program, 9, batches=clips.Clips(length=5))
    assert (ended.step, ended.stopped_by) == (5, None)


class Later:
    """A metric that notes when it is waited for and when it is read."""

    def __init__(self, step: int, value: float, events: list[tuple[str, int]]):
        self.step, self.value, self.events = step, value, events

    def block_until_ready(self) -> "Later":
        self.events.append(("wait", self.step))
        return self

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.events.append(("read", self.step))
        return np.asarray(self.value, dtype)


class Dispatcher:
    """A step whose results come later."""

    def __init__(self, events: list[tuple[str, int]]):
        self.events, self.dispatched = events, 0

    def place(self, batch: Any) -> Any:
        self.events.append(("place", self.dispatched + 1))
        return batch

    def __call__(self, state: Any, batch: Any):
        self.dispatched += 1
        self.events.append(("dispatch", self.dispatched))
        return state, {
            "loss": Later(self.dispatched, 1.0, self.events),
            "finite": Later(self.dispatched, 1.0, self.events),
        }


class NoState:
    step = 0


@pytest.mark.parametrize("log_every", [0, 1, 7, 10])
def test_no_step_waits_for_the_host(log_every):
    """When a step is dispatched, the one before is neither read nor waited for; the next batch is
    placed right after; and metrics are read once, when a later step is under way."""
    steps = 230
    events: list[tuple[str, int]] = []
    step: Any = Dispatcher(events)
    state: Any = NoState()
    Trainer(step, clips.Clips(), log_every=log_every).run(state, steps)
    for step in range(1, steps + 1):
        dispatched = events.index(("dispatch", step))
        settled = {n for kind, n in events[:dispatched] if kind in ("wait", "read")}
        assert all(n <= step - 2 for n in settled)
        assert step - 1 - AHEAD <= max(settled, default=0)  # nor does it run away
        if step < steps:
            assert events[dispatched + 1] == ("place", step + 1)
        reads = [i for i, event in enumerate(events) if event == ("read", step)]
        assert len(reads) == 2  # the loss and whether it was finite
    groups = [n for kind, n in events if kind == "read"]
    assert groups == sorted(groups)
    if log_every != 1:
        read_before_the_last = {n for kind, n in events[: events.index(("dispatch", steps))]
                                if kind == "read"}  # fmt: skip
        every = log_every or READ_EVERY
        assert len(read_before_the_last) == pytest.approx(steps - 2, abs=every + 1)


def test_nothing_crosses_to_the_host_between_logs(bench, program, monkeypatch):
    """The real step under JAX's guard against implicit transfers; device_get once for ten steps."""
    calls = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: calls.append(len(tree)) or real(tree))
    trainer = Trainer(program, clips.Clips(), log_every=10)
    state = bench.layout.init(0)
    with jax.transfer_guard("disallow"):
        trainer.run(state, 35)
    assert calls == [10, 10, 10, 5]


def test_the_clock_counts_what_has_ended():
    now = [100.0]
    clock = StepClock(lambda: now[0])

    def at(seconds: float) -> None:
        now[0] = seconds

    at(130.0)
    clock.ended(1)  # 30 seconds of warming up
    assert clock.steps_per_s is None
    at(132.0)
    clock.ended(5)
    assert clock.steps_per_s == 2.0
    clock.pause()
    at(200.0)
    clock.resume(5)
    at(201.0)
    clock.ended(11)
    assert clock.steps_per_s == pytest.approx(10 / 3)
    assert clock.running_s == pytest.approx(33.0)
    fresh = StepClock(lambda: now[0])
    fresh.pause()
    fresh.resume(0)  # paused before the first step: that one still warms up
    at(250.0)
    fresh.ended(1)
    assert fresh.steps_per_s is None
