"""Runs that are not plain: another's answers, all weights, a foreign trainer."""

import sys
from pathlib import Path

import pytest

from rollout.artifacts import ArtifactStore
from rollout.routes import Route
from rollout.settings import Settings
from rollout.stores import Stores
from tests.trainer import train_with_peft
from tests.trainer.samples import AT, ROUTE, sentences, settings_for, training_run
from tests.trainer.working import enqueue, wait_for, working

pytestmark = pytest.mark.anyio


async def test_full_weights_are_stored_and_said_not_to_be_servable_before_training(
    stores: Stores, settings: Settings
) -> None:
    run = await enqueue(stores, weights="full", epochs=1)
    async with working(stores, settings):
        ended = await wait_for(stores, run, "refused")
    assert "cannot load as an adapter" in ended.reason
    assert ended.version is None
    said = [event.message for _, event in await stores.runs.events(run.id)]
    told = next(place for place, line in enumerate(said) if "cannot load as an adapter" in line)
    assert told < next(place for place, line in enumerate(said) if line.startswith("loss "))
    artifacts = ArtifactStore(settings.artifacts_url, cache=settings.data_path / "adapters")
    assert ended.adapter is not None
    assert {"model.safetensors", "config.json", "tokenizer.json", "pins.json"} <= set(
        artifacts.bundle(ended.adapter).files
    )


async def test_a_foreign_trainers_adapter_is_published_like_ours(
    stores: Stores, redis_url: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    command = (
        f"{sys.executable} {train_with_peft.__file__} --dataset {{dataset}} --base {{base}} "
        "--output {output} --config {config}"
    )
    settings = settings_for(redis_url, tiny_model_dir, tmp_path, external={"command": command})
    run = await enqueue(stores, backend="external", epochs=1)
    async with working(stores, settings):
        await wait_for(stores, run, "publishing")
    held = await stores.runs.get(run.id)
    assert held.adapter is not None


async def test_without_a_command_a_foreign_trainer_is_refused(
    stores: Stores, settings: Settings
) -> None:
    run = await enqueue(stores, backend="external")
    async with working(stores, settings):
        ended = await wait_for(stores, run, "refused")
    assert "[trainer.external]" in ended.reason


async def test_a_distillation_learns_from_the_cases_of_its_teacher(
    stores: Stores, settings: Settings
) -> None:
    await stores.rollouts.put_route(
        Route(name="large", engine="main"), by="test", at=AT, base="tiny"
    )
    run = training_run(method="distill", teacher=ROUTE, epochs=1)
    own = training_run(method="distill", teacher="large", epochs=1)
    await stores.cases.put_labelled(sentences(60))
    async with working(stores, settings):
        await stores.runs.enqueue(own)
        nothing = await wait_for(stores, own, "refused")
        await stores.runs.enqueue(run)
        learnt = await wait_for(stores, run, "publishing")
    assert "0 rows to train on" in nothing.reason
    assert learnt.adapter is not None


async def test_a_teacher_that_is_no_route_is_named(stores: Stores, settings: Settings) -> None:
    run = await enqueue(stores, method="distill", teacher="nobody")
    async with working(stores, settings):
        ended = await wait_for(stores, run, "refused", "failed")
    assert "nobody" in ended.reason
