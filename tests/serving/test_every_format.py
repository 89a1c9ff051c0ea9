"""A model served in every format computes what its dequantized weights compute."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving_model import MODEL, serving

from tpu_stack.models.decoder import forward
from tpu_stack.quant import QTensor
from tpu_stack.serving.bundle import Bundle
from tpu_stack.serving.engine.build import start_service
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.serving.generate import stream_text
from tpu_stack.serving.pack import pack

TOKENS = np.array([[5, 9, 33, 2, 61, 7, 12, 40]], np.int32)


def plain(tree):
    """The tree with every QTensor replaced by the float32 weight it stands for."""
    return jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, QTensor) else w,
        tree,
        is_leaf=lambda w: isinstance(w, QTensor),
    )


@pytest.mark.parametrize("format", ["fp8_e4m3", "int4_channel", "nvfp4", "int2", "int1"])
def test_logits(bundles, format):
    profile, mesh = serving("data=1", float32=True)
    params = Bundle.open(bundles[format]).load(profile, mesh)
    assert_computes_the_dequantized(params, format)


@pytest.mark.slow
def test_rotated_logits_and_tokens(trained, tmp_path):
    profile, mesh = serving("data=1", float32=True)
    pack(trained.run, "mxfp4", profile, mesh, tmp_path / "bundle", rotation=32)
    params = Bundle.open(tmp_path / "bundle").load(profile, mesh)
    logits = assert_computes_the_dequantized(params, "mxfp4", rotation=32)
    options = EngineOptions(slots=1, max_length=16)
    service = start_service(trained.config, params, profile, mesh, options, warm_up=False)
    prompt = trained.tokenizer.decode(TOKENS[0].tolist())
    text = "".join(
        piece for _, piece in stream_text(service, trained.tokenizer, [prompt], max_tokens=2)
    )
    service.close()
    assert trained.tokenizer.encode(text)[0] == int(logits[0, -1].argmax())


def assert_computes_the_dequantized(params, format: str, rotation: int = 0) -> jax.Array:
    """The logits, once they are those of the dequantized weights."""
    leaves = jax.tree.leaves(params, is_leaf=lambda w: isinstance(w, QTensor))
    packed = [w for w in leaves if isinstance(w, QTensor) and w.format == format]
    assert len(packed) >= 7
    assert all(w.rotation == rotation for w in packed)
    run = jax.jit(partial(forward, MODEL))
    logits, want = run(params, jnp.asarray(TOKENS)), run(plain(params), jnp.asarray(TOKENS))
    # float32 throughout; scales after a product instead of before it round elsewhere.
    np.testing.assert_allclose(logits, want, atol=1e-4 * float(jnp.abs(want).max()))
    return logits
