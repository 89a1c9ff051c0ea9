"""One model, two profiles, side by side: what they store, what moves between them, what each
program costs on either chip. Computation only; `cli/compare.py` and the reports print it.

    request = make_request("llama3_8b", "8t:4x4x4", "8i:8")
    compare(request)["programs"][2]["roofline"]["8i"]["bound"]
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import jax

from tpu_stack.models.abstract import parameter_count
from tpu_stack.planner import traffic
from tpu_stack.planner.compare import reshard
from tpu_stack.planner.compare.crossing import two_by_two
from tpu_stack.planner.compare.placement import chain
from tpu_stack.planner.compare.products import rows_per_device, serve_product, train_product
from tpu_stack.planner.compare.simulated import add_simulated
from tpu_stack.planner.memory.serve import ServeMemory
from tpu_stack.planner.pricing import ProgramCost, describe_program, memory_of
from tpu_stack.planner.programs import MAX_EMULATED_DEVICES, Program, compile_all, trace_train
from tpu_stack.planner.request import Request
from tpu_stack.planner.serve_programs import SERVE_PROGRAMS, trace_serve
from tpu_stack.planner.tensors import (
    MASTER_DTYPE,
    RESHARD_DEFINITION,
    TensorRow,
    shard_count,
    tensor_rows,
)
from tpu_stack.quant.formats import get_format
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.profiles import Profile

STEPS = ("tensors", "trace train_step", "trace prefill and decode")
PROGRAMS = ("train_step", "prefill", "decode")
RUNGS = {
    "tensors": "exact: arithmetic over shapes and specs",
    "flops": "exact: counted in the traced program",
    "model_flops": "formula: models/flops.py",
    "hbm_bytes": "4 projected: formulas of planner/traffic.py, the least that must move",
    "collectives": "emulated compile: XLA:CPU on virtual devices, its rewrites undone",
    "roofline": "4 projected: chip facts and the figures above, nothing measured",
    "memory": "4 projected: formulas, of planner/memory for serving and planner/traffic.py for"
    " training, there with temporaries of a layer aside",
    "products": "exact: the chip facts' operand types, and the kernel's own plan for the shapes",
    "reshard": "4 projected: bytes exact by shapes and specs, times by link facts",
    "two_by_two": "4 projected: the rooflines of both chips, per chip",
    "simulated": "4 projected: a simulator with constants fitted to published results",
}


def compare(request: Request, done: Callable[[str], None] = lambda step: None) -> dict[str, Any]:
    """The comparison, JSON-ready; `done` is told each of STEPS and PROGRAMS as it ends.

    Compiles for the CPU devices that are there; a profile with more is shrunk onto them, and its
    program says so. Raises UserError when a tensor or batch does not divide its mesh.
    """
    config, train, serve = request.config, request.train, request.serve
    rows = tensor_rows(config, train, serve, request.format)
    done(STEPS[0])
    programs = _compiled(request, done)
    costs = _costs(request, rows)
    memory = {
        "train": memory_of(train, costs["train_step"].memory),
        "serve": memory_of(serve, costs["decode"].memory),
    }
    described = [
        describe_program(program, costs[program.name], _other_chips(request, program.profile))
        for program in programs
    ]
    return {
        "model": request.model,
        "parameters": parameter_count(config),
        "train": {
            **_profile_json(train, request.train_mesh_by),
            "batch_size": request.workload.batch_size,
            "seq_len": request.workload.seq_len,
        },
        "serve": {
            **_profile_json(serve, request.serve_mesh_by),
            "format": request.format,
            "batch": request.workload.serve_batch,
            "context": request.workload.context,
            "prompt": request.workload.prompt,
        },
        "tensors": [_tensor_json(row, request) for row in rows],
        "totals": _totals(rows, request),
        "programs": described,
        "two_by_two": add_simulated(two_by_two(described), request),
        "reshard": reshard.plan(rows, train, serve),
        "memory": memory,
        "rungs": RUNGS,
        "definitions": {
            "reshard_bytes": RESHARD_DEFINITION,
            "reshard": reshard.DEFINITION,
            **_DEFINITIONS,
        },
        "notes": _notes(programs),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    }


_DEFINITIONS = {
    "collectives.bytes": "payload of one device over the whole step (planner/hlo.py)",
    "roofline.time_s": "the largest of compute, memory and ici: all overlapped, the least possible",
    "roofline.time_no_overlap_s": "the same with the collectives added",
    "roofline.breakdown": "compute, memory beyond it, collectives beyond both: sums to time_s",
    "two_by_two.simulated": "exposed time by term; prefill is its products, without collectives",
    "two_by_two.of_best": "tokens/s per chip over the best chip's, among those that hold it",
    "roofline.mfu": "model FLOPs over peak at time_s, an upper bound",
    "roofline.bound_by_hops": "ici bounds by latency: at bandwidth alone it would not",
    "flops": "matmuls as executed, recomputation and masked attention included",
    "model_flops": "matmuls of the model: nothing recomputed, causal attention",
}


def _compiled(request: Request, done: Callable[[str], None]) -> list[Program]:
    work, limit = request.workload, min(MAX_EMULATED_DEVICES, len(jax.devices("cpu")))
    trained = trace_train(
        request.config, request.train, batch=work.batch_size, seq_len=work.seq_len, limit=limit
    )
    done(STEPS[1])
    served = trace_serve(
        request.config, request.serve, request.format,
        batch=work.serve_batch, context=work.context, prompt=work.prompt, limit=limit,
    )  # fmt: skip
    done(STEPS[2])
    return compile_all([trained, *served], done)


def _costs(request: Request, rows: list[TensorRow]) -> dict[str, ProgramCost]:
    """What the formulas say of each program, per device."""
    config, train, serve, work = request.config, request.train, request.serve, request.workload
    training = {"batch": work.batch_size, "seq_len": work.seq_len}
    serving = {"batch": work.serve_batch, "context": work.context}
    compute = serve.precision.compute
    stored = get_format(request.format).operand
    memory = ServeMemory(config, serve, request.format)
    held = {name: memory.predict(name, prompt=work.prompt, **serving).held
            for name in SERVE_PROGRAMS}  # fmt: skip
    step, replicas = work.prefill_step(serve), shard_count(serve, BATCH)
    return {
        "train_step": ProgramCost(
            tokens=work.batch_size * work.seq_len,
            operands=(train.precision.compute, train.precision.compute),
            model_flops=traffic.train_model_flops(config, **training),
            traffic=traffic.train_traffic(config, train, rows, **training),
            memory=traffic.train_memory(config, train, rows, **training),
        ),
        "prefill": ProgramCost(
            tokens=replicas * step.tokens,
            operands=(compute, stored),
            model_flops=replicas * traffic.prefill_model_flops(config, step),
            traffic=traffic.prefill_traffic(config, serve, rows, step),
            memory=held["prefill"],
        ),
        "decode": ProgramCost(
            tokens=work.serve_batch,
            operands=(compute, stored),
            model_flops=traffic.decode_model_flops(config, **serving),
            traffic=traffic.decode_traffic(config, serve, rows, **serving),
            memory=held["decode"],
        ),
    }


def _other_chips(request: Request, own: Profile) -> list[str]:
    chips = (request.train.chip, request.serve.chip)
    return [chip for chip in dict.fromkeys(chips) if chip != own.chip]


def _profile_json(profile: Profile, mesh_by: str) -> dict[str, Any]:
    return {
        "profile": profile.name,
        "chip": profile.chip,
        "chips": profile.chips,
        "devices": profile.devices,
        "mesh": dict(profile.mesh),
        "mesh_by": mesh_by,
        "remat": profile.remat,
        "precision": asdict(profile.precision),
    }


def _spec_json(spec: Any) -> list[Any]:
    return [list(entry) if isinstance(entry, tuple) else entry for entry in spec]


def _tensor_json(row: TensorRow, request: Request) -> dict[str, Any]:
    config, train, serve = request.config, request.train, request.serve
    rows = rows_per_device(row.spec, serve, request.workload)
    return {
        "name": row.spec.name,
        "shape": list(row.spec.shape),
        "logical_axes": list(row.spec.axes),
        "train": {
            "spec": _spec_json(row.train_spec),
            "dtype": MASTER_DTYPE,
            "bytes_per_device": row.master_bytes,
            "state_bytes_per_device": row.state_bytes,
            "matmul": train_product(config, row, train),
            "why": [link.as_json() for link in chain(row.spec, train)],
        },
        "serve": {
            "spec": _spec_json(row.serve_spec),
            "format": row.serve_format,
            "bytes_per_device": row.serve_bytes,
            "matmul": serve_product(config, row, serve, rows),
            "why": [link.as_json() for link in chain(row.spec, serve)],
        },
        "reshard_bytes_per_device": row.reshard_bytes,
        "reshard_bytes": row.reshard_total_bytes,
    }


def _totals(rows: list[TensorRow], request: Request) -> dict[str, Any]:
    serve = sum(row.serve_bytes for row in rows)
    return {
        "train_bytes_per_device": sum(row.master_bytes for row in rows),
        "train_state_bytes_per_device": sum(row.state_bytes for row in rows),
        "serve_bytes_per_device": serve,
        "serve_bits_per_weight": 8 * serve / sum(_serve_elements(row, request) for row in rows),
        "reshard_bytes_per_device": sum(row.reshard_bytes for row in rows),
        "reshard_bytes": sum(row.reshard_total_bytes for row in rows),
        "rung": RUNGS["tensors"],
    }


def _serve_elements(row: TensorRow, request: Request) -> int:
    mesh, split = request.serve.mesh, 1
    for axis in row.spec.axes:
        for name in request.serve.rules.mesh_axes(axis):
            split *= mesh[name]
    return row.spec.size // split


def _notes(programs: list[Program]) -> list[str]:
    notes = []
    for program in programs:
        if program.shrunk:
            mesh = ", ".join(f"{axis}={size}" for axis, size in program.emulated_mesh.items())
            notes.append(
                f"{program.name}: there are too few virtual devices for its mesh; collectives were"
                f" counted on {mesh}, with as many rows per device"
            )
        for item in (*program.flops.opaque, *program.flops.unknown_loops):
            notes.append(f"{program.name}: not counted in the FLOPs: {item}")
    serving = next((p.profile for p in programs if p.profile.role == "serve"), None)
    if serving is not None and (slices := serving.mesh.get("data", 1)) > 1:
        notes.append(
            f"prefill, decode: an engine on each of {slices} slices of data, which exchange"
            " nothing; FLOPs and tokens are of all of them"
        )
    return notes
