"""Throughput of an engine with continuous batching: decode steps and prefills share the chips.

In the steady state `batch` sequences are decoded together, and each step ends batch / output of
them, whose places take new prompts. So one step costs its decode, the prefill of batch / output
prompts, and what the engine spends on a step and on a request.

    serve_throughput(job, Traffic(64, 1000, 1000), constants, serving).out_tokens_per_s_per_chip
"""

from dataclasses import dataclass
from math import ceil, log

from tpu_stack.planner.simulate.constants import Constants, ServeConstants
from tpu_stack.planner.simulate.decode import ServeJob, decode_step, prefill_seconds


@dataclass(frozen=True)
class Traffic:
    """What is asked of an engine.

    Attributes:
      concurrency: sequences decoded together, over all replicas.
      input_len, output_len: mean tokens of a request.
      requests: of the whole run; 0 for a run so long that its ends do not matter.
      chunked: prompts run in chunks beside decode (vLLM), else one at a time on every chip.
    """

    concurrency: float
    input_len: float
    output_len: float
    requests: int = 0
    chunked: bool = True

    @property
    def padding(self) -> float:
        """Tokens run over tokens asked, of prompts run alone: padded to the next power of two.

        2 ln 2 is the mean where lengths lie evenly, in logarithm, between two of them.
        """
        return 1.0 if self.chunked else 2 * log(2)

    @property
    def occupancy(self) -> float:
        """Mean share of the places that are filled over the run: the last round is not."""
        if not self.requests:
            return 1.0
        rounds = ceil(self.requests / self.concurrency)
        return self.requests / (self.concurrency * rounds)


@dataclass(frozen=True)
class Throughput:
    """Seconds of a step by term, and output tokens a second per chip."""

    terms: dict[str, float]
    out_tokens_per_s_per_chip: float


def serve_throughput(
    job: ServeJob, traffic: Traffic, constants: Constants, serving: ServeConstants
) -> Throughput:
    """The steady state of `traffic`, and what a short run's ends take from it."""
    batch = traffic.concurrency
    context = traffic.input_len + traffic.output_len / 2
    terms = decode_step(job, batch, context, constants, serving)
    started = batch / traffic.output_len  # requests per step
    per_replica = started / job.replicas if traffic.chunked else started
    prompt_s = prefill_seconds(
        job,
        traffic.input_len * traffic.padding,
        traffic.input_len,
        constants,
        share=serving.prefill,
    )
    terms["prefill"] = per_replica * prompt_s
    terms["engine"] = serving.engine_s
    if not traffic.chunked:
        terms["requests"] = started * serving.request_s
    filled = batch * traffic.occupancy
    return Throughput(terms, filled / sum(terms.values()) / job.layout.chips)
