"""Compiles a decode step of int8 weights and the Pallas kernel for v6e; prints how often the kernel
is in it, and how many weights of a layer are copied before they are multiplied. Arguments:
"stacked" or "split"; devices that the model is split over."""

import json
import os
import re
import sys

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import bind
from tpu_stack.models.paged_cache import PAGES_AXES, PagedCache, paged_shapes
from tpu_stack.models.per_layer import PerLayer, is_weight, without_layers
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.sharding.profiles import get_profile

CONFIG = ModelConfig(
    vocab_size=1024, d_model=512, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=128, d_ff=1024
)
ROWS, ENTRIES, PAGE = 8, 4, 128
COPY = re.compile(r"= s8\[(?:1,)?\d{3,},\d{3,}\]\S* (?:copy|dynamic-slice)\(")


def main() -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2")
    count = int(sys.argv[2])
    mesh = Mesh(np.array(topology.devices[:count]).reshape(1, count), ("data", "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())
    profile = get_profile("v6e", "serve").with_mesh(f"tensor={count}")
    pages = NamedSharding(mesh, profile.rules.partition_spec(PAGES_AXES))

    def struct(shape, dtype, sharding=whole):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def split(weight):
        def one(part):
            return struct(part.shape[1:], part.dtype, without_layers(part.sharding))

        return PerLayer((jax.tree.map(one, weight),) * CONFIG.n_layers)

    params = PackedLayout.of(CONFIG, "int8", profile, mesh).abstract
    if sys.argv[1] == "split":
        params["blocks"] = jax.tree.map(split, params["blocks"], is_leaf=is_weight)
    arrays = {
        name: None if each is None else struct(each.shape, each.dtype, pages)
        for name, each in paged_shapes(CONFIG, ROWS * ENTRIES, PAGE, "bfloat16").items()
    }
    tables, tokens = struct((ROWS, ENTRIES), "int32"), struct((ROWS, 1), "int32")
    cache = PagedCache(**arrays, tables=tables, pages=ROWS * ENTRIES)  # pyright: ignore

    def step(params, cache, tokens, positions):
        model = bind(CONFIG, params)
        outputs = model.hidden(tokens, positions, cache=cache, dtype=jnp.bfloat16)
        return model.logits(outputs.hidden), outputs.cache

    with sharding_scope(mesh, profile.rules):  # of TPU devices, so the kernel runs
        traced = jax.jit(step, donate_argnums=1).trace(params, cache, tokens, tokens)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text() or ""
    kernels = text.count("quantized_matmul")
    copies = sum(bool(COPY.search(line)) for line in text.splitlines())
    print(json.dumps({"kernels": kernels, "copies": copies}))


if __name__ == "__main__":
    main()
