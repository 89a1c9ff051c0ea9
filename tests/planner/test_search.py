"""The search against a brute force over what it should have tried, and what its front means."""

import itertools
from dataclasses import replace

import pytest

from tpu_stack.errors import UserError
from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.presets import get_preset
from tpu_stack.planner.memory.predict import Verdict
from tpu_stack.planner.search import GOALS, Ask, search
from tpu_stack.planner.search.candidate import Candidate, Plan
from tpu_stack.planner.search.check import request_of, settle
from tpu_stack.planner.search.goals import COST_OF_TRAINING, goal_of
from tpu_stack.planner.search.score import Scorer, read_as
from tpu_stack.planner.search.space import MAX_TOKENS, batches, legal_meshes, meshes
from tpu_stack.planner.tensors import shard_count
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.profiles import get_profile

LLAMA = get_preset("llama3_8b")
DECODE = Ask("llama3_8b", ("v6e:8",), "decode-throughput")
TRAIN = Ask("llama3_8b", ("v5p:16",), "train-throughput")


@pytest.fixture(scope="module")
def decode():
    return search(DECODE)


@pytest.fixture(scope="module")
def train():
    return search(TRAIN)


def test_every_mesh_is_looked_at_and_the_legal_ones_kept():
    """64 = 2^6 over three axes: C(8, 2) ways; 8 key heads allow tensor 1, 2, 4 and 8."""
    profile = get_profile("v6e:64", "train")
    every = meshes(profile)
    assert len({tuple(p.mesh.values()) for p in every}) == len(every) == 28
    legal = legal_meshes(profile, tensor_specs(LLAMA))
    assert {p.mesh["tensor"] for p in legal} == {1, 2, 4, 8}
    assert len(legal) == 7 + 6 + 5 + 4
    assert all(p.devices == 64 for p in legal)


def test_a_batch_divides_its_mesh_and_stays_within_the_tokens():
    question = TRAIN.read()
    for profile in legal_meshes(question.profiles[0], tensor_specs(LLAMA)):
        split = shard_count(profile, BATCH)
        for batch in batches(question, profile):
            assert batch % split == 0
            assert batch == split or batch * question.length <= MAX_TOKENS


def test_what_fits_is_simulated_and_the_best_is_the_best(train):
    assert train.fitting == len(train.plans) < train.candidates
    rates = [plan.tokens_per_s_per_chip for plan in train.plans]
    assert rates == sorted(rates, reverse=True)
    assert all(plan.held_bytes <= plan.capacity for plan in train.plans)
    assert {plan.candidate.profile.remat for plan in train.plans} == {"full", "dots", "none"}
    best = train.best
    assert best[0] is train.plans[0]
    mine = [(p.candidate.mesh, p.candidate.profile.remat) for p in best]
    assert len(set(mine)) == len(mine)


def test_no_plan_beats_one_of_the_front_on_both_counts(train, decode):
    for found in (train, decode):
        goal = found.question.goal
        front = {id(plan) for plan in found.front}
        for plan in found.plans:
            beaten = any(
                goal.first.value(other) >= goal.first.value(plan)
                and goal.second.value(other) >= goal.second.value(plan)
                and (goal.first.value(other), goal.second.value(other))
                != (goal.first.value(plan), goal.second.value(plan))
                for other in found.plans
            )
            assert not (beaten and id(plan) in front)
        for one, two in itertools.pairwise(found.front):
            assert goal.first.value(one) >= goal.first.value(two)
            assert goal.second.value(one) < goal.second.value(two)


def test_latency_is_kept_and_the_lowest_is_the_fronts_other_end(decode):
    slow = decode.plans[0].step_s
    quick = search(replace(DECODE, latency_s=slow / 2))
    assert quick.plans
    assert max(plan.step_s for plan in quick.plans) <= slow / 2
    fastest = search(replace(DECODE, goal="decode-latency")).plans[0]
    assert fastest.step_s == pytest.approx(decode.front[-1].step_s)
    assert fastest.step_s == min(plan.step_s for plan in decode.plans)


def test_cost_is_the_price_of_the_chips_for_the_time():
    found = search(Ask("llama3_8b", ("v5e:8",), "cost", program="prefill", formats=("int8",)))
    assert {plan.chips for plan in found.plans} == {1, 4, 8}  # and the halves that can be rented
    plan = found.plans[0]
    expected = 1.20 / 3600 * plan.chips / plan.tokens_per_s * 1e6  # USD 1.20 an hour and chip
    assert plan.usd_per_million_tokens == pytest.approx(expected)
    assert all((p.usd_per_million_tokens or 0) >= expected * 0.999 for p in found.plans)
    assert goal_of("cost", "train") is COST_OF_TRAINING


def test_several_chips_are_searched_together():
    found = search(replace(DECODE, chips=("v5e:8", "8i:4"), formats=("int4",), batches=(16,)))
    assert {plan.candidate.profile.chip for plan in found.plans} == {"v5e", "8i"}
    assert {plan.candidate.batch for plan in found.plans} == {16}
    said = "\n".join(found.notes)
    assert "8i:4: extrapolated: no decode row on 8i was calibrated on" in said
    assert "8i:4: no source gives a price, so no cost" in said
    assert "v5e:8: no source" not in said


