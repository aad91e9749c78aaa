"""What tests run against is real: the engine, its adapters, the store, the browser."""

import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import redis
from selenium.webdriver import Chrome

from tests.engines import VllmServer


def post(url: str, body: Mapping[str, Any]) -> bytes:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        content: bytes = answer.read()
        return content


def ask(engine: VllmServer, name: str) -> str:
    message = {"role": "user", "content": "Tell me about a lake."}
    body = {"model": name, "messages": [message], "max_tokens": 16, "temperature": 0}
    answer = json.loads(post(f"{engine.url}/v1/chat/completions", body))
    content: str = answer["choices"][0]["message"]["content"]
    return content


@pytest.mark.vllm
def test_both_adapters_answer_otherwise_than_the_base(
    vllm_engine: VllmServer, tiny_adapters: Mapping[str, Path]
) -> None:
    for name, path in tiny_adapters.items():
        post(
            f"{vllm_engine.url}/v1/load_lora_adapter",
            {"lora_name": f"probe-{name}", "lora_path": str(path)},
        )
    try:
        answers = {
            ask(vllm_engine, name)
            for name in (vllm_engine.base, *map("probe-{}".format, tiny_adapters))
        }
    finally:
        for name in tiny_adapters:
            post(f"{vllm_engine.url}/v1/unload_lora_adapter", {"lora_name": f"probe-{name}"})

    assert len(answers) == 3


@pytest.mark.parametrize("turn", ["first", "second"])
def test_a_database_is_empty_whatever_a_test_before_left(redis_url: str, turn: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left", turn)


@pytest.mark.browser
def test_the_browser_shows_a_page(browser: Chrome, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<h1>Cases</h1>")

    browser.get(page.as_uri())

    assert browser.find_element("tag name", "h1").text == "Cases"
