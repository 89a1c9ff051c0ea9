"""`/v1/completions` through OpenAI's client: what is asked is what the engine is told, and back."""

import openai
import pytest
from running_server import wait_until

PROMPT = "the lazy dog jumps. "


@pytest.fixture
def complete(shared):
    client = shared.client()

    def ask(prompt=PROMPT, **options):
        options = {"temperature": 0, "max_tokens": 8} | options
        return client.completions.create(model="fake", prompt=prompt, **options)

    return ask


def said(tokenizer, prompt: str, tokens: int) -> str:
    ids = tokenizer.encode(prompt)
    return tokenizer.decode([ids[at % len(ids)] for at in range(tokens)])


def test_a_completion_and_its_usage(complete, tokenizer):
    found = complete()
    (choice,) = found.choices
    assert choice.text == said(tokenizer, PROMPT, 8)
    assert choice.finish_reason == "length"
    assert (found.object, found.model) == ("text_completion", "fake")
    size = len(tokenizer.encode(PROMPT))
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (size, 8)
    assert found.usage.total_tokens == size + 8
    assert found.usage.prompt_tokens_details.cached_tokens == size // 16 * 16


def test_every_kind_of_prompt(complete, tokenizer):
    ids = tokenizer.encode(PROMPT)
    text = said(tokenizer, PROMPT, 8)
    assert complete(ids).choices[0].text == text
    assert complete([PROMPT, "dog"]).choices[0].text == text
    both = complete([ids, ids[:3]]).choices
    assert [choice.index for choice in both] == [0, 1]
    assert both[1].text == tokenizer.decode([ids[at % 3] for at in range(8)])


def test_n_choices_have_seeds_of_their_own_and_the_prompt_counts_once(complete, tokenizer):
    found = complete(n=3, temperature=1, seed=0)
    ids = tokenizer.encode(PROMPT)
    expected = [tokenizer.decode((ids * 4)[at : at + 8]) for at in range(3)]
    assert [choice.text for choice in found.choices] == expected
    assert found.usage.prompt_tokens == len(ids)
    assert found.usage.completion_tokens == 24


def test_parameters_reach_the_engine(complete, shared):
    complete(
        temperature=0.5, top_p=0.25, seed=-1, presence_penalty=1, frequency_penalty=-1,
        logit_bias={"7": -100}, user="ann",
        extra_body={
            "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "priority": -3, "deadline_s": 9,
        },
    )  # fmt: skip
    request = shared.service.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.25, 2**32 - 1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert dict(sampling.logit_bias) == {7: -100}
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.2)
    assert (request.client, request.priority, request.deadline_s) == ("ann", -3, 9)
    complete(temperature=openai.omit, max_tokens=openai.omit)
    request = shared.service.requests[-1]
    assert (request.sampling.temperature, request.max_tokens) == (1.0, 16)


def test_echo(complete, tokenizer):
    whole = complete(echo=True).choices[0].text
    assert whole == PROMPT + said(tokenizer, PROMPT, 8)
    chunks = complete(echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole


@pytest.mark.parametrize("stop", ["dog", ["zebra", "dog jumps"], ["y dog", "dog"]])
def test_a_stop_string_ends_the_text_before_it(complete, shared, stop):
    expected = PROMPT[: min(PROMPT.find(s) for s in ([stop] if isinstance(stop, str) else stop)
                            if s in PROMPT)]  # fmt: skip
    found = complete(stop=stop, max_tokens=60)
    assert found.choices[0].text == expected
    assert found.choices[0].finish_reason == "stop"
    chunks = list(complete(stop=stop, max_tokens=60, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"
    wait_until(lambda: shared.service.busy == 0)


def test_a_stream_ends_in_usage_where_asked(complete, tokenizer):
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert "".join(part.choices[0].text for part in parts) == said(tokenizer, PROMPT, 8)
    assert [part.usage for part in parts] == [None] * len(parts)
    assert last.choices == []
    assert last.usage.completion_tokens == 8
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_choices_stream_side_by_side(complete):
    texts = {0: "", 1: "", 2: "", 3: ""}
    ends = {}
    options = {"n": 2, "temperature": 1, "seed": 5, "stream": True}
    for chunk in complete([PROMPT, "fox fox "], **options):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    whole = complete([PROMPT, "fox fox "], **options | {"stream": False})
    assert list(texts.values()) == [choice.text for choice in whole.choices]
    assert set(ends.values()) == {"length"}


def test_legacy_logprobs(complete, tokenizer):
    found = complete(logprobs=2, max_tokens=4).choices[0]
    given = found.logprobs
    assert "".join(given.tokens) == found.text
    assert given.token_logprobs == [-0.5] * 4
    assert all(1 <= len(ranked) <= 3 for ranked in given.top_logprobs)
    starts = [sum(map(len, given.tokens[:at])) for at in range(4)]
    assert given.text_offset == starts
    streamed = [chunk.choices[0] for chunk in complete(logprobs=2, max_tokens=4, stream=True)]
    tokens = [token for part in streamed if part.logprobs for token in part.logprobs.tokens]
    assert tokens == given.tokens
    none_ranked = complete(logprobs=0, max_tokens=4).choices[0].logprobs
    assert none_ranked.top_logprobs is None
    assert none_ranked.tokens == given.tokens


def test_logprobs_end_where_the_text_is_cut(complete):
    """The last token may begin before the cut, as " dog" does; none lies behind it."""
    given = complete(logprobs=1, stop="dog", max_tokens=60).choices[0]
    assert given.text == "the lazy "
    assert "".join(given.logprobs.tokens).startswith(given.text)
    assert max(given.logprobs.text_offset) < len(given.text)


def test_models(shared):
    client = shared.client()
    (model,) = client.models.list().data
    assert model.id == "fake"
    assert client.models.retrieve("fake").owned_by == "tpu-stack"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-4")
    assert refused.value.code == "model_not_found"
