"""The engines as the shadow sees them: which version is where, where there is room, and asking."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from gateway.answers import answer_from_body
from gateway.errors import UpstreamError
from gateway.queues import read_queue
from gateway.routing import View, index
from gateway.settings import UpstreamSection
from gateway.shadow.pairing import roomiest
from gateway.shadow.settings import ShadowSettings
from gateway.upstream import UpstreamPool
from rollout.catalog import Catalog
from rollout.discovery import Discovery
from rollout.engines import Engine
from rollout.errors import StoreUnavailableError
from rollout.exchanges import Answer
from rollout.stores.catalog import CatalogStore
from rollout.versions import Version

log = logging.getLogger(__name__)

_METRICS_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Model:
    """What an engine calls a model, and the replicas to ask for it."""

    engine: Engine
    name: str
    urls: Sequence[str]


class Fleet:
    """Knows the store's catalog and the engines' queues, and sends requests to the engines.

    It speaks to the engines directly. A request of the shadow never passes a gateway, so it can't
    be billed, limited, captured or shadowed again.
    """

    def __init__(
        self,
        store: CatalogStore,
        engines: Sequence[Engine],
        pool: UpstreamPool,
        settings: ShadowSettings,
    ) -> None:
        self.catalog = Catalog(revision=-1)
        self._view = View()
        self._store = store
        self._discovery = Discovery(engines)
        self._engines = {engine.name: engine for engine in self._discovery.engines}
        self._pool = pool
        self._settings = settings
        self._waiting: dict[str, float] = {}
        self._asking: Counter[str] = Counter()
        self._changed = asyncio.Event()

    async def refresh(self) -> None:
        """Load the catalog where the store has another than ours."""
        if await self._store.revision() != self.catalog.revision:
            self.catalog = await self._store.load()
            self._view = index(self.catalog, self._engines)
            self._tell()

    async def follow(self) -> None:
        """Keep the replicas, the catalog and the lengths of the queues fresh, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._discovery.follow(self._move))
            tasks.create_task(self._poll())

    async def _poll(self) -> None:
        while True:
            try:
                await self.refresh()
                await self._read_queues()
            except StoreUnavailableError as exc:
                log.warning("%s; the shadow goes on with what it knows", exc)
            except Exception:
                log.exception("the shadow goes on with what it knows")
            await asyncio.sleep(self._settings.poll_seconds)

    def replica(self, version: Version) -> str | None:
        """The replica to ask for a version now, if there is one."""
        return self.roomiest(self._serving(version))

    def hindrance(self, version: Version) -> Literal["not_resident", "busy"]:
        """Why there is none."""
        return "busy" if self._serving(version) else "not_resident"

    def tells_probabilities(self, version: Version) -> bool:
        """Whether its engine surely answers a chat with the probabilities of its tokens."""
        engine = self._engines.get(version.engine)
        return engine is not None and engine.kind == "vllm"

    @property
    def full(self) -> bool:
        """Whether live traffic fills every replica there is."""
        urls = self._urls
        return bool(urls) and self.roomiest(urls) is None

    async def change(self) -> None:
        """Return when there is another catalog, or another length of a queue."""
        await self._changed.wait()

    async def ask(self, version: Version, url: str, path: str, body: bytes) -> Answer:
        """The version's answer; one of status 0 where the engine gave none."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            status, data = await self.send(self._engines[version.engine], url, path, body)
        except UpstreamError as exc:
            return Answer(version.number, 0, error=exc.message)
        seconds = loop.time() - started
        return answer_from_body(version.number, status, data, total_seconds=seconds)

    def model(self, engine: str, name: str | None) -> Model | None:
        """A model that an engine serves: under a name of its own, its base, or a version's."""
        if name is not None and (version := self.catalog.versions.get(name)) is not None:
            found = self._engines.get(version.engine)
            return Model(found, version.served_name, self._serving(version)) if found else None
        found = self._engines.get(engine)
        return Model(found, name or found.base, found.urls) if found else None

    async def send(self, engine: Engine, url: str, path: str, body: bytes) -> tuple[int, bytes]:
        """The status and body of an answer. Raises UpstreamError where there is none."""
        headers = [(b"content-type", b"application/json")]
        if engine.api_key:
            headers.append((b"authorization", f"Bearer {engine.api_key}".encode()))
        self._asking[url] += 1
        try:
            async with self._pool.request(url, b"POST", path.encode(), headers, body) as response:
                return response.status, b"".join([piece async for piece in response])
        finally:
            self._asking[url] -= 1

    def roomiest(self, urls: Sequence[str]) -> str | None:
        """The replica with the most room beside its live traffic; None where none has any."""
        return roomiest(urls, self._waiting, self._asking, self._settings.maximum_waiting)

    def _move(self) -> None:
        """The engines have other replicas than before."""
        self._engines = {engine.name: engine for engine in self._discovery.engines}
        self._view = index(self.catalog, self._engines)
        self._tell()

    def _serving(self, version: Version) -> Sequence[str]:
        lane = self._view.lanes.get(version.name)
        return lane.stable.urls if lane else ()

    @property
    def _urls(self) -> list[str]:
        return [url for engine in self._engines.values() for url in engine.urls]

    async def _read_queues(self) -> None:
        urls = [
            url for engine in self._engines.values() if engine.kind == "vllm" for url in engine.urls
        ]
        lengths = await asyncio.gather(
            *(read_queue(self._pool, url, _METRICS_SECONDS) for url in urls)
        )
        waiting = dict(zip(urls, lengths, strict=True))
        if waiting != self._waiting:
            self._waiting = waiting
            self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def pool_limits(settings: ShadowSettings) -> UpstreamSection:
    """The deadline bounds the whole, so the pool's own limits lie beyond it."""
    beyond = 2 * settings.deadline_seconds
    return UpstreamSection(
        first_byte_seconds=beyond,
        between_bytes_seconds=beyond,
        total_seconds=beyond,
        maximum_idle=settings.concurrency,
    )
