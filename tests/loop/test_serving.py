"""An application changes its address and key, and nothing else."""

import json
import urllib.request

import openai
import pytest

from tests.loop.conftest import ROUTE
from tests.system import RunningSluice

pytestmark = pytest.mark.vllm
QUESTION = [{"role": "user", "content": "It broke on day one."}]


def test_a_route_answers_and_says_who_did(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=ROUTE,
        messages=QUESTION,  # type: ignore[arg-type]
        max_tokens=5,
    )
    answer = raw.parse()
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    assert raw.headers["x-sluice-route"] == ROUTE
    assert raw.headers["x-sluice-version"].startswith(f"{ROUTE}@")
    assert raw.headers["x-sluice-arm"] == "stable"
    assert raw.headers["x-request-id"]


def test_a_stream_gives_the_same_text_as_a_whole_answer(client: openai.OpenAI) -> None:
    options = {"model": ROUTE, "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**options)  # type: ignore[call-overload]
    stream = client.chat.completions.create(**options, stream=True)  # type: ignore[call-overload]
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].message.content


def test_a_pinned_version_answers_as_itself(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=f"{ROUTE}@1",
        messages=QUESTION,  # type: ignore[arg-type]
        max_tokens=2,
    )
    assert raw.headers["x-sluice-version"] == f"{ROUTE}@1"
    assert raw.headers["x-sluice-arm"] == "pinned"


def test_routes_and_pinned_versions_are_listed(client: openai.OpenAI) -> None:
    names = {model.id for model in client.models.list()}
    assert {ROUTE, f"{ROUTE}@1"} <= names
    assert client.models.retrieve(ROUTE).id == ROUTE


def test_a_wrong_key_is_refused(running_sluice: RunningSluice) -> None:
    stranger = openai.OpenAI(
        base_url=f"{running_sluice.gateway_url}/v1", api_key="sk-nobody", max_retries=0
    )
    with stranger, pytest.raises(openai.AuthenticationError) as refused:
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="nobody", messages=QUESTION)  # type: ignore[arg-type]
    assert refused.value.code == "model_not_found"
    assert refused.value.param == "model"


def test_malformed_json_is_a_clear_error(running_sluice: RunningSluice) -> None:
    request = urllib.request.Request(
        f"{running_sluice.gateway_url}/v1/chat/completions",
        data=b'{"model": "review-triage", ',
        headers={"authorization": f"Bearer {running_sluice.key}"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 400
    error = json.load(refused.value)["error"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
