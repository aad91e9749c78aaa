"""Every feature of the engine through the gateway, asked for with the official client."""

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.loop.conftest import ROUTE
from tests.system import RunningSluice, eventually

pytestmark = pytest.mark.vllm
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Is it good?"}]
SCHEMA = {
    "type": "object",
    "properties": {"good": {"enum": ["yes", "no"]}},
    "required": ["good"],
    "additionalProperties": False,
}
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "rate", "parameters": SCHEMA},
}


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        model=ROUTE, messages=MESSAGES, **({"max_tokens": 6, "temperature": 0} | options)
    )


def test_several_answers_with_their_probabilities(client: openai.OpenAI) -> None:
    answer = chat(client, n=3, temperature=1, logprobs=True, top_logprobs=2, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert all(len(token.top_logprobs) >= 2 for token in choice.logprobs.content)


def test_a_seed_says_the_same_again(client: openai.OpenAI) -> None:
    options = {"temperature": 1, "seed": 7, "max_tokens": 12}
    texts = {chat(client, **options).choices[0].message.content for _ in range(3)}
    assert len(texts) == 1


def test_a_stop_stops(client: openai.OpenAI) -> None:
    text = chat(client, max_tokens=12).choices[0].message.content
    assert text
    mark = text[len(text) // 2 :][:3]
    stopped = chat(client, max_tokens=12, stop=[mark]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == text[: text.index(mark)]


def test_a_schema_is_kept_to(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    answer = chat(client, response_format=form, max_tokens=40)
    assert json.loads(answer.choices[0].message.content)["good"] in ("yes", "no")


def test_what_only_the_engine_knows_reaches_it(client: openai.OpenAI) -> None:
    answer = chat(client, extra_body={"structured_outputs": {"choice": ["good", "bad"]}})
    assert answer.choices[0].message.content in ("good", "bad")
    long = chat(client, max_tokens=20, extra_body={"ignore_eos": True, "top_k": 5})
    assert long.usage.completion_tokens == 20


def test_a_tool_is_called_whole_and_streamed(client: openai.OpenAI) -> None:
    options = {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "rate"}},
        "max_tokens": 60,
    }
    whole = chat(client, **options).choices[0].message.tool_calls[0].function
    assert whole.name == "rate"
    calls = [
        call.function
        for chunk in chat(client, stream=True, **options)
        for choice in chunk.choices
        for call in choice.delta.tool_calls or ()
    ]
    assert calls[0].name == "rate"
    # Its numbers are written anew in a whole answer, so the two need not be the same.
    assert "".join(call.arguments or "" for call in calls)
    assert whole.arguments


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=12).choices[0].message.content
    chunks = list(chat(client, max_tokens=12, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


@pytest.mark.parametrize("every", [False, True])
def test_usage_on_a_stream_is_where_it_was_asked_for(client: openai.OpenAI, every: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": every}
    chunks = list(chat(client, stream=True, stream_options=options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6
    assert all((chunk.usage is not None) == every for chunk in chunks[:-1])


def test_usage_in_every_chunk_is_not_had_by_half_asking(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True, stream_options={"continuous_usage_stats": True}))
    assert all(chunk.usage is None for chunk in chunks)


def test_completions_take_several_prompts(client: openai.OpenAI) -> None:
    # No `echo` together with `logprobs`: of that this engine dies.
    answer = client.completions.create(
        model=f"{ROUTE}@1", prompt=["One", "Two"], max_tokens=3, n=2, logprobs=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    echoed = client.completions.create(model=ROUTE, prompt="One", max_tokens=3, echo=True)
    assert echoed.choices[0].text.startswith("One")


def test_responses_answer_whole_and_streamed(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": ROUTE, "input": "Hi", "max_output_tokens": 16}
    whole = client.responses.create(temperature=0, **options)
    assert whole.object == "response"
    assert whole.usage is not None
    events = list(client.responses.create(stream=True, **options))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")


def test_the_engines_own_refusal_is_passed_on(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(client, temperature=-5)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        chat(client, max_tokens=10_000_000)


def test_two_requests_of_one_name_do_not_meet(client: openai.OpenAI) -> None:
    options = {"extra_headers": {"x-request-id": "same"}, "stream": True, "max_tokens": 20}
    one, other = chat(client, **options), chat(client, **options)
    next(iter(one))
    one.close()
    assert list(other)[-1].choices[0].finish_reason is not None


def test_its_usage_is_counted(client: openai.OpenAI, running_sluice: RunningSluice) -> None:
    """On streams too, whose client has not asked for it."""

    def value(name: str) -> float:
        with openai.OpenAI(base_url=running_sluice.gateway_url, api_key="none") as plain:
            text = plain.get("/metrics", cast_to=str)
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def counted() -> float:
        return value(f'sluice_tokens_total{{kind="completion",route="{ROUTE}"}}')

    # What a test before this one left is counted too, and an answer after its client has it.
    eventually(lambda: value("sluice_inflight") == 0, what="the end of all other requests")
    before = counted()
    list(chat(client, stream=True, max_tokens=9, extra_body={"ignore_eos": True}))
    chat(client, max_tokens=5, extra_body={"ignore_eos": True})
    eventually(lambda: counted() - before == 14, what="a count of 14 tokens")
