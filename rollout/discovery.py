"""Where the replicas of engines are: at the addresses of the configuration, or of a name in DNS.

A url such as `dns+http://engine:8100` stands for as many replicas as its name has addresses, as
that of a headless Kubernetes service has one for each pod that is ready.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import replace
from typing import Final
from urllib.parse import urlsplit

from rollout.engines import DNS_SCHEME, Engine

_log = logging.getLogger(__name__)
_RESOLVE_SECONDS: Final = 5.0
_LOOKUP_SECONDS: Final = 5.0

Lookup = Callable[[str, int], Awaitable[Collection[str]]]


async def look_up(host: str, port: int) -> Collection[str]:
    """The addresses of a name, by the system's resolver. Raises OSError where it finds none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {str(address[0]) for *_, address in found}


class Discovery:
    """Knows the engines with addresses in place of names, and what it knew last where DNS fails.

    `seconds` is the pause between two questions. `on_failure` is called with an engine's name whenever one of its names could not be resolved.
    """

    def __init__(
        self,
        engines: Iterable[Engine],
        *,
        seconds: float = _RESOLVE_SECONDS,
        lookup: Lookup = look_up,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._configured = tuple(engines)
        self._seconds = seconds
        self._lookup = lookup
        self._on_failure = on_failure
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._failing: set[str] = set()
        self._configured_anew = asyncio.Event()
        self.engines = self._resolved()

    @property
    def unresolved(self) -> frozenset[str]:
        """Engines of which not all is known, because a name of theirs was never resolved."""
        return frozenset(
            engine.name
            for engine in self._configured
            if any(url not in self._addresses for url in _names(engine))
        )

    def configure(self, engines: Iterable[Engine], seconds: float = _RESOLVE_SECONDS) -> None:
        """These are the engines from now on; `follow` finds their replicas at once."""
        self._configured = tuple(engines)
        self._seconds = seconds
        self._configured_anew.set()

    async def refresh(self) -> bool:
        """Ask for every name once; whether `engines` are others than before."""
        before = self.engines
        self._configured_anew.clear()
        async with asyncio.TaskGroup() as tasks:
            for engine in self._configured:
                for url in _names(engine):
                    tasks.create_task(self._ask(engine, url))
        self.engines = self._resolved()
        return self.engines != before

    async def follow(self, on_change: Callable[[], None]) -> None:
        """Ask again each `seconds`, for ever, and tell of each change."""
        while True:
            if await self.refresh():
                on_change()
            try:
                async with asyncio.timeout(self._seconds):
                    await self._configured_anew.wait()
            except TimeoutError:
                continue

    async def _ask(self, engine: Engine, url: str) -> None:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        try:
            async with asyncio.timeout(_LOOKUP_SECONDS):
                found = await self._lookup(host, port)
        except (OSError, UnicodeError) as exc:
            self._failed(engine, url, str(exc) or f"no answer within {_LOOKUP_SECONDS:g} s")
            return
        if not found:
            self._failed(engine, url, "it has no address")
            return
        self._failing.discard(url)
        self._addresses[url] = tuple(_address(one, port, parts.path) for one in sorted(found))

    def _failed(self, engine: Engine, url: str, why: str) -> None:
        self._on_failure(engine.name)
        if url not in self._failing:
            self._failing.add(url)
            _log.warning(
                "cannot find the replicas of engine %s at %s: %s; going on with those known",
                engine.name,
                url,
                why,
            )

    def _resolved(self) -> tuple[Engine, ...]:
        return tuple(
            replace(engine, urls=tuple(dict.fromkeys(self._urls(engine))))
            for engine in self._configured
        )

    def _urls(self, engine: Engine) -> Iterable[str]:
        for url in engine.urls:
            if url.startswith(DNS_SCHEME):
                yield from self._addresses.get(url, ())
            else:
                yield url


def _names(engine: Engine) -> list[str]:
    return [url for url in engine.urls if url.startswith(DNS_SCHEME)]


def _address(address: str, port: int, path: str) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{port}{path}"
