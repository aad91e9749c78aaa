"""From a trained bundle to a version that engines were proved to serve."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rollout.artifacts import ArtifactStore
from rollout.engines import Engine
from rollout.errors import RefusedError
from rollout.runs import TrainingRun
from rollout.serving import wait_resident
from rollout.stores import Stores
from rollout.versions import Prompt, Version
from trainer.job import PINS_FILE, PROBES_FILE, Probe
from trainer.proof import Proof, prove

# Rounding in bfloat16 is two hundred times coarser; over a few layers this much of it is left.
_BFLOAT16 = 10.0


@dataclass(frozen=True, slots=True)
class Published:
    """A bundle in the artifact store with what is needed to prove it."""

    digest: str
    path: str
    probes: tuple[Probe, ...]
    dtype: str

    def tolerance(self, in_float32: float) -> float:
        return in_float32 if self.dtype == "float32" else in_float32 * _BFLOAT16


def open_bundle(artifacts: ArtifactStore, digest: str) -> Published:
    """Read a published bundle, every file checked against its hash."""
    held = PROBES_FILE in artifacts.bundle(digest).files
    probes: list[dict[str, Any]] = json.loads(artifacts.read(digest, PROBES_FILE)) if held else []
    pins = json.loads(artifacts.read(digest, PINS_FILE))
    return Published(
        digest=digest,
        path=str(artifacts.local_path(digest)),
        probes=tuple(Probe(**probe) for probe in probes),
        dtype=pins["dtype"],
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
        await prove(engine, url, version, published.probes, published.tolerance(tolerance))
        for url in found.on
    ]
