"""Whole runs on eight devices: resuming bit for bit, stopping, and every refusal."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.errors import UserError
from tpu_stack.training.metrics import MetricsWriter
from tpu_stack.training.run import TrainResult, train
from tpu_stack.training.stop import StopRequest
from tpu_stack.training.trainer import Hook, NotFinite

pytestmark = pytest.mark.usefixtures("quick_compile")

MESH = "data=2,fsdp=2,tensor=2"


def digest(out: Path, step: int) -> str:
    with CheckpointStore(out, read_only=True) as store:
        return store.digest(step)


def metrics_of(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def straight(bench, tmp_path_factory, quick_module) -> tuple[Path, TrainResult]:
    """40 steps in one go, without a checkpoint on the way."""
    out = tmp_path_factory.mktemp("straight")
    return out, train(bench.job(MESH, steps=40), out)


@pytest.fixture(scope="module")
def twenty(bench, tmp_path_factory, quick_module) -> Path:
    """20 steps, saved at 8 and 16 on the way, and at the end."""
    out = tmp_path_factory.mktemp("halted")
    result = train(bench.job(MESH, steps=20, checkpoint_every=8, eval_every=6), out)
    assert [step for step, _ in result.evaluations] == [6, 12, 18, 20]
    with CheckpointStore(out, read_only=True) as store:
        assert store.steps == [16, 20]  # the two newest are kept
    return out


@pytest.fixture
def halted(twenty, tmp_path) -> Path:
    """A copy of that run to resume."""
    return shutil.copytree(twenty, tmp_path / "halted")


def test_a_straight_run(bench, straight):
    out, result = straight
    assert [step for step, _ in result.losses] == list(range(1, 41))
    assert result.losses[-1][1] < result.losses[0][1] - 0.5
    assert result.stopped_by is None
    assert result.mfu is None  # a CPU is no chip with known facts
    assert result.tokens_per_s is not None
    assert result.tokens_per_s > 0
    ((step, final),) = result.evaluations
    assert step == 40
    assert final.tokens == bench.corpus.val.predicted_tokens
    with CheckpointStore(out, read_only=True) as store:
        assert store.steps == [40]
    logged = metrics_of(out)
    assert [row["step"] for row in logged if "train/loss" in row] == list(range(5, 41, 5))
    assert logged[-1]["val/loss"] == final.loss
    assert list((out / "tensorboard").iterdir())


def test_20_and_20_steps_equal_40(bench, straight, halted):
    """Bit for bit: losses, parameters and optimizer state, with other checkpoints on the way."""
    whole, result = straight
    resumed = train(bench.job(MESH, steps=40), halted, resume=True)
    assert resumed.losses == result.losses[20:]
    assert resumed.evaluations == result.evaluations
    assert digest(halted, 40) == digest(whole, 40)
    steps = [row["step"] for row in metrics_of(halted) if "train/loss" in row]
    assert steps == list(range(5, 41, 5))


def test_sigterm_saves_and_the_run_goes_on(bench, straight, tmp_path):
    """A stop once step 7 is read saves step 8, then under way, without an evaluation; resuming ends
    where 40 steps end."""
    whole, result = straight
    before = signal.getsignal(signal.SIGTERM)

    class Sender(Hook):
        def on_metrics(self, trainer, step, values) -> None:
            if step == 7:
                signal.raise_signal(signal.SIGTERM)

    stopped = train(bench.job(MESH, steps=40, log_every=1), tmp_path, hooks=[Sender()])
    assert stopped.stopped_by == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert stopped.losses == result.losses[:9]
    assert not stopped.evaluations
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert store.steps == [9]
    resumed = train(bench.job(MESH, steps=40), tmp_path, resume=True)
    assert resumed.losses == result.losses[9:]
    assert digest(tmp_path, 40) == digest(whole, 40)


def test_another_mesh_resumes_to_the_same_losses(bench, straight, halted):
    """Reshaped from 2x2x2 onto two devices; sums in another order, so near rather than equal."""
    _, result = straight
    resumed = train(bench.job("fsdp=2", steps=24), halted, resume=True)
    wanted = [loss for _, loss in result.losses[20:24]]
    assert [loss for _, loss in resumed.losses] == pytest.approx(wanted, abs=1e-5)


def test_a_finished_run_is_only_evaluated_again(bench, straight):
    out, result = straight
    again = train(bench.job(MESH, steps=40), out, resume=True)
    assert again.losses == []
    assert again.evaluations == result.evaluations
    assert metrics_of(out)[-1]["val/loss"] == result.evaluations[0][1].loss


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, r"train\.seed was 0 and is now 1"),
        ({"learning_rate": 1e-3}, r"train\.learning_rate was 0\.003 and is now 0\.001"),
        ({"optimizer": "muon"}, r"train\.optimizer was 'adamw'"),
        ({"schedule": "cosine"}, r"train\.schedule was 'constant'"),
        ({"accumulate": 2}, r"train\.accumulate was 1"),
    ],
)
def test_another_training_is_not_resumed(bench, straight, changes, said):
    out, _ = straight
    with pytest.raises(UserError, match=rf"cannot resume .*: {said}"):
        train(bench.job(MESH, **changes), out, resume=True)


def test_other_data_or_model_is_not_resumed(bench, straight, tmp_path):
    out, _ = straight
    job = bench.job(MESH)
    with pytest.raises(UserError, match=r"data\.val_fraction was 0\.1 and is now 0\.2"):
        train(replace(job, data=replace(job.data, val_fraction=0.2)), out, resume=True)
    deeper = replace(job, config=job.config.replace(n_layers=3))
    with pytest.raises(UserError, match=r"model\.n_layers was 2 and is now 3"):
        train(deeper, out, resume=True)
    shorter = replace(bench.corpus, train=bench.corpus.val)
    with pytest.raises(UserError, match=r"corpus\.train_tokens"):
        train(replace(job, corpus=shorter), out, resume=True)


def test_a_folder_that_holds_a_run_is_not_written_to(bench, straight):
    out, _ = straight
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(UserError, match="already holds a run; resume it"):
        train(bench.job(MESH), out)
    assert sorted(path.name for path in out.rglob("*")) == before


def test_fewer_steps_than_the_checkpoint_has(bench, straight):
    out, _ = straight
    with pytest.raises(UserError, match=r"steps is 30; the checkpoint is at step 40"):
        train(bench.job(MESH, steps=30), out, resume=True)


def test_a_loss_that_is_not_finite(bench, tmp_path):
    """One line with the step and the learning rate, and no checkpoint of the ruins."""
    job = bench.job("data=1", steps=10, learning_rate=1e30, clip_norm=0.0, warmup_steps=0)
    with pytest.raises(NotFinite, match=r"loss is .* at step \d; lower the learning_rate"):
        train(job, tmp_path)
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert store.steps == []


def test_a_batch_that_does_not_divide(bench):
    with pytest.raises(UserError, match="batch size 4 does not divide over data=8,fsdp=1"):
        train(bench.job("data=8", accumulate=2))


def test_a_mesh_that_does_not_divide(bench):
    job = bench.job(MESH)
    odd = replace(job, config=job.config.replace(d_ff=63))
    with pytest.raises(UserError, match=r"blocks\.mlp\.w_down: axis 'ffw' has 63 parts.*tensor=2"):
        train(odd)


def test_stop_requests():
    """The first signal is noted, a second Ctrl-C interrupts at once, and handlers are put back."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        assert stop.signal is None
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)  # repeated, it still only asks
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_metrics_beyond_the_resumed_step_are_dropped(tmp_path):
    with MetricsWriter(tmp_path, resume_at=0) as metrics:
        for step in (5, 10, 15):
            metrics.write(step, {"train/loss": float(step)})
    with MetricsWriter(tmp_path, resume_at=10) as metrics:
        metrics.write(12, {"train/loss": 12.0})
    assert [row["step"] for row in metrics_of(tmp_path)] == [5, 10, 12]
    with MetricsWriter(tmp_path, resume_at=0):
        pass
    assert metrics_of(tmp_path) == []
