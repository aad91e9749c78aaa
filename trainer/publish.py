"""From a trained bundle to a version that engines were proved to serve."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rollout.artifacts import ArtifactStore
from rollout.engines import Engine
from rollout.errors import RefusedError, UnservableError
from rollout.runs import TrainingRun
from rollout.serving import wait_resident
from rollout.stores import Stores
from rollout.versions import Prompt, Version
from trainer.bundle import PINS_FILE, PROBES_FILE, Probe
from trainer.proof import Proof, prove

# What can be read without running what is in it.
_HARMLESS = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model"})


@dataclass(frozen=True, slots=True)
class Published:
    """A bundle in the artifact store with what is needed to prove it."""

    digest: str
    path: str
    probes: tuple[Probe, ...]
    rounding: float = 0.0


def publish_bundle(artifacts: ArtifactStore, folder: Path) -> Published:
    """Store a bundle under its digest, whole or not at all.

    Raises UnservableError where a file might run code when it is loaded, as a pickle does.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix not in _HARMLESS:
            raise UnservableError(
                f"{path.name} is not published: weights have to be safetensors, and beside them only "
                "texts are kept"
            )
    return open_bundle(artifacts, artifacts.publish(folder).digest)


def open_bundle(artifacts: ArtifactStore, digest: str) -> Published:
    """Read a published bundle, every file checked against its hash."""
    held = PROBES_FILE in artifacts.bundle(digest).files
    probes: list[dict[str, Any]] = json.loads(artifacts.read(digest, PROBES_FILE)) if held else []
    pins = json.loads(artifacts.read(digest, PINS_FILE))
    return Published(
        digest=digest,
        path=str(artifacts.local_path(digest)),
        probes=tuple(Probe(**probe) for probe in probes),
        # Bundles of older releases don't say; theirs were float32, or are proved by an engine in it.
        rounding=pins.get("rounding", 0.0),
    )


async def register(
    stores: Stores,
    run: TrainingRun,
    parent: Version,
    published: Published,
    prompt: Prompt | None,
    now: datetime,
) -> Version:
    """Register the version of a run, once however often it is tried.

    Raises RefusedError where another version has the same weights and prompt already.
    """
    for version in await stores.rollouts.versions(run.route):
        if version.run == run.id:
            return version
        if version.adapter == published.digest and version.prompt == prompt:
            raise RefusedError(
                f"training gave exactly the adapter of {version.name}: nothing has changed since"
            )
    return await stores.rollouts.register(
        Version(
            route=run.route,
            number=0,
            engine=parent.engine,
            base=parent.base,
            base_revision=parent.base_revision,
            created_at=now,
            adapter=published.digest,
            adapter_path=published.path,
            prompt=prompt,
            sampling=parent.sampling,
            parent=parent.number,
            dataset=run.dataset,
            run=run.id,
            created_by=run.created_by,
            note=f"trained by run {run.id}",
        )
    )


async def prove_everywhere(
    stores: Stores,
    engine: Engine,
    version: Version,
    published: Published,
    *,
    load_seconds: float,
    tolerance: float,
) -> Sequence[Proof]:
    """Wait until the controller has loaded the version on every ready replica, then prove each.

    Raises EngineUnavailableError where it is not loaded in time, UnservableError where a replica
    serves something else.
    """
    found = await wait_resident(stores, version, load_seconds)
    return [
        await prove(engine, url, version, published.probes, tolerance, published.rounding)
        for url in found.on
    ]
