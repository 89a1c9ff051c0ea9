"""`/metrics` and `/stats`: what was done is what is counted, and every server counts for itself."""

from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from running_server import serving, wait_until

GOOD: dict[str, Any] = {"model": "fake", "prompt": "the fox ", "max_tokens": 6, "temperature": 0}


def scrape(running) -> dict[str, float]:
    """Every sample by its name and labels."""
    text = httpx.get(f"{running.url}/metrics").text
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_was_done_is_counted(tokenizer):
    with serving(tokenizer) as running, serving(tokenizer) as idle:
        client = running.client()
        for _ in range(3):
            client.completions.create(**GOOD)
        client.completions.create(**GOOD, stop="fox")
        httpx.post(f"{running.url}/v1/completions", json=GOOD | {"model": "x"})
        httpx.get(f"{running.url}/nowhere")
        httpx.get(f"{running.url}/v1/models/fake")
        wait_until(lambda: not running.service.busy)
        found = scrape(running)
        size = len(tokenizer.encode("the fox "))
        assert found["tpu_stack_http_responses_total /v1/completions 200"] == 4
        assert found["tpu_stack_http_responses_total /v1/completions 404"] == 1
        assert found["tpu_stack_http_responses_total other 404"] == 1
        assert found["tpu_stack_http_responses_total /v1/models 200"] == 1
        assert found["tpu_stack_sequences_total length"] == 3
        assert found["tpu_stack_sequences_total stop"] == 1
        assert found["tpu_stack_prompt_tokens_total"] == 4 * size
        assert found["tpu_stack_generated_tokens_total"] >= 18
        assert found["tpu_stack_recompilations_total"] == 0
        assert found["tpu_stack_time_to_first_token_seconds_count"] == 4
        assert found["tpu_stack_sequence_duration_seconds_count"] == 4
        assert found["tpu_stack_time_per_output_token_seconds_count"] == 4
        assert found["tpu_stack_queue_requests"] == found["tpu_stack_running_requests"] == 0
        assert found["tpu_stack_batch_occupancy_ratio"] == 0
        pages = {state: found[f"tpu_stack_cache_pages {state}"] for state in ("used", "free")}
        assert pages == {"used": 0, "free": 90}
        assert found["tpu_stack_cache_pages cached"] == 10
        assert scrape(idle)["tpu_stack_time_to_first_token_seconds_count"] == 0


def test_every_metric_has_a_help_text_and_seconds_are_called_so(tokenizer):
    with serving(tokenizer) as running:
        text = httpx.get(f"{running.url}/metrics").text
    families = list(text_string_to_metric_families(text))
    assert len(families) > 15
    for family in families:
        assert family.documentation.endswith(".")
        assert family.name.startswith("tpu_stack_")
        if "seconds" in family.name:
            assert "seconds" in family.documentation.lower()


def test_stats_for_the_page(tokenizer):
    with serving(tokenizer) as running:
        empty = httpx.get(f"{running.url}/stats").json()
        assert empty["ttft_s"] is None
        running.client().completions.create(**GOOD)
        found = httpx.get(f"{running.url}/stats").json()
        assert 0 < found["ttft_s"]["p50"] <= found["ttft_s"]["p99"] < 10
        assert found["tpot_s"]["p50"] >= 0
        assert found["new_tokens"] - empty["new_tokens"] == 6
        assert found["cache_pages"] == {"used": 0, "cached": 10, "free": 90}
        assert found["model"] == "fake"
        assert found["engine"]["format"] == "fake"
