"""The child of `compile_case`: compiles one program and prints the names of its kernels as JSON.

python -m tpu_stack.kernels.compiled tpu_stack.kernels.quantize_rows.bench int8 v6e
"""

import importlib
import json
import re
import sys

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.kernels.compiled import TOPOLOGY


def main(module: str, case: str, chip: str) -> None:
    """Compiles for one device of the chip; kernels see its device kind through the mesh."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip])
    mesh = Mesh(topology.devices[:1], ("x",))
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        function, arguments = importlib.import_module(module).program(case)
        arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole) for a in arguments]
        text = jax.jit(function).lower(*arguments).compile().as_text() or ""
    calls = re.findall(r"%([\w.]+) = .*custom_call_target=\"tpu_custom_call\"", text)
    if not calls:
        sys.exit(f"Error: {module} {case} compiled to no Pallas kernel")
    print(json.dumps(calls))


if __name__ == "__main__":
    main(*sys.argv[1:])
