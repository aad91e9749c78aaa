"""Versions: what exists, where it answers, and registering another."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rollout.adapters import check_adapter
from rollout.catalog import Catalog
from rollout.control.context import Control
from rollout.control.views import EngineView, ReplicaView, VersionView
from rollout.credentials import ApiKey
from rollout.engines import DNS_SCHEME, Engine, Placement, Residency, placement
from rollout.errors import EngineUnavailableError, InvalidInputError, UnservableError
from rollout.versions import Prompt, Version, parse_model


@dataclass(frozen=True, slots=True)
class Draft:
    """What a person registers; engine and base are those of the route's stable version.

    `adapter_path` is copied into the artifact store, so that nobody can change it afterwards.
    """

    route: str
    prompt: Prompt | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    adapter_path: str | None = None
    note: str = ""


async def register(control: Control, caller: ApiKey, draft: Draft) -> VersionView:
    """Give it the route's next number. Raises InvalidInputError, UnservableError, NotFoundError."""
    rollout = await control.stores.rollouts.get(draft.route)
    stable = await control.stores.rollouts.version(f"{draft.route}@{rollout.stable}")
    adapter, adapter_path = None, None
    if draft.adapter_path is not None:
        folder = Path(draft.adapter_path)
        await asyncio.to_thread(_check_adapter, folder, _engine(control, stable.engine))
        bundle = await asyncio.to_thread(control.artifacts.publish, folder)
        adapter = bundle.digest
        adapter_path = str(await asyncio.to_thread(control.artifacts.local_path, adapter))
    version = await control.stores.rollouts.register(
        Version(
            route=draft.route,
            number=0,
            engine=stable.engine,
            base=stable.base,
            base_revision=stable.base_revision,
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


def require_resident(version: Version, residencies: Iterable[Residency]) -> Placement:
    """Where it is resident. Raises EngineUnavailableError unless that is on every ready replica."""
    found = placement(version, residencies)
    if version.adapter is not None and not found.everywhere:
        raise EngineUnavailableError(f"{version.name} is not resident yet: {found.reason}")
    return found


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


def _check_adapter(folder: Path, engine: Engine | None) -> None:
    """Raise with what is wrong, unless it is an adapter that this engine can serve."""
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
    if engine is not None and engine.kind != "vllm":
        raise UnservableError(
            f"engine {engine.name!r} is of kind {engine.kind!r}: it loads no adapters"
        )
    check_adapter(folder, max_rank=None if engine is None else engine.max_rank)
