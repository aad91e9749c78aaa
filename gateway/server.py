"""uvicorn as the gateway runs it: one worker's server, and how it drains."""

import asyncio
import signal
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Final, cast

import uvicorn

from gateway.app import Gateway
from gateway.protocol import ClientProtocol
from gateway.settings import GatewaySettings
from rollout.settings import Settings

# After the drain nothing is under way any more, or has had its time.
_LAST_SECONDS: Final = 1
_TICKS_A_SECOND: Final = 10

Read = Callable[[], Settings]


class GatewayServer(uvicorn.Server):
    """Keeps listening while it drains, so that /readyz can say so."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, read: Read | None) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._read = read
        self._drained_ticks = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._read is not None:
            reload = partial(self._gateway.reload, self._read)
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
            # Until here it waited.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's own name
        if self._gateway.draining and sig == signal.SIGINT:
            self.force_exit = True
            self.should_exit = True
        self._gateway.drain()

    async def on_tick(self, counter: int) -> bool:
        if self._gateway.draining:
            self._drained_ticks += 1
            seconds = self._drained_ticks / _TICKS_A_SECOND
            if seconds > self._gateway.own.notice_seconds:
                self._gateway.refuse_new()
            if self._gateway.inflight == 0 or seconds > self._gateway.own.drain_seconds:
                self.should_exit = True
        return await super().on_tick(counter)


def server_for(gateway: Gateway, own: GatewaySettings, read: Read | None = None) -> GatewayServer:
    """`read` gives the configuration as it is then, after each SIGHUP; without it none is taken."""
    config = uvicorn.Config(
        gateway,
        loop="uvloop",
        # uvicorn calls it for each connection, whatever it is.
        http=cast(
            type[asyncio.Protocol],
            partial(ClientProtocol, direct=gateway.take, stall_seconds=own.stall_seconds),
        ),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=own.backlog,
        timeout_keep_alive=own.keep_alive_seconds,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    return GatewayServer(config, gateway, read)
