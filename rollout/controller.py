"""The controller: serves the control API and, where it leads, runs the loops (rollout/loops.py).

    python -m rollout.controller --config sluice.toml

Any number of them may run. All answer the API; the one that holds the lease judges and commits.
"""

import argparse
import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

import httpx2
import uvicorn
import uvloop
from prometheus_client import CollectorRegistry

from rollout.api.app import create_app
from rollout.errors import ConfigError, SluiceError
from rollout.loops import Controller
from rollout.metrics import ControllerMetrics
from rollout.settings import Settings, bootstrap_key, load_settings
from rollout.stores import open_stores

log = logging.getLogger("rollout.controller")

# Open event streams of the API are cut off after this long, so that a stop is not a hang.
_CLOSE_SECONDS = 5


async def serve(settings: Settings, bootstrap: str | None) -> None:
    """Run the role until SIGTERM or SIGINT."""
    _check_engines(settings)
    listener = _listen(settings.controller.host, settings.controller.port)
    collect_seldom()
    registry = CollectorRegistry()
    metrics = ControllerMetrics(registry)
    async with (
        open_stores(settings.store_url) as stores,
        httpx2.AsyncClient(trust_env=False) as client,
        asyncio.TaskGroup() as tasks,
    ):
        app = create_app(stores, settings, bootstrap_key=bootstrap, registry=registry)
        server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
        controller = Controller(stores, client, settings, metrics, bootstrap=bootstrap)
        loops = tasks.create_task(controller.run())
        host, port = listener.getsockname()[:2]
        log.info("control API and console on http://%s:%d", host, port)
        await server.serve(sockets=[listener])
        loops.cancel()
    log.info("stopped")


def collect_seldom() -> None:
    """Let the garbage collector be: with many routes a tick reads objects by the ten thousand, and
    looking through them again and again would cost as much as all else."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sluice controller", description="the control plane")
    parser.add_argument("--config", type=Path, help="sluice.toml; else SLUICE_CONFIG")
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s controller: %(message)s"
    )
    # Each request to an engine would be a line.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        settings = load_settings(options.config)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings, bootstrap_key()))
    except SluiceError as exc:
        sys.stderr.write(f"sluice controller: {exc.message}\n")
        return 1
    return 0


class _Server(uvicorn.Server):
    """Leaves the signals to us: uvicorn would raise them again before the lease is given back."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def stop(self) -> None:
        """The second time, without waiting for open requests."""
        self.force_exit = self.should_exit
        self.should_exit = True


def _check_engines(settings: Settings) -> None:
    engines = {engine.name for engine in settings.engine_list()}
    for route in settings.route_list():
        if route.engine not in engines:
            raise ConfigError(
                f"route {route.name!r} is on engine {route.engine!r}, and no engine is configured "
                "under that name: add it under [[engines]], or start everything with `sluice up`",
                param="routes.engine",
            )


def _listen(host: str, port: int) -> socket.socket:
    """Bind before anything else is started, so that a port in use leaves nothing half-done."""
    try:
        return socket.create_server((host, port), backlog=256)
    except OSError as exc:
        hint = (
            "another program has it: stop that one, or set another `port` under [controller]"
            if exc.errno == errno.EADDRINUSE
            else "set another `host` or `port` under [controller]"
        )
        raise ConfigError(
            f"cannot listen on {host}:{port} ({exc.strerror or exc}); {hint}", param="controller"
        ) from exc


if __name__ == "__main__":
    sys.exit(main())
