"""The client: errors keep their class, and progress survives a controller that restarts."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rollout.client import ControlClient
from rollout.errors import (
    AuthenticationError,
    InvalidInputError,
    NotFoundError,
    RefusedError,
    StaleRevisionError,
    UnavailableError,
)
from rollout.runs import RunEvent, TrainingRun
from rollout.stores import Stores
from tests.api.house import AT, furnish
from tests.api.live import LiveApi, live_api


@pytest.fixture
def api(redis_url: str) -> Iterator[LiveApi]:
    with live_api(redis_url) as live:
        live.with_stores(furnish)
        yield live


@pytest.fixture
def client(api: LiveApi) -> Iterator[ControlClient]:
    with ControlClient(api.url, api.key) as opened:
        yield opened


def test_an_error_arrives_as_the_class_that_was_raised(client: ControlClient) -> None:
    with pytest.raises(NotFoundError):
        client.rollout("none")
    with pytest.raises(RefusedError, match="nothing to hold"):
        client.change("triage", "hold", reason="")
    with pytest.raises(StaleRevisionError):
        client.change("triage", "hold", reason="", revision=99)
    with pytest.raises(InvalidInputError) as raised:
        client.put_route("new", {"engine": "main", "capture": 7})
    assert raised.value.param == "capture"


def test_a_wrong_key_says_where_to_put_another(api: LiveApi) -> None:
    with (
        ControlClient(api.url, "wrong") as stranger,
        pytest.raises(AuthenticationError, match="SLUICE_KEY"),
    ):
        stranger.routes()


class _SomethingElse(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status = 200 if "routes" in self.path else 404
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_something_else_at_the_url_is_told_apart() -> None:
    with HTTPServer(("127.0.0.1", 0), _SomethingElse) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with ControlClient(f"http://127.0.0.1:{server.server_port}", "key") as client:
                for call in (client.routes, client.keys):
                    with pytest.raises(UnavailableError, match="control API"):
                        call()
        finally:
            server.shutdown()
            thread.join()


def test_nobody_there_says_what_to_do() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with (
            ControlClient(url, "key") as client,
            pytest.raises(UnavailableError, match="sluice up"),
        ):
            client.routes()


def test_progress_is_followed_once_over_a_lost_connection(api: LiveApi) -> None:
    """A proxy that cuts the first stream after one event stands for a controller that restarts."""
    with ControlClient(api.url, api.key) as direct:
        run = direct.start_run("triage")
    api.with_stores(lambda stores: stores.runs.note(run.id, _event(1)))
    with (
        _Proxy(int(api.url.rpartition(":")[2])) as proxy,
        ControlClient(f"http://127.0.0.1:{proxy.port}", api.key) as client,
    ):
        items = client.follow_run(run.id)
        assert next(items) == _event(1)
        proxy.cut()
        api.with_stores(lambda stores: _finish(stores, run))
        rest = list(items)
    assert rest[0] == _event(2)
    assert isinstance(rest[1], TrainingRun)
    assert rest[1].state == "failed"
    assert len(rest) == 2


def _event(step: int) -> RunEvent:
    return RunEvent("training", f"step {step}", AT, done=step, total=2)


async def _finish(stores: Stores, run: TrainingRun) -> None:
    taken = await stores.runs.take("test", 30)
    assert taken is not None
    await stores.runs.note(run.id, _event(2))
    await stores.runs.update(replace(taken, state="failed", reason="the disk is full"))


class _Proxy:
    """Passes bytes on, until it cuts every connection that it has."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._writers: list[asyncio.StreamWriter] = []
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.port = 0

    def __enter__(self) -> "_Proxy":
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def cut(self) -> None:
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(10)

    async def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _close(self) -> None:
        self._server.close()
        await self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, upstream_writer]
        await asyncio.gather(
            _pump(reader, upstream_writer), _pump(upstream_reader, writer), return_exceptions=True
        )


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
    writer.close()
