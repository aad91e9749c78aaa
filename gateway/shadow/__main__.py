"""Starts a shadow process: `python -m gateway.shadow --config FILE`."""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import start_http_server

from gateway.settings import GatewaySettings
from gateway.shadow.fleet import Fleet, pool_limits
from gateway.shadow.metrics import ShadowMetrics
from gateway.shadow.replaying import Replayer
from gateway.shadow.settings import ShadowSettings
from gateway.shadow.worker import ShadowWorker
from gateway.upstream import UpstreamPool
from rollout.errors import ConfigError
from rollout.redaction import Redactor
from rollout.settings import Settings, check_section, load_settings
from rollout.stores import Keeping, open_stores

log = logging.getLogger("gateway.shadow")


def main() -> None:
    parser = argparse.ArgumentParser(prog="sluice shadow", description=__doc__)
    parser.add_argument("--config", type=Path, help="the configuration file (sluice.toml)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s shadow %(levelname)s %(message)s")
    try:
        asyncio.run(run(load_settings(arguments.config)))
    except ConfigError as exc:
        sys.exit(f"sluice shadow: {exc.message}")


async def run(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT."""
    section = check_section(ShadowSettings, settings.shadow, "shadow")
    # What the gateways take out of the captured answers is taken out of the others too.
    own = check_section(GatewaySettings, settings.gateway, "gateway")
    metrics = ShadowMetrics()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    keeping = Keeping(settings.store.captures, settings.store.captures_hours)
    async with (
        open_stores(settings.store_url, keeping) as stores,
        UpstreamPool(pool_limits(section)) as pool,
    ):
        fleet = Fleet(stores.catalog, settings.engine_list(), pool, section)
        consumer = f"{socket.gethostname()}-{os.getpid()}"
        redactor = Redactor(**dict(own.capture.redaction))
        worker = ShadowWorker(stores.captures, fleet, metrics, section, redactor, consumer)
        replayer = Replayer(
            stores, fleet, metrics, section, redactor, consumer, lambda: worker.busy
        )
        with _exposed(metrics, section):
            log.info("the shadow takes exchanges as %s", consumer)
            async with asyncio.TaskGroup() as group:
                replaying = group.create_task(replayer.run())
                await worker.run(stop)
                replaying.cancel()
    log.info("the shadow has stopped")


@contextmanager
def _exposed(metrics: ShadowMetrics, section: ShadowSettings) -> Iterator[None]:
    if section.metrics_port == 0:
        yield
        return
    try:
        server, thread = start_http_server(
            section.metrics_port, section.metrics_host, metrics.registry
        )
    except OSError as exc:
        raise ConfigError(
            f"cannot listen on {section.metrics_host}:{section.metrics_port} for metrics: "
            f"{exc.strerror or exc}; set another metrics_port under [shadow], or 0 for none",
            param="shadow.metrics_port",
        ) from exc
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    main()
