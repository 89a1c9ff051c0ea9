"""What a search is asked for, with every name read and every size checked before it starts.

>>> Ask("llama3_8b", ("v6e:64",), "decode-throughput", latency_s=0.02).read().program
'decode'
"""

from dataclasses import dataclass

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import Chip
from tpu_stack.hardware.slices import is_slice
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.presets import get_preset
from tpu_stack.planner.aot.spec import PROGRAMS, nearest
from tpu_stack.planner.request import check_profile
from tpu_stack.planner.search.goals import GOALS, Goal, goal_of
from tpu_stack.planner.workload import Workload
from tpu_stack.quant.formats import get_format
from tpu_stack.sharding.profiles import Profile, Role, get_profile


def usual_formats(chip: Chip) -> tuple[str, ...]:
    """Searched unless told otherwise: those that cost little quality, which a search cannot see.

    Eight bits are integers where the chip multiplies them, else fp8.
    """
    return ("bf16", "int8" if chip.matmul_is_native("int8", "int8") else "fp8_e4m3", "int4")


@dataclass(frozen=True)
class Ask:
    """A search in the user's words.

    Attributes:
      model: preset. chips: profiles such as "v6e:64"; the best of all of them is sought.
      goal: a key of GOALS. program: whose cost; None: the goal's usual one.
      latency_s: the longest step, of decode or of a batch of prompts, that is allowed.
      seq_len: of training. context, prompt: of serving. None: defaults as in `Workload`.
      batches: sequences over all devices; empty: a ladder of sizes.
      formats: of the weights, for serving; empty: `usual_formats` of the chip.
      flash: whether training attention is a flash kernel, or scores written to memory.
    """

    model: str
    chips: tuple[str, ...]
    goal: str
    program: str | None = None
    latency_s: float | None = None
    seq_len: int | None = None
    context: int | None = None
    prompt: int | None = None
    batches: tuple[int, ...] = ()
    formats: tuple[str, ...] = ()
    flash: bool = True

    def read(self) -> "Question":
        """Names looked up. Raises UserError at the first that is unknown or out of range."""
        config = get_preset(self.model)
        if self.goal not in GOALS:
            raise nearest("goal", self.goal, tuple(GOALS))
        programs = GOALS[self.goal].programs
        program = self.program or programs[0]
        if program not in PROGRAMS:
            raise nearest("program", program, PROGRAMS)
        if program not in programs:
            raise UserError(f"goal {self.goal} is about {programs[0]}, not {program}")
        self._check_sizes(program)
        profiles = self._profiles("train" if program == "train" else "serve")
        one = get_profile(profiles[0].chip, profiles[0].role)
        work = Workload.of(
            config, one, one, seq_len=self.seq_len, context=self.context, prompt=self.prompt
        )
        return Question(self, config, program, goal_of(self.goal, program), profiles, work)

    def _check_sizes(self, program: str) -> None:
        if self.latency_s is not None:
            if program == "train":
                raise UserError("--latency-ms is for prefill and decode, not for training")
            if not self.latency_s > 0:
                raise UserError(f"--latency-ms is {1e3 * self.latency_s:g}; it must be more than 0")
        for batch in self.batches:
            if batch < 1:
                raise UserError(f"--batch is {batch}; it must be at least 1")
        if self.formats and program == "train":
            raise UserError("--format is for serving: training keeps float32 weights")
        for name in self.formats:
            if get_format(name).bits > 16:
                raise UserError(f"--format {name}: the simulator serves 16 bits a weight at most")

    def _profiles(self, role: Role) -> tuple[Profile, ...]:
        """The slices to search; for the cost, also those of half, a quarter ... as many chips."""
        if not self.chips:
            raise UserError("--chips names no chip; write NAME:COUNT, as in v6e:64")
        found = {}
        for text in self.chips:
            profile = check_profile(text, role)
            found[profile.name] = profile
            chips = profile.chips or 1
            while self.goal == "cost" and chips % 2 == 0:
                chips //= 2
                if is_slice(profile.chip_facts, (chips,)):
                    smaller = get_profile(f"{profile.chip}:{chips}", role)
                    found.setdefault(smaller.name, smaller)
        if self.goal == "cost":
            for profile in found.values():
                if profile.chip_facts.price_usd_per_hour is None:
                    raise UserError(
                        f"the cost on {profile.chip} is not known: no source gives its price;"
                        " search for a throughput instead"
                    )
        return tuple(found.values())


@dataclass(frozen=True)
class Question:
    """An `Ask` with its names read."""

    ask: Ask
    config: ModelConfig
    program: str
    goal: Goal
    profiles: tuple[Profile, ...]
    work: Workload

    def formats(self, profile: Profile) -> tuple[str, ...]:
        """Weight formats to try on the profile's chip; ("",) for training."""
        if self.program == "train":
            return ("",)
        return self.ask.formats or usual_formats(profile.chip_facts)

    @property
    def length(self) -> int:
        """Tokens of a training sequence, or positions of the cache."""
        return self.work.seq_len if self.program == "train" else self.work.context

    @property
    def tokens_per_row(self) -> int:
        """Tokens of a step that a sequence takes part with."""
        return {"train": self.work.seq_len, "prefill": self.work.prompt, "decode": 1}[self.program]
