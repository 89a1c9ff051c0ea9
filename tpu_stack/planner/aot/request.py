"""What is compiled: a program of a model under a profile, with every size filled in.

>>> request = make_request(CompileSpec("llama3_8b", "v5p:4x4x4", "train"))
>>> request.batch, request.seq_len, dict(request.profile.mesh)
(128, 4096, {'data': 1, 'fsdp': 64, 'tensor': 1})
"""

import dataclasses
from dataclasses import dataclass

from tpu_stack.errors import UserError
from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.presets import get_preset
from tpu_stack.planner.aot.spec import PROGRAMS, REMAT, CompileSpec, nearest
from tpu_stack.planner.aot.target import topology_of
from tpu_stack.planner.workload import Workload
from tpu_stack.quant.formats import get_format
from tpu_stack.serving.layout import with_groups
from tpu_stack.sharding.profiles import Profile, get_profile, require_batch_divides


@dataclass(frozen=True)
class CompileRequest:
    """One program to compile.

    Attributes:
      config: the model. profile: of role "train" for the train step, of role "serve" otherwise;
        its `remat` is what the backward pass recomputes.
      program: one of PROGRAMS.
      batch: sequences over all devices.
      seq_len, accumulate: tokens of each and micro-batches; of a train step.
      context, prompt: positions of the cache, and tokens of a prompt, which prefill runs in chunks;
        of the others.
      format: what serving stores the weights as.
    """

    config: ModelConfig
    profile: Profile
    program: str
    batch: int
    seq_len: int = 0
    accumulate: int = 1
    context: int = 0
    prompt: int = 0
    format: str = "bf16"

    def check(self) -> None:
        """Raises UserError for what is refused without a compile: an unknown program, sizes that do
        not divide, a topology that does not exist."""
        if self.program not in PROGRAMS:
            raise nearest("program", self.program, PROGRAMS)
        role = "train" if self.program == "train" else "serve"
        if self.profile.role != role:
            raise UserError(
                f"{self.program} needs a profile of role {role}, not {self.profile.role}"
            )
        topology_of(self.profile)
        specs = tensor_specs(self.config)
        self.profile.check(specs if role == "train" else with_groups(self.config, self.format))
        require_batch_divides(self.profile, self.batch)
        if self.batch % self.accumulate:
            raise UserError(
                f"batch size {self.batch} is not a multiple of {self.accumulate} micro-batches"
            )
        require_batch_divides(self.profile, self.batch // self.accumulate)


def make_request(spec: CompileSpec, config: ModelConfig | None = None) -> CompileRequest:
    """Reads names, chooses the mesh where none is given (`Profile.fit`), fills in sizes.

    `config` stands for `spec.model` where the model is no preset. Raises UserError for anything
    unknown, a value out of range, a mesh or batch that does not divide.
    """
    config = config or get_preset(spec.model)
    if spec.program not in PROGRAMS:
        raise nearest("program", spec.program, PROGRAMS)
    training = spec.program == "train"
    get_format(spec.format)
    profile = get_profile(spec.profile, "train" if training else "serve")
    topology_of(profile)
    specs = tensor_specs(config) if training else with_groups(config, spec.format)
    profile = profile.with_mesh(spec.mesh) if spec.mesh else profile.fit(specs)
    if spec.remat is not None:
        if spec.remat not in REMAT:
            raise nearest("remat", spec.remat, REMAT)
        profile = dataclasses.replace(profile, remat=spec.remat)
    if spec.accumulate < 1:
        raise UserError(f"accumulate is {spec.accumulate}; it must be at least 1")
    work = Workload.of(
        config, profile, profile,
        batch_size=spec.batch_size, seq_len=spec.seq_len, serve_batch=spec.serve_batch,
        context=spec.context, prompt=spec.prompt,
    )  # fmt: skip
    request = CompileRequest(config, profile, spec.program, work.batch_size, work.seq_len)
    if training:
        request = dataclasses.replace(request, accumulate=spec.accumulate)
    else:
        request = CompileRequest(
            config, profile, spec.program, work.serve_batch,
            context=work.context, prompt=work.prompt, format=spec.format,
        )  # fmt: skip
    request.check()
    return request
