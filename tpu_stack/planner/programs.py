"""The programs that training and serving run, traced and compiled for a mesh without allocating.

The functions are the real ones (`make_train_step`; the engine's are in `serve_programs`) with
abstract arguments. XLA:CPU compiles them for as many virtual devices as the mesh has; its
collectives are what the planner reads. LLVM's optimizations are off: they change no collective and
take longer.

    traced = trace_train(config, profile, batch=128, seq_len=4096, limit=512)
    program = compile_all([traced])[0]
    program.flops.matmul_flops, summarize(program.collectives, as_written=True)
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh

from tpu_stack.data.token_batches import token_spec
from tpu_stack.models.config import ModelConfig
from tpu_stack.planner.flops import FlopCount, count_jaxpr
from tpu_stack.planner.hlo import Collective, collectives
from tpu_stack.planner.tensors import shard_count
from tpu_stack.quant.select import use_implementation
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import Profile
from tpu_stack.training.config import OptimizerConfig
from tpu_stack.training.layout import StateLayout
from tpu_stack.training.losses import NextTokenLoss
from tpu_stack.training.optimizer import make_optimizer
from tpu_stack.training.step import make_train_step

MAX_EMULATED_DEVICES = 512
_COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclass(frozen=True)
class Traced:
    """A program lowered for its emulated mesh, and its products counted.

    Invariant: `flops` is for the profile's own mesh and batch, over all devices. `mesh` is the one
    it was lowered for: of a serving program, that of one slice of the data axis; `shrunk` where it
    has fewer devices than it should, as there are too few virtual ones.
    """

    name: str
    profile: Profile
    mesh: Mesh
    flops: FlopCount
    lowered: jax.stages.Lowered
    shrunk: bool


@dataclass(frozen=True)
class Program:
    """A compiled program's findings. `emulated_mesh` is the mesh that `collectives` are of, and
    `shrunk` as in `Traced`."""

    name: str
    profile: Profile
    emulated_mesh: dict[str, int]
    flops: FlopCount
    collectives: tuple[Collective, ...]
    shrunk: bool


def shrink(profile: Profile, limit: int) -> Profile:
    """The profile on at most `limit` devices: each axis, first to last, divided as far as needed.

    Sizes stay divisors of what they were, so whatever divided evenly still does, and the batch per
    device, hence the payload of collectives over the other axes, can stay the same.
    """
    mesh = dict(profile.mesh)
    for axis, size in profile.mesh.items():
        rest = prod(mesh.values()) // size
        fitting = [d for d in range(1, size + 1) if size % d == 0 and d * rest <= limit]
        mesh[axis] = max(fitting, default=1)
    return profile if mesh == dict(profile.mesh) else dataclasses.replace(profile, mesh=mesh)


def trace_train(
    config: ModelConfig,
    profile: Profile,
    *,
    batch: int,
    seq_len: int,
    limit: int = MAX_EMULATED_DEVICES,
    accumulate: int = 1,
    mesh: Mesh | None = None,
) -> Traced:
    """The train step of one global batch [batch, seq_len], AdamW, in `accumulate` micro-batches.

    Lowered for `mesh` where one is given (of a TPU topology, say), else for the emulated mesh.
    """
    small, mesh, batch_now = _placed(profile, batch, limit, mesh)
    optimizer = make_optimizer(OptimizerConfig(), 1, config)
    layout = StateLayout.of(config, optimizer, small, mesh)
    loss = NextTokenLoss(config, profile.precision.compute, profile.remat)  # pyright: ignore
    step = make_train_step(loss, optimizer, accumulate)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout.shardings, None))
    batches = layout.abstract_batch(token_spec(batch_now, seq_len))
    arguments = (layout.abstract, (), batches)
    scale, shrunk = batch // batch_now, small is not profile
    return traced_on(
        "train_step", profile, small, mesh, jitted, arguments, scale=scale, shrunk=shrunk
    )


def _placed(
    profile: Profile, batch: int, limit: int, mesh: Mesh | None
) -> tuple[Profile, Mesh, int]:
    """The profile on `mesh`; without one, the shrunk profile, its mesh of virtual devices, and the
    batch that keeps rows per device."""
    if mesh is not None:
        return profile, mesh, batch
    small = shrink(profile, limit)
    batch_now = batch // shard_count(profile, BATCH) * shard_count(small, BATCH)
    return small, make_mesh(small.mesh, jax.devices("cpu")), batch_now


def traced_on(
    name: str,
    profile: Profile,
    small: Profile,
    mesh: Mesh,
    jitted: Any,
    arguments: Any,
    *,
    scale: int,
    shrunk: bool,
    turns: Fraction | None = None,
) -> Traced:
    """`jitted` traced and lowered for `mesh`, which `small`, `profile` on fewer devices, is of.

    Packed weights go to the kernel on a mesh of TPU devices; on the emulated mesh to XLA's
    products, which have the same collectives, never through the path meant for one CPU device.

    Args:
      scale: how many times the work `profile` has.
      turns: as in `count_jaxpr`.
    """
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    products = nullcontext() if on_tpu else use_implementation("xla")
    with sharding_scope(mesh, small.rules), products:
        traced = jitted.trace(*arguments)
        lowered = traced.lower()
    flops = _scaled(count_jaxpr(traced.jaxpr, turns), scale)
    return Traced(name, profile, mesh, flops, lowered, shrunk)


def _scaled(count: FlopCount, times: int) -> FlopCount:
    """The count for `times` the batch, over which every product runs once, or as many engines."""
    return dataclasses.replace(
        count,
        matmul_flops=count.matmul_flops * times,
        by_operand_dtypes={k: v * times for k, v in count.by_operand_dtypes.items()},
        dot_operand_bytes=count.dot_operand_bytes * times,
        opaque_flops=count.opaque_flops * times,
    )


def compile_all(
    programs: Sequence[Traced], done: Callable[[str], None] = lambda name: None
) -> list[Program]:
    """Compiles them side by side and reads their collectives; `done` is told each name."""

    def one(traced: Traced) -> Program:
        compiled = traced.lowered.compile(compiler_options=_COMPILER_OPTIONS)  # pyright: ignore
        found = collectives(compiled.as_text() or "", traced.mesh)
        done(traced.name)
        mesh = dict(traced.mesh.shape)
        return Program(traced.name, traced.profile, mesh, traced.flops, tuple(found), traced.shrunk)

    with ThreadPoolExecutor(max_workers=max(1, len(programs))) as pool:
        return list(pool.map(one, programs))
