"""Versions: what exists, where it answers, and registering another."""

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rollout.adapters import WEIGHTS_FILE, base_of, check_adapter, read_base_shapes
from rollout.artifacts import Bundle, describe
from rollout.catalog import Catalog
from rollout.control.context import Control
from rollout.control.views import EngineView, ReplicaView, VersionView
from rollout.credentials import ApiKey
from rollout.engines import DNS_SCHEME, Engine, Residency, placement
from rollout.errors import InvalidInputError, UnavailableError, UnservableError
from rollout.sources import FetchLimits, fetch_adapter
from rollout.versions import Prompt, Version, parse_model

# A hub's name for a base, and no directory: `HuggingFaceTB/SmolLM2-135M`.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_GRACE_SECONDS = 5.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Draft:
    """What a person registers; engine and base are those of the route's stable version.

    An adapter comes from a directory, `adapter_path`, or from `adapter_url`. It is copied into the
    artifact store, so that nobody can change it afterwards. `sha256` is what its weights' file must
    have, or the bundle: the digest that a version shows as its adapter.
    """

    route: str
    prompt: Prompt | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    adapter_path: str | None = None
    adapter_url: str | None = None
    sha256: str | None = None
    note: str = ""


async def register(control: Control, caller: ApiKey, draft: Draft) -> VersionView:
    """Give it the route's next number. Raises InvalidInputError, UnservableError, NotFoundError."""
    rollout = await control.stores.rollouts.get(draft.route)
    stable = await control.stores.rollouts.version(f"{draft.route}@{rollout.stable}")
    engine = _engine(control, stable.engine)
    served_revision = None if engine is None else engine.base_revision
    adapter, adapter_path = None, None
    async with _adapter_folder(control, draft) as folder:
        if folder is not None:
            bundle = await _take_in(control, folder, draft, stable)
            adapter = bundle.digest
            adapter_path = str(await asyncio.to_thread(control.artifacts.local_path, adapter))
    version = await control.stores.rollouts.register(
        Version(
            route=draft.route,
            number=0,
            engine=stable.engine,
            base=stable.base,
            base_revision=served_revision or stable.base_revision,
            created_at=control.now(),
            adapter=adapter,
            adapter_path=adapter_path,
            prompt=draft.prompt,
            sampling=draft.sampling,
            parent=stable.number,
            created_by=caller.name,
            note=draft.note,
        )
    )
    return await _find(control, version.name)


async def versions(control: Control, caller: ApiKey, route: str | None) -> list[VersionView]:
    catalog = await control.stores.catalog.load()
    wanted = [
        version
        for version in catalog.versions.values()
        if caller.allows_route(version.route) and route in (None, version.route)
    ]
    wanted.sort(key=lambda version: (version.route, version.number))
    return [_view(version, catalog.residency.values()) for version in wanted]


async def version(control: Control, name: str) -> VersionView:
    _, number = parse_model(name)
    if number is None:
        raise InvalidInputError(f"{name!r} names no version: write ROUTE@NUMBER", param="name")
    return await _find(control, name)


async def engines(control: Control) -> list[EngineView]:
    catalog = await control.stores.catalog.load()
    residency = catalog.residency
    return [
        EngineView(
            name=engine.name,
            kind=engine.kind,
            base=engine.base,
            replicas=tuple(_replica(url, catalog) for url in _urls(engine, residency)),
        )
        for engine in control.settings.engine_list()
    ]


def _urls(engine: Engine, residency: Mapping[str, Residency]) -> list[str]:
    """The replicas of an engine; behind a name in DNS, those that the controller found."""
    urls = [url for url in engine.urls if not url.startswith(DNS_SCHEME)]
    if len(urls) < len(engine.urls):
        found = (one.url for one in residency.values() if one.engine == engine.name and one.ready)
        urls += sorted(set(found) - set(urls))
    return urls


async def _find(control: Control, name: str) -> VersionView:
    found = await control.stores.rollouts.version(name)
    catalog = await control.stores.catalog.load()
    report = await control.stores.reports.of(name)
    view = _view(found, catalog.residency.values())
    return view if report is None else replace(view, report=report.id)


def _view(version: Version, residencies: Iterable[Residency]) -> VersionView:
    found = placement(version, residencies)
    return VersionView(
        name=version.name,
        served_name=version.served_name,
        resident_on=found.on,
        version=version,
        missing=found.missing,
        down=found.down,
    )


def _replica(url: str, catalog: Catalog) -> ReplicaView:
    residency = catalog.residency.get(url)
    if residency is None:
        return ReplicaView(
            url=url, ready=False, served=(), down="the controller has not looked yet"
        )
    missing = {
        version.name: residency.missing[version.served_name]
        for version in catalog.versions.values()
        if version.engine == residency.engine and version.served_name in residency.missing
    }
    return ReplicaView(
        url=url,
        ready=residency.ready,
        served=tuple(sorted(residency.served)),
        missing=missing,
        down=residency.down,
    )


