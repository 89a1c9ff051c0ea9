"""What a comparison is asked for: names read, meshes chosen, workload filled in.

>>> make_request("llama3_8b", "8t:4x4x4", "8i:8", format="int4").serve.mesh
{'data': 2, 'tensor': 8}
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tpu_stack.errors import UserError
from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.presets import get_preset
from tpu_stack.planner.programs import MAX_EMULATED_DEVICES
from tpu_stack.planner.workload import Workload
from tpu_stack.quant.formats import get_format
from tpu_stack.serving.layout import with_groups
from tpu_stack.sharding.axes import TensorSpec
from tpu_stack.sharding.profiles import Profile, Role, get_profile


@dataclass(frozen=True)
class Request:
    """What is compared. `train_mesh_by` and `serve_mesh_by` say who chose each mesh."""

    model: str
    config: ModelConfig
    train: Profile
    serve: Profile
    format: str
    workload: Workload
    train_mesh_by: str
    serve_mesh_by: str


def make_request(
    model: str,
    train: str,
    serve: str,
    *,
    train_mesh: str | None = None,
    serve_mesh: str | None = None,
    format: str = "int4",
    **sizes: int | None,
) -> Request:
    """Reads names, chooses meshes where none is given (`Profile.fit`), fills in the workload.

    `sizes` are those of `Workload.of`. Raises UserError for anything unknown, a profile without a
    topology or a chip without facts, and a mesh or batch that does not divide.
    """
    config = get_preset(model)
    get_format(format)
    train_profile, train_by = _placed(train, "train", train_mesh, tensor_specs(config))
    specs = with_groups(config, format)
    serve_profile, serve_by = _placed(serve, "serve", serve_mesh, specs)
    workload = Workload.of(config, train_profile, serve_profile, **sizes)
    return Request(
        model, config, train_profile, serve_profile, format, workload, train_by, serve_by
    )


def check_profile(text: str, role: Role) -> Profile:
    """The profile, if it can be planned for. Raises UserError where it lacks topology or facts."""
    profile = get_profile(text, role)
    profile.chip_facts.require("hbm_bytes_per_s")
    profile.chip_facts.require("bf16_flops_per_s")
    if profile.chips is None:
        rank = profile.chip_facts.torus_rank
        example = {2: "4x4", 3: "2x2x1"}.get(rank or 0, "8")
        raise UserError(f"--{role} {text}: say how many chips, as in {profile.chip}:{example}")
    return profile


def place(
    model: str, text: str, role: Role, mesh: str | None, format: str
) -> tuple[ModelConfig, Profile]:
    """A model and one profile for it: names read, the mesh chosen where none is given.

    Raises UserError as `make_request` does.
    """
    config = get_preset(model)
    get_format(format)
    specs = tensor_specs(config) if role == "train" else with_groups(config, format)
    return config, _placed(text, role, mesh, specs)[0]


def _placed(
    text: str, role: Role, mesh: str | None, specs: Iterable[TensorSpec]
) -> tuple[Profile, str]:
    profile = check_profile(text, role)
    if mesh is not None:
        profile = profile.with_mesh(mesh)
        profile.check(specs)
        return profile, "given"
    fitted = profile.fit(specs)
    same = dict(fitted.mesh) == dict(profile.mesh)
    return fitted, "profile default" if same else "Profile.fit"


def devices_wanted(train: str, serve: str) -> int:
    """Virtual devices to start: as many as the larger profile has, up to MAX_EMULATED_DEVICES."""
    larger = max(check_profile(train, "train").devices, check_profile(serve, "serve").devices)
    return min(MAX_EMULATED_DEVICES, larger)
