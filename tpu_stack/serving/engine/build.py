"""A running engine from weights on a mesh, or on two.

Example:
    service = start_service(config, params, profile, mesh, EngineOptions(slots=8))
"""

from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.serving.engine.engine import Engine
from tpu_stack.serving.engine.programs import Programs
from tpu_stack.serving.engine.shapes import Shapes
from tpu_stack.serving.engine.thread import EngineThread
from tpu_stack.serving.engine.two_meshes import TwoMeshes
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.serving.replicas import AXIS, Replicas, on_slice, one_replica, split_mesh
from tpu_stack.serving.service import Service
from tpu_stack.sharding.profiles import Profile

PAGE = {"emulated": 16, "tpu": 128}
"""Tokens of a page: 128 fill a tile on TPU; on CPU small ones waste and recompute least."""
CHUNKS = (64, 256)
"""Prompt tokens per row of a prefill program. From 64 rows of a product on, XLA:CPU computes a row
the same, bit for bit, whatever their number: so a prompt's keys do not depend on its company."""
PROMPTS = (1, 4)
CPU_SLOTS = 8
"""XLA:CPU multiplies batches under eight ten times slower."""


@dataclass(frozen=True)
class Side:
    """A mesh and what is on it: parameters, or with a draft the pair of both models'."""

    params: Any
    profile: Profile
    mesh: Mesh


def start_service(
    config: ModelConfig,
    params: Any,
    profile: Profile,
    mesh: Mesh,
    options: EngineOptions,
    facts: dict[str, Any] | None = None,
    *,
    draft: ModelConfig | None = None,
    prefill: Side | None = None,
    warm_up: bool = True,
) -> Service:
    """The engine, compiled and running; `facts` are added to what it says of itself. A mesh with a
    data axis runs an engine on each of its slices, which share `options`' sizes.

    Args:
      params: laid out on `mesh`; with a draft, the pair (the model's, the draft's).
      prefill: another mesh, to prefill on; `mesh` then decodes only.
      warm_up: compile every program now, as a server does; else each one when it is first needed,
        so that a batch compiles nothing that it does not run.

    Raises UserError when one of two meshes has a data axis, or sizes do not fit.
    """
    if mesh.shape.get(AXIS, 1) > 1 and prefill is None:
        return _start_replicas(config, params, profile, mesh, options, facts, draft, warm_up)
    side = Side(params, options.applied(profile), mesh)
    shapes = engine_shapes(config, side.profile, options)
    engine = _engine(config, side, shapes, draft, prefill, options, warm_up)
    precision = side.profile.precision
    described = {
        "profile": profile.name,
        "mesh": dict(profile.mesh),
        "emulated": profile.emulated,
        "page": shapes.page,
        "slots": shapes.slots,
        "pages": shapes.pages,
        "compute_dtype": precision.compute,
        "cache_dtype": precision.cache or precision.compute,
        **({"guesses": shapes.guesses} if shapes.guesses else {}),
        **_of_prefill(prefill),
        **(facts or {}),
    }
    return EngineThread(engine, options.queue, described)


def _start_replicas(
    config: ModelConfig,
    params: Any,
    profile: Profile,
    mesh: Mesh,
    options: EngineOptions,
    facts: dict[str, Any] | None,
    draft: ModelConfig | None,
    warm_up: bool,
) -> Replicas:
    count, slices = mesh.shape[AXIS], split_mesh(mesh)
    each = options.divided(count)
    one = one_replica(profile)
    services: list[Service] = []
    try:
        for slice in slices:
            weights = on_slice(params, slice)
            services.append(
                start_service(
                    config, weights, one, slice, each, facts, draft=draft, warm_up=warm_up
                )
            )
    except BaseException:
        for service in services:
            service.close()
        raise
    said = services[0].describe()
    sizes = {name: said[name] * count for name in ("slots", "pages")}
    return Replicas(services, slices, {**said, "mesh": dict(profile.mesh), **sizes})


def _engine(
    config: ModelConfig,
    side: Side,
    shapes: Shapes,
    draft: ModelConfig | None,
    prefill: Side | None,
    options: EngineOptions,
    warm_up: bool,
) -> Engine:
    decode = _programs(config, side, shapes, draft)
    programs: Programs | TwoMeshes = decode
    params = side.params
    if prefill is not None:
        first = Side(prefill.params, options.applied(prefill.profile), prefill.mesh)
        programs = TwoMeshes(_programs(config, first, shapes, draft), decode)
        params = (first.params, side.params)
    params = programs.prepared(params)
    if warm_up:
        programs.warm_up(params)
    return Engine(programs, params)


def _programs(
    config: ModelConfig, side: Side, shapes: Shapes, draft: ModelConfig | None
) -> Programs:
    if (data := side.mesh.shape.get("data", 1)) > 1:
        raise UserError(
            f"a mesh has data={data}; of two meshes each holds one replica, split over tensor"
            " alone, so ask for fewer chips and run a server per pair"
        )
    return Programs(config, side.profile, side.mesh, shapes, draft)


def _of_prefill(prefill: Side | None) -> dict[str, Any]:
    if prefill is None:
        return {}
    return {"prefill_profile": prefill.profile.name, "prefill_mesh": dict(prefill.profile.mesh)}


def engine_shapes(config: ModelConfig, profile: Profile, options: EngineOptions) -> Shapes:
    """The shapes that programs are compiled for."""
    page = options.page or PAGE["emulated" if profile.emulated else "tpu"]
    window = min(options.max_length or config.max_seq_len, config.max_seq_len)
    length = -(-window // page) * page
    slots = options.slots
    if profile.emulated:
        slots = -(-slots // CPU_SLOTS) * CPU_SLOTS
    entries = length // page
    pages = options.pages or slots * entries
    if pages < entries:
        raise UserError(
            f"pages is {pages}; one sequence of {length} tokens needs {entries} of {page}"
        )
    return Shapes(slots, length, page, pages, CHUNKS, PROMPTS, options.guesses)
