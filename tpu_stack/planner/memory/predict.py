"""Whether a program fits, by formula: the prediction for any request beside what a device has.

Example:
    from tpu_stack.planner.aot.spec import CompileSpec
    from tpu_stack.planner.aot.request import make_request
    verdict = Verdict.of(make_request(CompileSpec("llama3_8b", "v5e:4x4", "train")))
    verdict.fits, verdict.prediction.total_bytes, verdict.limit_bytes
"""

from dataclasses import dataclass

from tpu_stack.planner.aot.request import CompileRequest
from tpu_stack.planner.memory.prediction import Prediction
from tpu_stack.planner.memory.serve import ServeMemory
from tpu_stack.planner.memory.train import predict_train
from tpu_stack.sharding.profiles import Profile

COMPILER_LIMITS = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.24}
"""Chip -> GiB of a device's HBM that the compiler gives to a program; the rest is the runtime's.

v5e, v6e: its own out-of-memory messages (libtpu 0.0.52). v4, v5p: "of 30.75G hbm" and the like in
messages that others published. Others: all the HBM that the chip facts give."""


def limit_of(profile: Profile) -> int:
    """Bytes of HBM that a program may use on one JAX device. Raises UserError if not known."""
    chip = profile.chip_facts
    if chip.name in COMPILER_LIMITS:
        return int(COMPILER_LIMITS[chip.name] * 2**30)
    return int(chip.require("hbm_bytes")) // chip.devices(1)


def predict(request: CompileRequest) -> Prediction:
    """What one device holds. Raises UserError where a format's groups do not divide the mesh."""
    if request.program == "train":
        return predict_train(request)
    memory = ServeMemory(request.config, request.profile, request.format)
    return memory.predict(
        request.program, batch=request.batch, context=request.context, prompt=request.prompt
    )


@dataclass(frozen=True)
class Verdict:
    """A request, what it is predicted to hold, and what a device has for it."""

    request: CompileRequest
    prediction: Prediction
    limit_bytes: int

    @classmethod
    def of(cls, request: CompileRequest) -> "Verdict":
        """The verdict on `request`; raises UserError as `predict` and `limit_of` do."""
        return cls(request, predict(request), limit_of(request.profile))

    @property
    def fits(self) -> bool:
        """Whether what the device must hold is within the limit."""
        return self.prediction.held_bytes <= self.limit_bytes

    @property
    def over_bytes(self) -> int:
        """How much too much; negative where it fits."""
        return self.prediction.held_bytes - self.limit_bytes