def _engine(control: Control, name: str) -> Engine | None:
    return next((engine for engine in control.settings.engine_list() if engine.name == name), None)


@asynccontextmanager
async def _adapter_folder(control: Control, draft: Draft) -> AsyncIterator[Path | None]:
    """Where the adapter's files are; fetched ones are gone afterwards."""
    if draft.adapter_url is None:
        yield None if draft.adapter_path is None else _existing_folder(draft.adapter_path)
        return
    if draft.adapter_path is not None:
        raise InvalidInputError("give adapter_path or adapter_url, not both", param="adapter_url")
    if draft.adapter_url.lower().startswith("http://") and draft.sha256 is None:
        raise InvalidInputError(
            "what comes over http:// can be changed on its way: give its sha256, or an https:// URL",
            param="sha256",
        )
    if control.fetches.locked():
        raise UnavailableError("other adapters are being fetched now: try again when they are done")
    limits = FetchLimits(
        bytes=control.settings.artifacts.maximum_adapter_bytes,
        seconds=control.settings.artifacts.fetch_seconds,
    )
    control.settings.data_path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix="fetch-", dir=control.settings.data_path, ignore_cleanup_errors=True
    ) as target:
        async with control.fetches:
            await _fetch(draft.adapter_url, Path(target), limits)
        yield Path(target)


async def _fetch(url: str, target: Path, limits: FetchLimits) -> None:
    try:
        async with asyncio.timeout(limits.seconds + _GRACE_SECONDS):
            await asyncio.to_thread(fetch_adapter, url, target, limits)
    except TimeoutError:
        # Some file systems wait within one read, where nobody can count the time.
        raise UnavailableError(
            f"{url} did not deliver within {limits.seconds:g} s: try again, or raise fetch_seconds "
            "under [artifacts]"
        ) from None


async def _take_in(control: Control, folder: Path, draft: Draft, stable: Version) -> Bundle:
    """Publish the adapter, once it is the one that was asked for and the engine can serve it."""
    seen = await asyncio.to_thread(describe, folder)
    _check_digest(draft.sha256, seen)
    residencies = (await control.stores.catalog.load()).residency.values()
    roots = {r.root for r in residencies if r.engine == stable.engine and r.root}
    await asyncio.to_thread(_check_adapter, folder, _engine(control, stable.engine), roots)
    bundle = await asyncio.to_thread(control.artifacts.publish, folder)
    if bundle != seen:
        raise InvalidInputError(
            f"{folder} was changed while it was looked at: try again once nobody writes to it",
            param="adapter_path",
        )
    return bundle


def _existing_folder(path: str) -> Path:
    folder = Path(path)
    if not folder.is_absolute():
        raise InvalidInputError(
            f"{folder} is relative: the controller and the engines need the whole path",
            param="adapter_path",
        )
    if not folder.is_dir():
        raise InvalidInputError(
            f"there is no folder {folder}: give the directory in which PEFT saved "
            "adapter_config.json and adapter_model.safetensors",
            param="adapter_path",
        )
    return folder


def _check_digest(expected: str | None, seen: Bundle) -> None:
    if expected is None:
        return
    if not _SHA256.fullmatch(expected):
        raise InvalidInputError(
            f"{expected!r} is no sha256: those have 64 hex digits", param="sha256"
        )
    weights = seen.files.get(WEIGHTS_FILE)
    if expected not in (weights, seen.digest):
        raise InvalidInputError(
            f"the adapter is not the one that was asked for: its {WEIGHTS_FILE} has the sha256 "
            f"{weights}, all of it the digest {seen.digest}",
            param="sha256",
        )


def _check_adapter(folder: Path, engine: Engine | None, roots: Collection[str]) -> None:
    """Raise with what is wrong, unless it is an adapter that this engine can serve.

    `roots` are where its replicas say that they have their base from: a directory that can be read
    here says which modules there are, and a hub's name is held to the one that the adapter gives.
    """
    if engine is not None and engine.kind != "vllm":
        raise UnservableError(
            f"engine {engine.name!r} is of kind {engine.kind!r}: it loads no adapters"
        )
    said, _ = base_of(folder)
    named = next((root for root in sorted(roots) if _HUB_NAME.fullmatch(root)), None)
    comparable = named is not None and said is not None and _HUB_NAME.fullmatch(said) is not None
    shapes = (read_base_shapes(Path(root)) for root in sorted(roots) if Path(root).is_absolute())
    check_adapter(
        folder,
        max_rank=None if engine is None else engine.max_rank,
        base_name=named if comparable else None,
        base_revision=None if engine is None else engine.base_revision,
        base_shapes=next((found for found in shapes if found is not None), None),
    )
