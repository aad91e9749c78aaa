"""How long an engine's own queue is, as it says in its metrics."""

import asyncio
import re
from typing import Final

from gateway.errors import UpstreamError
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
