"""`ts.compare` and `ts.plan`: what a model would cost on chips that are not here.

Example:
    compare("llama3_70b", train="8t:4x4x4", serve="8i:8")["two_by_two"]
"""

import contextlib
import os
from collections.abc import Callable
from inspect import signature
from typing import Any

from tpu_stack.api.settings import check_names
from tpu_stack.planner import compare as comparing
from tpu_stack.planner.projection import project
from tpu_stack.planner.workload import Workload
from tpu_stack.sharding.placement import choose_backend

_NAMED = ("model", "config", "train", "serve", "sizes")
"""Parameters that `compare` names itself, or fills in."""


def compare(
    model: str,
    *,
    train: str = "8t:4x4x4",
    serve: str = "8i:8",
    progress: Callable[[str], None] = lambda name: None,
    **options: Any,
) -> dict[str, Any]:
    """One model under a training and a serving profile, JSON-ready: tensors, moves, programs.

    Nothing is allocated; speeds are projected. `options` are those of
    `planner.request.make_request`, such as format="int8"; `progress` is told each part that is
    done. Raises UserError for anything that cannot be compared.
    """
    # XLA's partitioner warns of layouts it finds costly; the collectives below count that cost.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    choose_backend()
    known = (*signature(comparing.make_request).parameters, *signature(Workload.of).parameters)
    check_names("compare", options, [name for name in known if name not in _NAMED])
    with contextlib.suppress(RuntimeError):  # JAX has started: make do with its devices
        jax.config.update("jax_num_cpu_devices", comparing.devices_wanted(train, serve))
    return comparing.compare(comparing.make_request(model, train, serve, **options), progress)


def plan(model: str, profile: str, **options: Any) -> dict[str, Any]:
    """How long a step takes, term by term, *projected* by the simulator, JSON-ready.

    `options` are those of `planner.projection.project`, such as batch_size=64 or
    program="serve". Nothing is compiled. Raises UserError for what cannot be placed.
    """
    check_names("plan", options, list(signature(project).parameters)[2:])
    return project(model, profile, **options)
