"""HBM bandwidth: counted against a sum made by hand."""

import dataclasses

import pytest

from tpu_stack.models.presets import get_preset
from tpu_stack.serving.bench.bandwidth import hbm_utilisation, moved_bytes
from tpu_stack.serving.bench.measure import Outcome, Timing
from tpu_stack.serving.requests import GenerationRequest
from tpu_stack.serving.service import Stats
from tpu_stack.sharding.profiles import get_profile

CONFIG = get_preset("llama3_8b")


def outcome(seconds: float = 1.0) -> Outcome:
    """Two prefills and five decode steps; one answer of 3 tokens on 10, one of 2 on 20."""
    timings = [
        Timing(GenerationRequest((1,) * 10, 3), 0.0, [0.1, 0.2, 0.3]),
        Timing(GenerationRequest((1,) * 20, 2), 0.0, [0.1, 0.2]),
    ]
    before, after = Stats(decode_steps=7, prefill_steps=1), Stats(decode_steps=12, prefill_steps=3)
    return Outcome(timings, seconds, 0, before, after)


def by_hand(tensor: int) -> int:
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14_336)
    # int8, one float32 scale per output column; norms and nothing else in bfloat16
    columns = 4096 + 2 * 1024 + 4096 + 2 * 14_336 + 4096
    split = columns - 2 * 4096  # those of wo and w_down are whole on every device
    scales = 4 * (split // tensor + 2 * 4096)
    norms = 2 * (2 * 4096 * 32 + 4096)
    unembed = 4096 * 128_256 + 4 * 128_256
    weights = 32 * (layer // tensor + scales) + norms + unembed // tensor
    context = (10 + 1) + (10 + 2) + (20 + 1)
    return 7 * weights + context * 2 * 32 * (8 // tensor) * 128 * 2


@pytest.mark.parametrize("tensor", [1, 4])
def test_the_bytes_are_those_of_the_sum_by_hand(tensor):
    profile = get_profile(f"v6e:{tensor}", "serve")
    profile = profile.with_mesh(f"data=1,tensor={tensor}")
    assert moved_bytes(outcome(), CONFIG, "int8", profile) == by_hand(tensor)


def test_the_share_is_of_one_devices_peak():
    profile = get_profile("v6e:1x1", "serve").with_mesh("data=1,tensor=1")
    used = hbm_utilisation(outcome(2.0), CONFIG, "int8", profile)
    assert used == pytest.approx(by_hand(1) / (2.0 * 1.64e12), rel=0.01)


def test_nothing_is_said_where_the_chip_is_emulated_or_the_model_a_mixture():
    profile = get_profile("v6e:1x1", "serve").with_mesh("data=1,tensor=1")
    emulated = dataclasses.replace(profile, emulated=True)
    assert hbm_utilisation(outcome(), CONFIG, "int8", emulated) is None
    assert hbm_utilisation(outcome(), get_preset("mixtral_8x7b"), "int8", profile) is None
