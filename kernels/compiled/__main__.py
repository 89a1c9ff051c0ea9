"""The child of `compile_case`: compiles programs and prints their kernels as JSON.

python -m tpu_stack.kernels.compiled tpu_stack.kernels.quantize_rows.bench v6e int8,bfloat16,16,4096
"""

import importlib
import json
import re
import sys
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.kernels.compiled import TOPOLOGY, estimates
from tpu_stack.kernels.compiled.layouts import with_layout


def kernels(module: str, case: str, mesh: Mesh) -> dict[str, Any]:
    """Compiles one case for the mesh's one device.

    Returns: the names of its Pallas kernels, XLA's estimated cycles of the rest, and how many
      estimates are missing. The kernels read the device kind from the abstract mesh.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        function, arguments = importlib.import_module(module).program(case)
        arguments = [with_layout(a, whole) for a in arguments]
        text = jax.jit(function).lower(*arguments).compile().as_text() or ""
    calls = re.findall(r"%([\w.]+) = .*custom_call_target=\"tpu_custom_call\"", text)
    if not calls:
        raise RuntimeError(f"{module} {case} compiled to no Pallas kernel")
    cycles, unknown = estimates(text)
    return {"kernels": calls, "xla_cycles": cycles, "unestimated": unknown}


def main(module: str, chip: str, *cases: str) -> None:
    """Prints {case: the result of `kernels`, or one line why it does not compile} as JSON."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip])
    mesh = Mesh(topology.devices[:1], ("x",))
    results = {}
    for case in cases:
        try:
            results[case] = kernels(module, case, mesh)
        except Exception as error:  # whatever the compiler or the kernel refuses is the result
            results[case] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
