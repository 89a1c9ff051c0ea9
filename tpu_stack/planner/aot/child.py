"""The child process that compiles one program with libtpu, and says how far it is.

    python -m tpu_stack.planner.aot.child FOLDER   # holding request.pickle

Prints lines of JSON: `{"stage": ...}` as it goes and one `{"end": ...}`; the compiled program's
text goes to FOLDER/program.hlo.gz.
"""

import gzip
import json
import pickle
import resource
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from tpu_stack.errors import UserError
from tpu_stack.planner.aot.request import CompileRequest
from tpu_stack.planner.aot.target import Topology, topology_of
from tpu_stack.planner.programs import Traced, trace_train
from tpu_stack.planner.serve_programs import trace_serve
from tpu_stack.sharding.mesh import make_mesh

MAX_MESSAGE = 20_000


def say(**what: Any) -> None:
    """One line of JSON for the parent."""
    print(json.dumps(what), flush=True)


def trace(request: CompileRequest, mesh: Mesh) -> Traced:
    """The program of `request`, lowered for `mesh`."""
    if request.program == "train":
        return trace_train(
            request.config, request.profile, batch=request.batch, seq_len=request.seq_len,
            accumulate=request.accumulate, mesh=mesh,
        )  # fmt: skip
    return trace_serve(
        request.config, request.profile, request.format, batch=request.batch,
        context=request.context, prompt=request.prompt, programs=(request.program,), mesh=mesh,
    )[0]  # fmt: skip


def compile_here(request: CompileRequest, folder: Path) -> dict[str, Any]:
    """Compiles; returns memory in bytes of one device, and what tracing counted."""
    say(stage="starting the TPU compiler")
    topology = topology_of(request.profile)
    mesh = make_mesh(request.profile.mesh, devices_of(topology))
    say(stage="tracing")
    traced = trace(request, mesh)
    say(stage="compiling")
    compiled = traced.lowered.compile()
    say(stage="reading the program")
    (folder / "program.hlo.gz").write_bytes(gzip.compress((compiled.as_text() or "").encode(), 5))
    stats: Any = compiled.memory_analysis()
    return {
        "memory": {
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes,
            "aliased": stats.alias_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "code": stats.generated_code_size_in_bytes,
            "peak": stats.peak_memory_in_bytes or None,
        },
        "matmul_flops": float(traced.flops.matmul_flops + traced.flops.opaque_flops),
    }


def devices_of(topology: Topology) -> list[Any]:
    """The devices of a slice, wired as it is. Raises UserError where the compiler has none such."""
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **topology.options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the TPU compiler has no topology {topology.name}: {error}") from error


def main(folder: Path) -> None:
    """Compiles the request of the folder and says what came of it."""
    request = pickle.loads((folder / "request.pickle").read_bytes())  # written by the parent
    answer: dict[str, Any]
    try:
        answer = compile_here(request, folder)
    except UserError as error:
        answer = {"user_error": str(error)}
    except Exception as error:  # the compiler's refusal is the answer
        answer = {"error": f"{type(error).__name__}: {error}"[:MAX_MESSAGE]}
    # Linux gives kilobytes.
    answer["compiler_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(end=answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
