"""The control API and the console behind a real socket, in a thread of their own."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import uvicorn

from rollout.api.app import create_app
from rollout.settings import Settings
from rollout.stores import Stores, open_stores
from tests.api.house import ADMIN, settings

T = TypeVar("T")
_START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class LiveApi:
    """`key` is an admin's."""

    url: str
    key: str
    store_url: str

    def with_stores(self, work: Callable[[Stores], Awaitable[T]]) -> T:
        """Do something with the stores, from a test that is not asynchronous."""

        async def run() -> T:
            async with open_stores(self.store_url) as stores:
                return await work(stores)

        return asyncio.run(run())


class _Server(uvicorn.Server):
    """Tells when it listens, and leaves the signals to the test run."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = threading.Event()
        self.port = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.port = self.servers[0].sockets[0].getsockname()[1]
        self.listens.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def live_api(store_url: str, here: Settings | None = None) -> Iterator[LiveApi]:
    server: list[_Server] = []
    made = threading.Event()

    async def serve() -> None:
        async with open_stores(store_url) as stores:
            app = create_app(stores, here or settings(), bootstrap_key=ADMIN)
            config = uvicorn.Config(
                app, host="127.0.0.1", port=0, log_config=None, ws="none", access_log=False,
                timeout_graceful_shutdown=1,
            )  # fmt: skip
            server.append(_Server(config))
            made.set()
            await server[0].serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        assert made.wait(_START_SECONDS)
        assert server[0].listens.wait(_START_SECONDS)
        yield LiveApi(f"http://127.0.0.1:{server[0].port}", ADMIN, store_url)
    finally:
        if server:
            server[0].should_exit = True
        thread.join(_START_SECONDS)
