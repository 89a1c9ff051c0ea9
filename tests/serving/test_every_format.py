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
from tpu_stack.serving.engine import Engine
from tpu_stack.serving.pack import pack
from tpu_stack.serving.sampler import Sampling

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
    engine = Engine(trained.config, params, profile, mesh, batch=1, length=16)
    state = engine.prefill(TOKENS.tolist(), Sampling.of(1))
    assert int(state.tokens[0]) == int(logits[0, -1].argmax())
    assert int(engine.decode(state).positions[0]) == TOKENS.shape[1] + 1


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
