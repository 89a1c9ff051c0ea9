"""Compiles a decode step over a paged cache for v6e, and prints bytes: the cache's, temporaries."""

import json
import math
import os

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.models.abstract import map_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import bind
from tpu_stack.models.paged_cache import PagedCache, paged_shapes
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.sharding.profiles import get_profile

CONFIG = ModelConfig(
    vocab_size=1024,
    d_model=1024,
    n_layers=4,
    n_heads=8,
    n_kv_heads=8,
    head_dim=128,
    d_ff=2048,
)
ROWS, ENTRIES, PAGE = 8, 16, 128


def main() -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2")
    mesh = Mesh(np.array(topology.devices[:1]).reshape(1, 1), ("data", "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())

    def struct(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    params = map_specs(CONFIG, lambda spec: struct(spec.shape, "bfloat16"))
    arrays = {
        name: None if each is None else struct(each.shape, each.dtype)
        for name, each in paged_shapes(CONFIG, ROWS * ENTRIES, PAGE, "bfloat16").items()
    }
    tables = struct((ROWS, ENTRIES), "int32")
    cache = PagedCache(**arrays, tables=tables, pages=ROWS * ENTRIES)  # pyright: ignore

    def step(params, cache, tokens, positions):
        model = bind(CONFIG, params)
        outputs = model.hidden(tokens, positions, cache=cache, dtype=jnp.bfloat16)
        return model.logits(outputs.hidden), outputs.cache

    tokens = struct((ROWS, 1), "int32")
    with sharding_scope(mesh, get_profile("v6e", "serve").rules):
        traced = jax.jit(step, donate_argnums=1).trace(params, cache, tokens, tokens)
        memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    assert memory is not None
    bytes_of_cache = sum(2 * math.prod(a.shape) for a in arrays.values() if a is not None)
    print(json.dumps({"cache": bytes_of_cache, "temporaries": memory.temp_size_in_bytes}))


if __name__ == "__main__":
    main()
