"""Prompts are compared with the engine's before training, where the engine can be asked."""

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from rollout.errors import UnservableError
from trainer.parity import Asked, check_serving
from trainer.rendering import render_prompt

MESSAGES = [{"role": "user", "content": "red or blue?"}]


class Engine(HTTPServer):
    """Renders prompts as vLLM does: behind a key, at /tokenize."""

    def __init__(self, tokenizer: Any, extra: Sequence[int] = (), status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokenizer, self.extra, self.status = tokenizer, list(extra), status
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Engine

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        allowed = self.headers["authorization"] == "Bearer secret"
        ids = render_prompt(self.server.tokenizer, body["messages"], body.get("tools"))
        answer = json.dumps({"tokens": [*ids, *self.server.extra]}).encode()
        self.send_response(self.server.status if allowed else 401)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def engine(tokenizer: Any) -> Iterator[Engine]:
    with Engine(tokenizer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def asked(tokenizer: Any) -> Asked:
    return Asked("c1", MESSAGES, render_prompt(tokenizer, MESSAGES))


def test_an_engine_with_the_same_template_is_fine(engine: Engine, asked: Asked) -> None:
    assert check_serving(engine.url, "secret", "tiny", [asked, asked]) is None
    assert [each["model"] for each in engine.asked] == ["tiny", "tiny"]


def test_an_engine_that_renders_other_tokens_refuses_the_run(engine: Engine, asked: Asked) -> None:
    engine.extra = [7]
    place = len(asked.ids) + 1
    with pytest.raises(UnservableError, match=f"case c1: .* differ from token {place} on"):
        check_serving(engine.url, "secret", "tiny", [asked])


def test_an_engine_that_cannot_be_asked_is_no_reason_to_refuse(
    engine: Engine, asked: Asked
) -> None:
    assert "answers 401" in (check_serving(engine.url, "wrong", "tiny", [asked]) or "")
    engine.status = 404
    assert "answers 404" in (check_serving(engine.url, "secret", "tiny", [asked]) or "")
    assert "does not answer" in (check_serving("http://127.0.0.1:9", None, "tiny", [asked]) or "")
    assert "does not answer" in (check_serving("dns+http://engine:8100", None, "t", [asked]) or "")
