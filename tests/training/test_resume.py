"""Checkpoints that an older version or an import wrote, when a run is to go on from them."""

from pathlib import Path
from typing import Any

import pytest

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.errors import UserError
from tpu_stack.training.run import train

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
