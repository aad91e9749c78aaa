"""The control API with the console on top, made from what it is given."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from rollout.api import (
    advice,
    cases,
    datasets,
    engines,
    explain,
    health,
    keys,
    replays,
    reports,
    rollouts,
    routes,
    runs,
    suites,
    versions,
)
from rollout.api.errors import add_error_handlers
from rollout.api.limits import BodyLimit
from rollout.artifacts import ArtifactStore
from rollout.console.app import add_console
from rollout.control.context import Control
from rollout.control.keyring import Keyring
from rollout.settings import Settings
from rollout.stores import Stores

_PREFIX = "/api/v1"


def _now() -> datetime:
    return datetime.now(UTC)


def create_app(
    stores: Stores,
    settings: Settings,
    *,
    bootstrap_key: str | None = None,
    registry: CollectorRegistry | None = None,
    now: Callable[[], datetime] = _now,
) -> FastAPI:
    """The ASGI application of port 8001. `bootstrap_key` is an admin's, whatever the store says."""
    app = FastAPI(
        title="Sluice control API",
        version=version("sluice"),
        # The console has a page for it that needs nothing from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    keyring = Keyring(stores, bootstrap_key, time.monotonic)
    artifacts = ArtifactStore(settings.artifacts_url, cache=settings.data_path / "adapters")
    app.state.control = Control(
        stores=stores, settings=settings, artifacts=artifacts, keyring=keyring, now=now
    )
    app.state.registry = registry
    add_error_handlers(app)
    app.include_router(health.router)
    for resource in (
        routes,
        rollouts,
        replays,
        explain,
        advice,
        versions,
        engines,
        cases,
        runs,
        datasets,
        suites,
        reports,
        keys,
    ):
        app.include_router(resource.router, prefix=_PREFIX)
    add_console(app)
    app.add_middleware(
        BodyLimit,
        unlimited=frozenset(
            {
                f"{_PREFIX}/cases/import",
                f"{_PREFIX}{datasets.IMPORT_PATH}",
                f"{_PREFIX}{suites.PATH}",
            }
        ),
    )
    return app
