"""Packed weights lie in a TPU's memory as the kernel reads them, however a model gets there."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from serving_model import MODEL, serving

from tpu_stack.models.decoder import forward
from tpu_stack.models.per_layer import per_layer
from tpu_stack.quant.qtensor import PARTS, QTensor
from tpu_stack.quant.tpu_layout import major_to_minor, tpu_layout
from tpu_stack.serving.bundle import Bundle
from tpu_stack.sharding.constrain import sharding_scope


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [aot]")
def test_the_tpu_compiler_moves_no_table_about():
    """A vocabulary that is split into parts of no whole lanes, as Llama 3's over four devices."""
    script = Path(__file__).parent / "compile_ragged_table.py"
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, check=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 4
    for table, (as_laid_out, by_default) in found.items():
        assert as_laid_out == 0, table
        assert (by_default > 10_000) == table.startswith("unembed"), table


@pytest.mark.parametrize(
    ("part", "axis", "ndim", "order"),
    [
        ("values", -2, 2, (0, 1)),
        ("values", -1, 3, (0, 1, 2)),
        ("scales", -2, 3, (1, 0, 2)),
        ("scales", -2, 4, (0, 2, 1, 3)),
        ("scales", -1, 2, (1, 0)),
        ("tensor_scale", -2, 3, (0, 1, 2)),
    ],
)
def test_order(part, axis, ndim, order):
    assert major_to_minor(part, axis, ndim) == order


def test_on_a_cpu_nothing_is_asked_for(trained, bundles):
    params = Bundle.open(bundles["int4"]).load(*serving("tensor=2"))
    values = params["blocks"]["mlp"]["w_up"].values
    assert tpu_layout(values.sharding, "values", -2, 3) is values.sharding


@pytest.mark.parametrize("how", ["split while loading", "split later"])
def test_every_part_of_every_layer_is_laid_out_and_the_numbers_stay(bundles, monkeypatch, how):
    """As on a TPU, but for the platform: the layouts are asked for, kept, and multiplied."""
    profile, mesh = serving("tensor=2", float32=True)
    bundle = Bundle.open(bundles["int4"])
    tokens = jnp.arange(12).reshape(2, 6)
    run = jax.jit(lambda params: forward(MODEL, params, tokens))
    with sharding_scope(mesh, profile.rules):
        want = run(per_layer(bundle.load(profile, mesh)))

    def everywhere(sharding, part, contract_axis, ndim):
        return Format(Layout(major_to_minor=major_to_minor(part, contract_axis, ndim)), sharding)

    for module in ("serving.weights", "models.per_layer"):
        monkeypatch.setattr(f"tpu_stack.{module}.tpu_layout", everywhere)
    if how == "split later":
        params = per_layer(bundle.load(profile, mesh))
    else:
        params = bundle.load(profile, mesh, split=True)
    packed = [
        leaf
        for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
        if isinstance(leaf, QTensor)
    ]
    assert len(packed) >= 7 * MODEL.n_layers
    for q in packed:
        for part in PARTS:
            if (array := getattr(q, part)) is not None:
                wanted = major_to_minor(part, q.contract_axis, array.ndim)
                assert array.format.layout.major_to_minor == wanted, (part, array.shape)
    with sharding_scope(mesh, profile.rules):
        np.testing.assert_array_equal(np.asarray(run(params)), np.asarray(want))
