"""GGUF files of the folders that `transformers` computed expected values of."""

from functools import partial

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_writer import write_gguf
from test_hf_parity import DATA, TOLERANCE

from tpu_stack.errors import UserError
from tpu_stack.models.decoder import forward
from tpu_stack.models.gguf.file import GgufFile
from tpu_stack.models.gguf.model import GgufModel
from tpu_stack.models.hf.load import load_params
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile

FAMILIES = ("llama", "qwen3", "qwen3_moe", "mixtral")


def loaded(path):
    model = GgufModel.open(path)
    profile = get_profile("8t").with_mesh("data=1")
    return model.config, load_params(model, profile, make_mesh(profile.mesh))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tmp_path):
    config, params = loaded(write_gguf(DATA / family, tmp_path / "model.gguf"))
    expected = np.load(DATA / family / "expected.npz")
    run = jax.jit(partial(forward, config))
    logits = np.asarray(run(params, jnp.asarray(expected["tokens"])))
    assert np.abs(logits - expected["logits"]).max() <= TOLERANCE * np.abs(expected["logits"]).max()


@pytest.mark.parametrize("type", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_type_is_what_the_gguf_package_makes_of_it(type, tmp_path):
    rows = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[type]
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("rows", gguf.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = GgufFile.open(tmp_path / "one.gguf").tensors["rows"]
    assert (tensor.shape, tensor.type) == ((8, 64), type)
    found = tensor.read()
    np.testing.assert_array_equal(found, gguf.dequantize(gguf.quantize(rows, kind), kind))
    assert np.abs(found - rows).max() < 0.3  # a step of four bits
    np.testing.assert_array_equal(tensor.read((3,)), found[3])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"block_count": None}, r"lacks llama\.block_count"),
        ({"block_count": 9}, r"lacks blk\.\d\.attn"),
        ({"embedding_length": 48}, "has shape"),
        ({"attention.head_count": 0}, "n_heads is 0|not a multiple|rope_freqs"),
        ({"rope.dimension_count": 2}, "RoPE rotates 2 of"),
        ({"rope.freq_base": 5e5}, "no scaling of Llama 3.1"),
        ({"attention.head_count": 3.5}, "not a whole number"),
    ],
)
def test_metadata_that_do_not_fit_are_named(changed, said, tmp_path):
    path = write_gguf(DATA / "llama", tmp_path / "model.gguf", **changed)
    with pytest.raises(UserError, match=said):
        GgufModel.open(path)


def test_an_architecture_that_is_not_known(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture mamba is not known here; known: llama"):
        GgufModel.open(tmp_path / "model.gguf")


@pytest.mark.parametrize("keep", [0, 3, 40, 0.5, 0.98])
def test_a_file_that_is_cut_short(keep, tmp_path):
    path = write_gguf(DATA / "llama", tmp_path / "model.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep >= 3 else keep * len(whole))])
    with pytest.raises(UserError, match=r"is damaged or cut short|is not a GGUF file"):
        GgufModel.open(path)
