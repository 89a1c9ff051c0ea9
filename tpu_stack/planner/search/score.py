"""What the simulator says of a candidate's step, with what depends on the mesh alone kept aside.

Example:
    scorer = Scorer.of(question, profile, "int4")
    scorer.terms(candidate)  # {'weights': 0.0021, 'compute': ...}
"""

from dataclasses import dataclass

from tpu_stack.models.config import ModelConfig
from tpu_stack.planner.backtest.calibration import Calibration, Fit
from tpu_stack.planner.backtest.table import Row
from tpu_stack.planner.search.ask import Question
from tpu_stack.planner.search.candidate import Candidate
from tpu_stack.planner.simulate.architecture import Architecture
from tpu_stack.planner.simulate.decode import (
    BF16,
    BYTES,
    ServeJob,
    decode_step,
    prefill_seconds,
    weights_read,
)
from tpu_stack.planner.simulate.layout import Layout
from tpu_stack.planner.simulate.remat import Remat
from tpu_stack.planner.simulate.train import TrainJob, train_step
from tpu_stack.planner.workload import PrefillStep
from tpu_stack.quant.formats import get_format
from tpu_stack.sharding.profiles import Profile

REMATS = {"full": Remat.parse("full"), "dots": Remat.parse("dots"), "none": Remat.parse("none")}


@dataclass(frozen=True)
class Scorer:
    """Times the candidates of one mesh. `flash` as in `Ask`."""

    arch: Architecture
    layout: Layout
    fit: Fit
    flash: bool

    @classmethod
    def of(cls, config: ModelConfig, profile: Profile, flash: bool = True) -> "Scorer":
        """For the mesh of `profile`, with the constants fitted on all published rows."""
        mesh = profile.mesh
        layout = Layout(
            profile.chip_facts,
            profile.chips or 1,
            data=mesh["data"],
            fsdp=mesh.get("fsdp", 1),
            tensor=mesh["tensor"],
        )
        return cls(Architecture.of(config), layout, Calibration.load().full, flash)

    def terms(self, candidate: Candidate) -> dict[str, float]:
        """Seconds of a step by term."""
        if candidate.program == "train":
            return self._train(candidate)
        job = ServeJob(self.arch, self.layout, read_as(candidate.format))
        if candidate.program == "decode":
            fit, context = self.fit, candidate.length
            return decode_step(job, candidate.batch, context, fit.train, fit.serve)
        return self._prefill(candidate, job)

    def _train(self, candidate: Candidate) -> dict[str, float]:
        job = TrainJob(
            self.arch,
            self.layout,
            candidate.batch,
            candidate.length,
            remat=REMATS[candidate.profile.remat],
            fused_attention=self.flash,
            microbatches=candidate.accumulate,
        )
        return train_step(job, self.fit.train).terms

    def _prefill(self, candidate: Candidate, job: ServeJob) -> dict[str, float]:
        """The simulator's time of the prompts, and what it leaves out: the weights where reading
        them in every run of the program takes longer, and two all-reduces a layer over the tensor
        axis."""
        arch, layout, serving = self.arch, self.layout, self.fit.serve
        tokens, length = candidate.tokens / job.replicas, candidate.tokens / candidate.batch
        compute_s = prefill_seconds(job, tokens, length, self.fit.train)
        hbm = layout.chip.require("hbm_bytes_per_s") * job.chips_per_replica
        rows = candidate.batch // job.replicas
        step = PrefillStep.of(candidate.tokens // candidate.batch, rows)
        runs = -(-rows // step.rows) * len(step.ends)
        weights = runs * weights_read(arch, step.tokens) * BYTES[job.weights]
        weights_s = weights / (hbm * serving.weights_hbm)
        block = tokens * arch.d_model * BF16
        sums_s = 2 * arch.layers * layout.links("tensor").all_reduce_s(block)
        return {
            "compute": compute_s,
            "weights": max(0.0, weights_s - compute_s),
            "collectives": serving.collectives * sums_s,
        }


def read_as(format: str) -> str:
    """The simulator's element type for a format's weights.

    Below 4 bits it is int4: unpacking then costs what the smaller reads save (see the kernels'
    table), so that fewer bits gain room and no time.
    """
    wanted = get_format(format)
    if not wanted.quantized:
        return "bf16"
    is_float = wanted.storage.startswith("float")
    if wanted.bits == 8:
        return "fp8" if is_float else "int8"
    return "fp4" if is_float else "int4"


def extrapolation(config: ModelConfig, profile: Profile, program: str) -> str:
    """In what the constants were fitted on nothing like this; "" where they were."""
    numbers = {
        "n_chips": float(profile.chips or 1),
        "params_b": Architecture.of(config).total_parameters / 1e9,
    }
    row = Row("search", program, profile.chip, "", 0.0, {}, numbers, {})
    return Calibration.load().extrapolates(row)


def notes(question: Question) -> tuple[str, ...]:
    """Extrapolation and missing facts, each once, with the slices that it is about."""
    about: dict[str, list[str]] = {}
    for profile in question.profiles:
        beyond = extrapolation(question.config, profile, question.program)
        if beyond:
            about.setdefault(f"extrapolated: {beyond}", []).append(profile.name)
        if profile.chip_facts.price_usd_per_hour is None:
            about.setdefault("no source gives a price, so no cost", []).append(profile.name)
    found = [f"{', '.join(names)}: {text}" for text, names in about.items()]
    if question.program != "train":
        return (*found, "activations are bfloat16, whatever the weights are")
    attention = "a flash kernel" if question.ask.flash else "scores written to memory"
    return (*found, f"attention is taken to be {attention}")
