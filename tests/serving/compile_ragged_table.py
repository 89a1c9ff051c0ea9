"""Compiles the logits of a table whose columns, on one device, fill no whole lanes, for v6e:2x2;
prints the compiler's cycles for moving weights about: laid out as the kernel reads them, and as the
compiler would."""

import json
import os
import re
from dataclasses import replace

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.models.config import ModelConfig
from tpu_stack.quant.matmul import matmul
from tpu_stack.quant.qtensor import PARTS
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.sharding.axes import EMBED, VOCAB
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.sharding.profiles import get_profile

CONFIG = ModelConfig(
    vocab_size=4 * 8016, d_model=1024, n_layers=1, n_heads=4, n_kv_heads=4, head_dim=128,
    d_ff=1024, tie_embeddings=False,
)  # fmt: skip
TABLES = (("unembed", "int8"), ("unembed", "int4"), ("unembed", "mxfp4"), ("embed", "int8"))
CYCLES = re.compile(r' (?:copy|fusion|reduce|transpose)\(.*"estimated_cycles":"(\d+)"')


def cycles(name: str, format: str, as_they_should: bool) -> int:
    """What runs beside the kernel."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2")
    mesh = Mesh(np.array(topology.devices).reshape(1, 4), ("data", "tensor"))
    profile = get_profile("v6e", "serve").with_mesh("tensor=4")
    table = PackedLayout.of(CONFIG, format, profile, mesh).abstract[name]
    if not as_they_should:
        parts = {part: getattr(table, part) for part in PARTS}
        table = replace(
            table,
            **{
                name: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=part.sharding)
                for name, part in parts.items()
                if part is not None
            },
        )
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((8, CONFIG.d_model), "bfloat16", sharding=whole)

    def logits(x, table):
        if name == "embed":  # as where the two tables are tied
            return matmul(x, table, (VOCAB, EMBED), transpose=True, out_dtype=jnp.float32)
        return matmul(x, table, (EMBED, VOCAB), out_dtype=jnp.float32)

    with sharding_scope(mesh, profile.rules):
        traced = jax.jit(logits).trace(x, table)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text() or ""
    assert "quantized_matmul" in text
    return sum(map(int, CYCLES.findall(text)))


if __name__ == "__main__":
    found = {
        f"{name}, {format}": [cycles(name, format, should) for should in (True, False)]
        for name, format in TABLES
    }
    print(json.dumps(found))
