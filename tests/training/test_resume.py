"""Checkpoints that an older version or an import wrote, when a run is to go on from them."""

import tarfile
from pathlib import Path
from typing import Any

import pytest

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.data.pipeline import DataConfig, load_corpus
from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile
from tpu_stack.training.config import TrainConfig
from tpu_stack.training.run import Job, train

LATER = ("n_experts", "experts_per_token", "normalize_experts", "d_ff_shared", "balance_loss")
MESH = "fsdp=2"


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("older")
    train(bench.job(MESH, steps=2), out)
    return out


def altered(monkeypatch, change) -> None:
    """Lets every checkpoint say what `change` makes of its meta item."""
    read = CheckpointStore.meta
    monkeypatch.setattr(CheckpointStore, "meta", lambda self, step: change(read(self, step)))


def test_a_checkpoint_without_fields_that_came_later_is_resumed(bench, run, monkeypatch):
    def older(meta: dict[str, Any]) -> dict[str, Any]:
        for name in LATER:
            del meta["model"][name]
            del meta["run"][f"model.{name}"]
        return meta

    altered(monkeypatch, older)
    assert len(train(bench.job(MESH, steps=3), run, resume=True).losses) == 1


def test_an_imported_checkpoint_is_not_resumed(bench, run, monkeypatch):
    def imported(meta: dict[str, Any]) -> dict[str, Any]:
        del meta["iterator"]
        return meta

    altered(monkeypatch, imported)
    with pytest.raises(UserError, match="it was imported, and holds parameters only"):
        train(bench.job(MESH, steps=4), run, resume=True)


BEFORE_ITEMS = Path(__file__).parent / "data" / "run_before_items.tar.gz"
"""A run of two steps of `before_items`, on "data=2", with its text, as commit 8b7a8c4 wrote it:
before checkpoints held any items and a run took any loss."""
BEFORE_LOSSES = [4.608463764190674, 4.700732707977295, 4.6385040283203125]
"""Steps 3 to 5 of the same run by that commit."""
BEFORE_DIGEST = "cb991014e596e18fa75dd3f8f2a937ef4e1ea461e30e0144da8d8c42f40fb20e"


def before_items(steps: int) -> Job:
    """That run's job; its text lies in the current folder."""
    train = TrainConfig(
        steps=steps, warmup_steps=2, log_every=1, seq_len=8, batch_size=4, accumulate=2,
        compute_dtype="float32", remat="none",
    )  # fmt: skip
    data = DataConfig(("text.txt",), tokenizer="chars", seq_len=8, batch_size=4)
    model = ModelConfig(
        vocab_size=64, d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=8
    )
    profile = get_profile("8t").with_mesh("data=2")
    return Job(model, train, profile, make_mesh(profile.mesh), load_corpus(data), data)


def test_a_run_of_before_any_items_goes_on(tmp_path, monkeypatch):
    """The file itself, read bit for bit; its steps as that commit took them, but for the rounding
    of another CPU."""
    with tarfile.open(BEFORE_ITEMS) as packed:
        packed.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    with CheckpointStore(tmp_path / "older", read_only=True) as store:
        assert (store.steps, store.items(2)) == ([2], ["optimizer", "params"])
        assert store.digest(2) == BEFORE_DIGEST
    resumed = train(before_items(5), tmp_path / "older", resume=True)
    assert [step for step, _ in resumed.losses] == [3, 4, 5]
    assert [loss for _, loss in resumed.losses] == pytest.approx(BEFORE_LOSSES, abs=1e-5)
