"""From labels to a proposed version on real vLLM, and adapters that the engine proof refuses."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from rollout.artifacts import ArtifactStore
from rollout.control import retraining
from rollout.engines import Engine
from rollout.errors import UnservableError
from rollout.retraining import Retrain
from rollout.runs import TrainingRun
from rollout.settings import Settings, check_section
from rollout.stores import Stores
from rollout.versions import Version
from tests.engines import VllmServer
from tests.trainer.samples import (
    AT,
    ROUTE,
    sentences,
    settings_for,
    training_run,
    until,
    without_meaning,
)
from tests.trainer.standins import loading, pinned_versions
from trainer import publish
from trainer.settings import TrainerSettings
from trainer.worker import Worker

pytestmark = [pytest.mark.anyio, pytest.mark.vllm, pytest.mark.timeout(400)]

TOLERANCE = 0.002
# When all labels of the samples are there.
AFTER = AT + timedelta(days=1)


@dataclass(frozen=True, slots=True)
class House:
    """A running loop: trainer, engine, and what stands between them."""

    stores: Stores
    settings: Settings
    engine: Engine


@pytest.fixture
async def house(
    stores: Stores,
    redis_url: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    vllm_engine: VllmServer,
) -> AsyncIterator[House]:
    async with contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(pinned_versions(stores, vllm_engine.url))
        settings = settings_for(
            redis_url,
            tiny_model_dir,
            tmp_path,
            engine_url=vllm_engine.url,
            gateway_url=gateway,
        )
        (engine,) = settings.engine_list()
        await stack.enter_async_context(loading(stores, engine))
        own = check_section(TrainerSettings, settings.trainer, "trainer")
        stopping = asyncio.Event()
        task = asyncio.create_task(Worker(stores, settings, own).serve(stopping))
        try:
            yield House(stores, settings, engine)
        finally:
            stopping.set()
            await task


async def ended(stores: Stores, run: TrainingRun) -> TrainingRun:
    if run.created_by != retraining.BY:
        await stores.runs.enqueue(run)

    async def over() -> bool:
        return (await stores.runs.get(run.id)).state in ("proposed", "refused", "failed")

    await until(over, seconds=240)
    return await stores.runs.get(run.id)


async def test_labels_become_a_version_that_the_engine_serves_and_that_wins(house: House) -> None:
    stores = house.stores
    await stores.cases.put_labelled(sentences(150))
    run = await ended(stores, training_run(epochs=10, learning_rate=0.005))
    assert run.state == "proposed", run.reason
    assert run.version == "triage@2"
    rollout = await stores.rollouts.get(ROUTE)
    assert rollout.trial is not None
    assert (rollout.stable, rollout.trial.candidate, rollout.trial.stage) == (1, 2, "shadow")
    assert run.report is not None
    report = await stores.reports.get(run.report)
    assert report.outcome == "pass"
    assert report.scores[0].accuracy > 0.9
    assert report.gained > report.lost
    events = [event.message for _, event in await stores.runs.events(run.id)]
    assert any(message.startswith("proved:") for message in events)

    await _forged_versions_are_refused(house, run)


async def _forged_versions_are_refused(house: House, run: TrainingRun) -> None:
    """Versions whose bytes are not those of the probes: on the same engine, to save its minutes."""
    artifacts = ArtifactStore(house.settings.artifacts_url)
    assert run.adapter is not None
    assert run.version is not None
    real = await house.stores.rollouts.version(run.version)
    published = publish.open_bundle(artifacts, run.adapter)

    empty = _forge(house, published, value=0.0)
    with pytest.raises(UnservableError, match="changes nothing on the engine"):
        await _prove(house, real, published, empty)
    swapped = _forge(house, published, value=0.01)
    with pytest.raises(UnservableError, match="not the adapter that was trained"):
        await _prove(house, real, published, swapped)
    stronger = _forge(house, published, scale=1.1)
    with pytest.raises(UnservableError, match="not the adapter that was trained"):
        await _prove(house, real, published, stronger)
    unmatched = _forge(house, published, renamed=True)
    with pytest.raises(UnservableError, match="changes nothing on the engine"):
        await _prove(house, real, published, unmatched)
    other_base = replace(
        published, probes=tuple(replace(p, base=p.adapter) for p in published.probes)
    )
    with pytest.raises(UnservableError, match="base is not the one"):
        await _prove(house, real, other_base, Path(published.path))
    other_template = [
        replace(probe, messages=[{"role": "user", "content": "something else"}])
        for probe in published.probes
    ]
    with pytest.raises(UnservableError, match="another chat template"):
        await _prove(
            house, real, replace(published, probes=tuple(other_template)), Path(published.path)
        )


async def _prove(house: House, real: Version, published: publish.Published, folder: Path) -> None:
    artifacts = ArtifactStore(house.settings.artifacts_url)
    digest = artifacts.publish(folder).digest
    version = await house.stores.rollouts.register(
        replace(real, adapter=digest, adapter_path=str(artifacts.local_path(digest)), run=None)
    )
    await house.stores.catalog.want(version.name, 60)
    try:
        await publish.prove_everywhere(
            house.stores, house.engine, version, published, load_seconds=60, tolerance=TOLERANCE
        )
    finally:
        await house.stores.catalog.want(version.name, 0)


def _forge(
    house: House,
    published: publish.Published,
    value: float | None = None,
    *,
    scale: float = 1.0,
    renamed: bool = False,
) -> Path:
    """A bundle like the published one, but for B: one value everywhere, or so many times as large;
    or but for the modules, which are renamed to such as the base has none of."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    def forged(key: str, each: Any) -> Any:
        if "lora_B" not in key:
            return each
        return np.full_like(each, value) if value is not None else each * np.float32(scale)

    folder = house.settings.data_path / f"forged-{value}-{scale}-{renamed}"
    shutil.copytree(published.path, folder)
    path = folder / "adapter_model.safetensors"
    save_file(
        {
            key.replace("model.layers", "model.towers") if renamed else key: forged(key, each)
            for key, each in load_file(path).items()
        },
        path,
    )
    return folder


async def test_an_adapter_that_does_not_win_is_recorded_and_not_proposed(house: House) -> None:
    stores = house.stores
    await stores.cases.put_labelled(without_meaning(sentences(150)))
    run = await ended(stores, await _started_by_itself(stores))
    assert run.state == "refused"
    assert run.report is not None
    assert (await stores.reports.get(run.report)).outcome == "inconclusive"
    assert "no difference from triage@1 is shown" in run.reason
    assert (await stores.rollouts.get(ROUTE)).trial is None
    # It learnt from these labels, so they start no other one.
    outlook = (await retraining.outlooks(stores, await stores.catalog.load(), AFTER))[ROUTE]
    assert (outlook.state, outlook.reason) == ("waiting", "no case was decided since the last run")


async def _started_by_itself(stores: Stores) -> TrainingRun:
    """What the leading controller queues for a route that asks for it."""
    config = training_run(epochs=2).config
    route = await stores.rollouts.route(ROUTE)
    asking = replace(route, retrain=Retrain(new_labels=150, config=config))
    await stores.rollouts.put_route(asking, by="test", at=AT, base="tiny")
    catalog = await stores.catalog.load()
    (outlook,) = (await retraining.outlooks(stores, catalog, AFTER)).values()
    rollout = catalog.rollouts[ROUTE]
    run = await retraining.start(stores, catalog.routes[ROUTE], rollout, outlook, AFTER)
    assert run is not None, outlook.reason
    return run
