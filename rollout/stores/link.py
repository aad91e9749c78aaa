"""The connection to Redis: three ways to speak to it, one place where its errors are translated."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from rollout.errors import ConfigError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from redis.asyncio.client import PubSub
    from redis.commands.core import AsyncScript

# A store that is silent for longer is treated as gone. Nothing on the data path waits for it.
TIMEOUT_SECONDS = 5.0
# Blocking reads are cut into pieces well under the socket's timeout.
BLOCK_SECONDS = 2.0


@contextmanager
def translated() -> "Iterator[None]":
    """Turn redis-py's errors into ours, and let no other escape unnamed.

    redis-py writes under `asyncio.wait_for`, which before Python 3.12 forgets a cancellation that
    arrives as the write is done. About half of those that meet a busy task would be lost, and the
    task would never end; so one that was asked for meanwhile is raised here, whatever else was.
    """
    cancellations = _cancellations()
    try:
        with _in_our_words():
            yield
    except Exception as exc:
        if _cancellations() > cancellations:
            raise asyncio.CancelledError from exc
        raise
    if _cancellations() > cancellations:
        raise asyncio.CancelledError


@contextmanager
def _in_our_words() -> "Iterator[None]":
    try:
        yield
    except (
        redis.exceptions.ConnectionError,
        redis.exceptions.TimeoutError,
        redis.exceptions.BusyLoadingError,
        redis.exceptions.ReadOnlyError,
        OSError,
    ) as exc:
        raise StoreUnavailableError(f"the store does not answer: {exc}") from exc
    except redis.exceptions.ResponseError as exc:
        if str(exc).startswith(("LOADING", "MISCONF", "MASTERDOWN", "READONLY", "OOM")):
            raise StoreUnavailableError(f"the store cannot work now: {exc}") from exc
        raise


def _cancellations() -> int:
    """How often the present task was asked to end."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


class RedisLink:
    """Commands go out as tuples, answers come back as redis-py parses them, strings decoded.

    A command may be sent twice where the connection broke before its answer; every write here is
    made so that the second one changes nothing.
    """

    def __init__(self, client: "Redis") -> None:
        self._client = client
        self._scripts: dict[str, AsyncScript] = {}

    async def run(self, *command: Any) -> Any:
        with translated():
            return await self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    async def run_all(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """All of them in one transaction; their answers in order."""
        with translated():
            async with self._client.pipeline(transaction=True) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return await pipeline.execute()

    async def script(self, name: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Run `lua/<name>.lua` as one atomic step."""
        script = self._scripts.get(name)
        if script is None:
            text = files("rollout.stores").joinpath("lua", f"{name}.lua").read_text("utf-8")
            script = self._scripts[name] = self._client.register_script(text)
        with translated():
            return await script(keys=list(keys), args=list(arguments))

    @asynccontextmanager
    async def subscribed(self, channel: str) -> "AsyncIterator[PubSub]":
        with translated():
            async with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:
                await pubsub.subscribe(channel)
                yield pubsub


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[RedisLink]:
    """Open a pool on `url`. It connects when first used, so a store that is down is no error."""
    try:
        client = Redis.from_url(
            url,
            decode_responses=True,
            protocol=2,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS / 2,
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), retries=1),
        )
    except ValueError as exc:
        raise ConfigError(
            f"{url!r} is no address of a store: write redis://HOST:PORT/DB ({exc})",
            param="store.url",
        ) from exc
    try:
        yield RedisLink(client)
    finally:
        await client.aclose()
