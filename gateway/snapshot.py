"""The catalog in memory: follows the store, and lives without it from a last-known-good file."""

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from gateway.routing import View, index
from rollout.catalog import Catalog
from rollout.engines import Engine
from rollout.errors import StoreUnavailableError
from rollout.stores import GatewayPresence, Stores
from rollout.stores.codec import decode, encode

_log = logging.getLogger(__name__)
FILE_NAME: Final = "gateway-catalog.json"
_PRESENCE_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = (0.1, 2.0)


@dataclass(frozen=True, slots=True)
class Options:
    file: Path
    poll_seconds: float = 5.0


class Snapshot:
    """What this worker serves by. `view` is replaced whole, so a reader never sees half of one.

    `on_change` is called with each new view, `on_store` with whether the store answers.
    """

    def __init__(
        self,
        presence: GatewayPresence,
        options: Options,
        *,
        on_change: Callable[[View], None],
        on_store: Callable[[bool], None],
    ) -> None:
        self._engines: Mapping[str, Engine] = {}
        self._presence = presence
        self._options = options
        self._on_change = on_change
        self._on_store = on_store
        self._changed = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._catalog = Catalog(revision=0)
        self._known = False
        self._has_routes = False
        self.view = View()

    @property
    def ready(self) -> bool:
        """Whether there is anything to route by: from the store, or from the file."""
        return self._known

    def adopt(self, catalog: Catalog) -> None:
        """Serve by this catalog from now on."""
        self._catalog = catalog
        self.view = index(catalog, self._engines)
        self._known = True
        self._has_routes = bool(catalog.routes)
        self._on_change(self.view)
        self._changed.set()

    def move(self, engines: Iterable[Engine]) -> None:
        """The engines have other replicas from now on."""
        self._engines = {engine.name: engine for engine in engines}
        if self._known:
            self.adopt(self._catalog)

    async def start(self, stores: Stores) -> None:
        """Load from the store, or else from the file; with neither it stays unready."""
        try:
            await self._reload(stores)
        except StoreUnavailableError as exc:
            self._on_store(False)
            _log.warning("%s; looking for the last known catalog", exc)
        except Exception:  # noqa: BLE001 - a store that talks nonsense must not keep us from starting
            self._on_store(False)
            _log.exception("loading the catalog failed; looking for the last known one")
        if not self._known:
            catalog = await asyncio.to_thread(read_file, self._options.file)
            if catalog is not None:
                self.adopt(catalog)

    async def run(self, stores: Stores) -> None:
        """Follow the store for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(stores))
            tasks.create_task(self._poll(stores))
            tasks.create_task(self._report(stores))

    def drain(self) -> None:
        """Say with the next report that this worker is going."""
        self._presence = replace(self._presence, draining=True)
        self._changed.set()

    async def leave(self, stores: Stores) -> None:
        try:
            await stores.presence.leave(self._presence.incarnation)
        except StoreUnavailableError:
            _log.info("the store is not there to say goodbye to; it will notice")

    async def _follow(self, stores: Stores) -> None:
        pause, longest = _RETRY_SECONDS
        while True:
            try:
                async for revision in stores.catalog.announcements():
                    pause = _RETRY_SECONDS[0]
                    await self._catch_up(stores, revision)
            except StoreUnavailableError as exc:
                self._on_store(False)
                _log.warning("%s; going on with what is known", exc)
            except Exception:  # noqa: BLE001 - this loop must not end; it says what happened
                _log.exception("following the catalog failed; it is tried again")
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)

    async def _poll(self, stores: Stores) -> None:
        """Announcements may be lost without a sign of it; a poll finds what they missed."""
        while True:
            await asyncio.sleep(self._options.poll_seconds)
            try:
                await self._catch_up(stores, await stores.catalog.revision())
            except StoreUnavailableError:
                self._on_store(False)
            except Exception:  # noqa: BLE001 - this loop must not end; it says what happened
                _log.exception("polling the catalog failed; it is tried again")

    async def _report(self, stores: Stores) -> None:
        while True:
            try:
                presence = replace(self._presence, revision=self.view.revision)
                await stores.presence.report(presence)
            except StoreUnavailableError:
                self._on_store(False)
            except Exception:  # noqa: BLE001 - this loop must not end; it says what happened
                _log.exception("reporting the presence failed; it is tried again")
            self._changed.clear()
            try:
                async with asyncio.timeout(_PRESENCE_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _catch_up(self, stores: Stores, revision: int) -> None:
        self._on_store(True)
        if revision != self.view.revision or not self._known:
            await self._reload(stores)

    async def _reload(self, stores: Stores) -> None:
        async with self._reloading:
            try:
                catalog = await stores.catalog.load()
            except ValidationError as exc:
                _log.error(
                    "the store holds what this version cannot read; kept the last known: %s", exc
                )
                return
            self._on_store(True)
            if self._has_routes and not catalog.routes:
                # A store that lost its data must not take the traffic with it.
                _log.warning("the store has no routes any more; going on with the last known")
                return
            self.adopt(catalog)
            try:
                await asyncio.to_thread(write_file, self._options.file, catalog)
            except OSError as exc:
                _log.warning(
                    "cannot keep the last known catalog in %s: %s; make it writable, or a restart "
                    "while the store is down will find nothing",
                    self._options.file,
                    exc,
                )


def read_file(path: Path) -> Catalog | None:
    """The last known catalog, or None where there is none that can be read."""
    try:
        return decode(Catalog, path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as exc:
        _log.warning("cannot read the last known catalog in %s: %s", path, exc)
        return None


def write_file(path: Path, catalog: Catalog) -> None:
    """Write it whole or not at all. It holds digests of keys, and no secret."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        draft.chmod(0o600)
        file.write(encode(catalog))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
