"""The child process that runs the TPU compiler: compiles requests, and prints a line of JSON each.

It is a process of its own because a bad kernel can abort the compiler, and the process with it. The
parent (`compiler_process`) then sees which request got no line, and starts another for the rest.

    python -m tpu_stack.planner.kernels.compile_child FOLDER   # holding requests.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.kernels.compiled import estimated_cycles
from tpu_stack.kernels.compiled.layouts import with_layout
from tpu_stack.planner.kernels.case_registry import get_case
from tpu_stack.planner.kernels.targets import compile_target


def compile_here(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles for one device of the chip; the kernel sees its device kind through the mesh.

    Returns: {"estimated_cycles": sum of XLA's estimates for its own fusions; None where there are
      none or one has no estimate}.
    """
    target = compile_target(request["chip"])
    case = get_case(request["op"], request["format"], request["activation"])
    topology = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
    mesh = Mesh(topology.devices[:1], ("x",))
    whole = NamedSharding(mesh, PartitionSpec())
    operands = {
        name: with_layout(array, whole)
        for name, array in case.abstract(tuple(request["shape"])).items()
    }
    options = request["options"]
    if "tiles" in options:
        options["tiles"] = tuple(options["tiles"])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        function = jax.jit(lambda a: case.call(a, interpret=False, **options))
        text = function.lower(operands).compile().as_text() or ""
    return {"estimated_cycles": estimated_cycles(text)}


def main(folder: Path) -> None:
    """Compiles each request, moves its dump files to dump/INDEX, and prints its line."""
    dump = folder / "dump"
    for request in json.loads((folder / "requests.json").read_text()):
        try:
            answer = compile_here(request)
        except Exception as error:  # the compiler's refusal is the answer
            text = " ".join(str(error).split())[:300]
            answer = {"error": f"refused: {type(error).__name__}: {text}"}
        own = dump / str(request["index"])
        own.mkdir()
        for path in dump.iterdir():
            if path.is_file():
                path.rename(own / path.name)
        print(json.dumps({"index": request["index"]} | answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
