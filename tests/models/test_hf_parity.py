"""Models of Hugging Face folders against what `transformers` computed from them, in float32.

The folders and the expected values come from make_hf_fixtures.py.
"""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tpu_stack.models.decoder import forward
from tpu_stack.models.hf.folder import HuggingFaceFolder
from tpu_stack.models.hf.load import load_params
from tpu_stack.models.hf.read_config import read_config
from tpu_stack.models.hf.safetensors_file import read_header, write_file
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile

DATA = Path(__file__).parent / "data" / "hf"
DENSE = ("llama", "qwen3", "gemma3")
SPARSE = ("qwen3_moe", "mixtral")
FAMILIES = DENSE + SPARSE
TOLERANCE = 2e-4
"""Of the largest logit: two hundred times what float32 sums in another order differ by here."""


def loaded(path: Path, mesh_text: str = "data=1"):
    folder = HuggingFaceFolder.open(path)
    profile = get_profile("8t").with_mesh(mesh_text)
    return folder.config, load_params(folder, profile, make_mesh(profile.mesh))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    config, params = loaded(DATA / family)
    expected = np.load(DATA / family / "expected.npz")
    logits = np.asarray(forward(config, params, jnp.asarray(expected["tokens"])))
    largest = np.abs(expected["logits"]).max()
    assert np.abs(logits - expected["logits"]).max() <= TOLERANCE * largest


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_are_those_of_transformers(family):
    """Every token of the continuation is the likeliest after what precedes it."""
    config, params = loaded(DATA / family)
    expected = np.load(DATA / family / "expected.npz")
    row, start = expected["greedy"], expected["tokens"].shape[1]
    likeliest = np.asarray(forward(config, params, jnp.asarray(row))).argmax(-1)
    assert row.shape[1] > start
    assert (likeliest[:, start - 1 : -1] == row[:, start:]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_rope_are_one_model(family):
    new, old = (
        json.loads((DATA / family / name).read_text())
        for name in ("config.json", "older/config.json")
    )
    assert "rope_parameters" in new
    assert "rope_parameters" not in old
    assert "rope_theta" in old
    assert read_config(old) == read_config(new)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "fsdp=8"])
def test_the_layout_changes_no_number(mesh):
    _, alone = loaded(DATA / "llama")
    _, spread = loaded(DATA / "llama", mesh)
    assert spread["blocks"]["mlp"]["w_up"].sharding.num_devices == 8
    np.testing.assert_array_equal(
        np.asarray(alone["blocks"]["mlp"]["w_up"]), np.asarray(spread["blocks"]["mlp"]["w_up"])
    )


def test_a_multimodal_folder_gives_its_text_model(tmp_path):
    """As transformers 4 wrote them: the text model nested, its tensors under another prefix."""
    source = DATA / "gemma3"
    text = json.loads((source / "config.json").read_text())
    text.pop("architectures")
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    tensors = {
        f"language_model.{name}": stored.read()
        for name, stored in read_header(source / "model.safetensors").items()
    }
    tensors["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
    described = {
        name: ("F32" if array.dtype == np.float32 else "BF16", array.shape)
        for name, array in tensors.items()
    }
    write_file(tmp_path / "model.safetensors", described, iter(tensors.items()))
    folder = HuggingFaceFolder.open(tmp_path)
    assert folder.left_out == ("vision_tower.patch.weight",)
    assert folder.config == HuggingFaceFolder.open(source).config
    assert len(folder.tensors) == len(tensors) - 1


def test_a_copy_of_a_tied_table_is_allowed(tmp_path):
    folder = shutil.copytree(DATA / "qwen3", tmp_path / "copy")
    tensors = {
        name: stored.read() for name, stored in read_header(folder / "model.safetensors").items()
    }
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    described = {name: ("BF16", array.shape) for name, array in tensors.items()}
    write_file(folder / "model.safetensors", described, iter(tensors.items()))
    assert HuggingFaceFolder.open(folder).config.tie_embeddings
