"""A model whose every axis splits eight ways, and a corpus of many short documents."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tpu_stack.data.pipeline import Corpus, DataConfig, load_corpus
from tpu_stack.models.config import ModelConfig
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile
from tpu_stack.training.config import TrainConfig
from tpu_stack.training.run import Job

# LLVM's optimizations are most of what compiling these small programs costs.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

MODEL = ModelConfig(
    vocab_size=64,
    d_model=32,
    n_layers=2,
    n_heads=8,
    n_kv_heads=8,
    head_dim=4,
    d_ff=64,
    qk_norm=True,
)
SEQ_LEN = 16
BATCH = 8


@dataclass(frozen=True)
class Workbench:
    """What the tests train on, and jobs made of it."""

    model: ModelConfig
    corpus: Corpus
    data: DataConfig

    def job(self, mesh: str, **train: Any) -> Job:
        """A float32 job on `mesh`, as in "data=2,fsdp=4"."""
        profile = get_profile("8t").with_mesh(mesh)
        options = {"steps": 40, "warmup_steps": 5, "log_every": 5, **train}
        config = TrainConfig(
            batch_size=BATCH, seq_len=SEQ_LEN, compute_dtype="float32", remat="none", **options
        )
        data = replace(self.data, seed=config.seed)
        return Job(self.model, config, profile, make_mesh(profile.mesh), self.corpus, data)


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Workbench:
    """400 documents of 5 to 40 letters: most rows hold several, so masks and segments matter."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz ,."))
    folder: Path = tmp_path_factory.mktemp("corpus")
    lines = []
    for _ in range(400):
        start = generator.integers(0, 29)
        length = generator.integers(5, 41)
        lines.append("".join(letters[(start + 3 * np.arange(length)) % 29]))
    (folder / "text.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    data = DataConfig(
        (str(folder / "text.jsonl"),), tokenizer="chars", seq_len=SEQ_LEN, batch_size=BATCH
    )
    corpus = load_corpus(data)
    assert corpus.tokenizer.vocab_size <= MODEL.vocab_size
    return Workbench(MODEL, corpus, data)


@pytest.fixture(scope="module")
def quick_module():
    """`jax.jit` without LLVM's optimizations, for fixtures that compile whole training runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", partial(jax.jit, compiler_options=QUICK))
        yield


@pytest.fixture
def quick_compile(quick_module):
    """The same for the tests of such a module."""


@pytest.fixture(scope="session")
def quick_options() -> dict[str, Any]:
    """The same, for tests that call `jax.jit` themselves."""
    return QUICK
