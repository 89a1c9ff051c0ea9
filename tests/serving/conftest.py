"""Random weights, saved as a training run would leave them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from serving_model import MODEL, STEP, serving

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.data.sources import Document
from tpu_stack.data.tokenizer import Tokenizer, build_tokenizer
from tpu_stack.models.abstract import map_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.serving.pack import pack
from tpu_stack.sharding.axes import TensorSpec
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile

TRAINED_ON = "data=2,fsdp=2,tensor=2"


@dataclass(frozen=True)
class Trained:
    """A run folder and what it holds."""

    run: Path
    config: ModelConfig
    params: dict[str, Any]
    tokenizer: Tokenizer


class Bundles(dict[str, Path]):
    """The checkpoint packed to each format, when it is first asked for."""

    def __init__(self, run: Path, folder: Path):
        self.run, self.folder = run, folder

    def __missing__(self, format: str) -> Path:
        # Words of one-bit values hold 256 rows, more than half of any of these.
        mesh = "data=4" if format == "int1" else "data=2,tensor=2"
        pack(self.run, format, *serving(mesh), self.folder / format)
        self[format] = self.folder / format
        return self[format]


@pytest.fixture(scope="session")
def bundles(trained, tmp_path_factory) -> Bundles:
    """Folders of bundles by format."""
    return Bundles(trained.run, tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    """A checkpoint of random weights on an 8t mesh of eight devices."""
    generator = np.random.default_rng(0)

    def draw(spec: TensorSpec) -> np.ndarray:
        if spec.contract_axis is None:
            return generator.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        std = 2.0 * spec.shape[spec.contract_axis] ** -0.5
        return (std * generator.standard_normal(spec.shape)).astype(np.float32)

    params = map_specs(MODEL, draw)
    profile = get_profile("8t").with_mesh(TRAINED_ON)
    mesh = make_mesh(profile.mesh)
    shardings = map_specs(
        MODEL, lambda spec: NamedSharding(mesh, profile.rules.partition_spec(spec.axes, spec.name))
    )
    text = "".join(map(chr, range(ord(" "), ord(" ") + 50)))
    tokenizer = build_tokenizer("chars", [Document(text, "text")])
    run = tmp_path_factory.mktemp("trained")
    with CheckpointStore(run) as store:
        meta = {"model": MODEL.to_dict(), "tokenizer": tokenizer.to_json()}
        store.save(STEP, {"params": jax.device_put(params, shardings)}, meta)
    return Trained(run, MODEL, params, tokenizer)
