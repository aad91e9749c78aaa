"""How long an engine's own queue is, as it says in its metrics, and which replicas are full."""

import asyncio
import re
from typing import Final

from gateway.errors import UpstreamError
from gateway.health import Fleet, Replica
from gateway.settings import AdmissionSection
from gateway.upstream import UpstreamPool

_WAITING: Final = re.compile(r"^vllm:num_requests_waiting(?:\{.*\})? (\S+)", re.MULTILINE)


def queue_length(metrics: str) -> float:
    """How many requests wait in a vLLM's own queue, by its /metrics."""
    return sum(float(found) for found in _WAITING.findall(metrics))


async def read_queue(pool: UpstreamPool, url: str, seconds: float) -> float:
    """Ask a replica; 0 where it doesn't tell, for one that is down fails the request itself."""
    try:
        async with (
            asyncio.timeout(seconds),
            pool.request(url, b"GET", b"/metrics") as response,
        ):
            text = b"".join([piece async for piece in response])
            return queue_length(text.decode(errors="replace")) if response.status == 200 else 0.0
    except (TimeoutError, UpstreamError, ValueError):
        return 0.0


async def watch(fleet: Fleet, pool: UpstreamPool, settings: AdmissionSection) -> None:
    """Look at every queue each `check_seconds`, for ever. Only vLLM's can be seen."""
    async with asyncio.TaskGroup() as tasks:
        for replica in fleet.replicas.values():
            if replica.engine.kind == "vllm":
                tasks.create_task(_watch_one(replica, pool, settings))


async def check(replica: Replica, pool: UpstreamPool, settings: AdmissionSection) -> None:
    waiting = await read_queue(pool, replica.url, settings.check_timeout_seconds)
    replica.full = waiting > settings.maximum_waiting


async def _watch_one(replica: Replica, pool: UpstreamPool, settings: AdmissionSection) -> None:
    while True:
        await check(replica, pool, settings)
        await asyncio.sleep(settings.check_seconds)