def test_terms_sum_and_prefill_pays_for_its_sums():
    scorers = {
        text: Scorer.of(LLAMA, get_profile("v6e:8", "serve").with_mesh(text))
        for text in ("data=8,tensor=1", "data=1,tensor=8")
    }
    terms = {}
    for text, scorer in scorers.items():
        profile = get_profile("v6e:8", "serve").with_mesh(text)
        terms[text] = scorer.terms(Candidate("prefill", profile, 8, 8192, 4096, format="int4"))
    alone, together = terms.values()
    assert alone["collectives"] == 0 < together["collectives"]
    assert alone["compute"] == pytest.approx(together["compute"])


def test_fewer_than_four_bits_gain_no_time():
    for name, kind in (("bf16", "bf16"), ("int8", "int8"), ("fp8_e5m2", "fp8"), ("int1", "int4"),
                       ("ternary", "int4"), ("nvfp4", "fp4")):  # fmt: skip
        assert read_as(name) == kind


def test_of_equally_quick_formats_the_one_with_more_bits_comes_first():
    found = search(replace(DECODE, formats=("int1", "int4"), batches=(8,)))
    one, two = found.plans[:2]
    assert one.step_s == two.step_s
    assert (one.candidate.format, two.candidate.format) == ("int4", "int1")


def test_an_asked_compile_is_the_candidate():
    found = search(replace(TRAIN, batches=(64,)))
    split = next(p for p in found.plans if p.candidate.accumulate == 2)
    spec = split.candidate.spec("llama3_8b")
    assert (spec.program, spec.batch_size, spec.accumulate) == ("train", 64, 2)
    assert spec.remat == split.candidate.profile.remat
    assert spec.seq_len == 4096
    served = search(replace(DECODE, goal="prefill-throughput", prompt=512)).plans[0].candidate
    spec = served.spec("llama3_8b")
    assert (spec.program, spec.prompt, spec.context) == ("prefill", 512, 4096)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (Ask("llama3_70b", ("v5e:1",), "decode-latency"),
         ["nothing fits; the nearest, v5e:1, one device, batch 1, int4, needs", "weights of the"]),
        (replace(DECODE, latency_s=1e-5),
         ["takes at most 10 us a step; the nearest, v6e:8, tensor=8, batch 1", "(projected)"]),
        (replace(TRAIN, batches=(17,)), ["--batch 17", "nearest that works is 1"]),
        (Ask("nano", ("v5e:4",), "decode-latency", formats=("int4_g128",)),
         ["no mesh is legal: blocks.", "128"]),
        (Ask("llama3_8b", ("8t:64",), "cost", program="train"), ["cost on 8t", "gives its price"]),
        (replace(TRAIN, latency_s=1.0), ["--latency-ms is for prefill and decode"]),
        (replace(TRAIN, formats=("int8",)), ["--format is for serving"]),
        (replace(DECODE, formats=("float32",)), ["float32", "16 bits"]),
        (replace(DECODE, formats=("int3",)), ["'int3'", "did you mean"]),
        (replace(DECODE, program="train"), ["decode-throughput is about decode, not train"]),
        (replace(DECODE, goal="speed"), ["unknown goal 'speed'", "cost"]),
        (replace(DECODE, chips=("v6e:512",)), ["v6e", "512", "pod"]),
        (replace(DECODE, chips=("v6e",)), ["how many chips"]),
        (replace(DECODE, chips=()), ["--chips names no chip"]),
        (replace(DECODE, batches=(0,)), ["--batch is 0"]),
        (replace(DECODE, context=10**6), ["context is 1000000"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_that_says_what_is_near(ask, words):
    with pytest.raises(UserError) as error:
        search(ask)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_every_goal_ranks_its_own_programs():
    profile = get_profile("v5e:4", "serve")
    one, two = (
        Plan(Candidate("decode", profile, batch, batch, 64), {"a": s}, {"x": 1.0}, 10)
        for batch, s in ((1, 0.001), (4, 0.002))
    )
    assert GOALS["decode-latency"].rank([two, one]) == [one, two]
    assert GOALS["decode-throughput"].rank([one, two]) == [two, one]
    assert GOALS["cost"].front([one, two]) == [two, one]


def test_what_is_shown_is_checked_with_the_planners_memory(train):
    """So `plan search` and `plan memory` say the same of it."""
    assert all(plan.checked for plan in train.front)
    assert all(plan.checked for plan in train.best[:8])
    plan = next(p for p in train.front if p.candidate.profile.remat != "none")
    verdict = Verdict.of(request_of(LLAMA, plan.candidate))
    assert verdict.fits
    assert plan.held_bytes == verdict.prediction.held_bytes
    assert plan.capacity == verdict.limit_bytes


def test_a_plan_that_is_too_large_after_all_is_left_out():
    question = DECODE.read()
    profile = question.profiles[0]
    rows = 4096  # of 4096 positions: half a gigabyte of cache a row, far more than there is
    large, small = (
        Plan(Candidate("decode", profile, n, n, 4096, format="int4"), {"a": s}, {"x": 1}, 2**35)
        for n, s in ((rows, 1.0), (1, 1.0))
    )
    left_out = []
    assert [p.candidate for p in settle(question, [large, small], 8, left_out.append)] == [
        small.candidate
    ]
    assert [plan.candidate for plan in left_out] == [large.candidate]
