"""The states of a run, on a real store and with real training; the engine comes in `test_engine`."""

import asyncio
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from rollout.artifacts import ArtifactStore
from rollout.errors import LeaseLostError
from rollout.settings import ArtifactsSection, Settings, check_section
from rollout.stores import Stores, open_stores
from tests.chaos import ChaosProxy
from tests.trainer.samples import settings_for, training_run, until
from tests.trainer.working import (
    enqueue,
    first_step_after,
    last_entry,
    wait_for,
    wait_for_checkpoint,
    wait_for_steps,
    wait_until_begun,
    working,
)
from trainer.folders import hold
from trainer.settings import TrainerSettings
from trainer.sinks import TrainerMetrics
from trainer.worker import Worker

pytestmark = pytest.mark.anyio

# Nobody waits for its end, and no machine is so fast that it comes in between.
ENDLESS = {"epochs": 1000}


def as_toml(settings: Settings) -> str:
    """What a trainer of its own reads."""
    own = {name: value for name, value in settings.trainer.items() if name != "models"}
    (engine,) = settings.engines
    return "\n".join(
        [
            f"data_dir = {json.dumps(str(settings.data_dir))}",
            f"[store]\nurl = {json.dumps(settings.store_url)}",
            "[trainer]",
            *(f"{name} = {json.dumps(value)}" for name, value in own.items()),
            f"models = {{ tiny = {json.dumps(settings.trainer['models']['tiny'])} }}",
            f"[[engines]]\nname = 'main'\nurls = {json.dumps(engine.urls)}\nbase = 'tiny'\n",
        ]
    )


async def test_too_few_labels_are_refused_with_how_many_it_takes(
    stores: Stores, settings: Settings
) -> None:
    run = await enqueue(stores, labels=9)
    async with working(stores, settings):
        ended = await wait_for(stores, run, "refused")
    assert "at least 20 are needed" in ended.reason
    assert ended.adapter is None


async def test_no_labels_at_all_are_refused_too(stores: Stores, settings: Settings) -> None:
    run = training_run()
    await stores.runs.enqueue(run)
    async with working(stores, settings):
        ended = await wait_for(stores, run, "refused")
    assert "0 rows to train on" in ended.reason


@pytest.mark.parametrize("config", [{"rank": 512}, {"use_dora": True}, {"epochs": "two"}])
async def test_a_configuration_that_cannot_be_is_refused_before_training(
    stores: Stores, settings: Settings, config: dict[str, Any]
) -> None:
    run = await enqueue(stores, **config)
    async with working(stores, settings):
        ended = await wait_for(stores, run, "refused")
    assert next(iter(config)) in ended.reason
    assert not (settings.data_path / "runs").exists()


async def test_a_base_that_is_not_on_this_machine_is_refused(
    stores: Stores, redis_url: str, tmp_path: Path
) -> None:
    run = await enqueue(stores)
    async with working(stores, settings_for(redis_url, tmp_path / "nowhere", tmp_path)):
        ended = await wait_for(stores, run, "refused")
    assert "[trainer.models]" in ended.reason


async def test_a_training_process_that_dies_fails_the_run_and_publishes_nothing(
    stores: Stores, redis_url: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model_dir.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    settings = settings_for(redis_url, broken, tmp_path)
    run = await enqueue(stores)
    async with working(stores, settings):
        ended = await wait_for(stores, run, "failed", "refused")
    assert ended.state == "failed"
    assert ended.reason
    assert ArtifactStore(settings.artifacts_url).bundles() == []


async def test_a_loss_that_is_no_number_fails_the_run_and_publishes_nothing(
    stores: Stores, redis_url: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    settings = settings_for(redis_url, broken, tmp_path)
    run = await enqueue(stores)
    async with working(stores, settings):
        ended = await wait_for(stores, run, "failed", "refused")
    assert ended.state == "failed"
    assert "the loss is nan at step 1" in ended.reason
    assert ArtifactStore(settings.artifacts_url).bundles() == []
    left = [path.name for path in (settings.data_path / "runs" / run.id).iterdir()]
    assert left == ["job.log"]


@pytest.mark.timeout(300)
async def test_a_trainer_that_is_killed_is_followed_by_another_with_the_same_adapter(
    stores: Stores, settings: Settings, tmp_path: Path
) -> None:
    first = await enqueue(stores, epochs=8)
    async with working(stores, settings):
        whole = await wait_for(stores, first, "publishing")
        await stores.runs.request_cancel(first.id)
        await wait_for(stores, first, "cancelled")

    file = tmp_path / "sluice.toml"
    file.write_text(as_toml(settings))
    second = await enqueue(stores, epochs=8)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "trainer.worker", "--config", str(file), start_new_session=True
    )
    try:
        await wait_for_checkpoint(settings, second)
    finally:
        # Its job goes with it, for nobody holds its standard input any more.
        process.kill()
        await process.wait()
    async with working(stores, settings):
        again = await wait_for(stores, second, "publishing", "refused")
    assert again.adapter == whole.adapter, again.reason
    await wait_until_begun(stores, second, 2)
    assert ArtifactStore(settings.artifacts_url).bundles() == [whole.adapter]


async def test_a_cancelled_run_stops_at_its_next_step(stores: Stores, settings: Settings) -> None:
    run = await enqueue(stores, **ENDLESS)
    async with working(stores, settings):
        await wait_for_checkpoint(settings, run)
        await stores.runs.request_cancel(run.id)
        ended = await wait_for(stores, run, "cancelled")
    assert ended.reason == "cancelled on request"
    assert ArtifactStore(settings.artifacts_url).bundles() == []


async def test_a_stopped_trainer_hands_its_run_back_and_the_next_goes_on(
    stores: Stores, settings: Settings
) -> None:
    run = await enqueue(stores, **ENDLESS)
    async with working(stores, settings):
        done = await wait_for_steps(stores, run)
    handed_back = await stores.runs.get(run.id)
    assert handed_back.state == "queued"
    assert handed_back.dataset is not None
    position = await last_entry(stores, run)
    async with working(stores, settings):
        assert await first_step_after(stores, run, position) > done


async def test_a_paused_run_goes_on_where_it_was_also_on_another_machine(
    stores: Stores, settings: Settings, tmp_path: Path
) -> None:
    run = await enqueue(stores, **ENDLESS)
    async with working(stores, settings):
        done = await wait_for_steps(stores, run)
        assert await stores.runs.request_pause(run.id)
        paused = await wait_for(stores, run, "paused")
    assert paused.checkpoint is not None
    position = await last_entry(stores, run)
    # The other machine shares the artifacts, and nothing else.
    shutil.rmtree(settings.data_path / "runs")
    elsewhere = settings.model_copy(
        update={
            "data_dir": tmp_path / "elsewhere",
            "artifacts": ArtifactsSection(url=settings.artifacts_url),
        }
    )
    async with working(stores, elsewhere):
        await stores.runs.resume(run.id)
        assert await first_step_after(stores, run, position) > done
        await stores.runs.request_cancel(run.id)
        await wait_for(stores, run, "cancelled")
    assert paused.checkpoint not in ArtifactStore(settings.artifacts_url).documents()
    assert not (elsewhere.data_path / "runs" / run.id).exists()


async def test_a_trainer_that_cannot_reach_the_store_stops_before_another_may_begin(
    stores: Stores, settings: Settings, redis_url: str
) -> None:
    run = await enqueue(stores, **ENDLESS)
    async with (
        ChaosProxy(redis_url) as proxy,
        open_stores(proxy.url) as cut_off,
        working(cut_off, settings),
    ):
        await wait_for_checkpoint(settings, run)
        proxy.up.gate.clear()
        proxy.down.gate.clear()
        async with working(stores, settings):
            # A job begins when it is alone in the run's folder: the first one has stopped.
            await wait_until_begun(stores, run, 2)
            proxy.up.gate.set()
            proxy.down.gate.set()
            await stores.runs.request_cancel(run.id)
            await wait_for(stores, run, "cancelled")


async def test_a_run_goes_on_by_itself_once_the_store_is_back(
    stores: Stores, settings: Settings, redis_url: str
) -> None:
    run = await enqueue(stores, **ENDLESS)
    async with (
        ChaosProxy(redis_url) as proxy,
        open_stores(proxy.url) as cut_off,
        working(cut_off, settings),
    ):
        await wait_for_checkpoint(settings, run)
        proxy.cut()
        for way in (proxy.up, proxy.down):
            way.gate.clear()
        # Nobody works in its folder any more: it was saved and stopped.
        (await asyncio.to_thread(hold, settings.data_path / "runs" / run.id)).close()
        for way in (proxy.up, proxy.down):
            way.gate.set()
        await wait_until_begun(stores, run, 2)
    events = await stores.runs.events(run.id)
    assert any(event.stage == "queued" for _, event in events), "people are told"


async def test_a_run_whose_lease_is_lost_is_left_to_the_other_trainer(
    stores: Stores, settings: Settings
) -> None:
    await enqueue(stores)
    run = await stores.runs.take("one", 0)
    other = await stores.runs.take("other", 60)
    assert run is not None
    assert other is not None
    own = check_section(TrainerSettings, settings.trainer, "trainer")
    registry = CollectorRegistry()
    worker = Worker(stores, settings, own, [TrainerMetrics(registry)])
    with pytest.raises(LeaseLostError):
        await worker.carry_out(run, asyncio.Event())
    assert registry.get_sample_value("sluice_training_busy", {"route": run.route}) == 0
    assert await stores.runs.get(run.id) == replace(other, fence=0)
    assert not (settings.data_path / "runs").exists()


async def test_what_was_trained_is_published_with_everything_that_pins_it(
    stores: Stores, settings: Settings
) -> None:
    run = await enqueue(stores, epochs=1)
    async with working(stores, settings):
        published = await wait_for(stores, run, "publishing")
    artifacts = ArtifactStore(settings.artifacts_url)
    assert published.adapter is not None
    assert published.dataset is not None
    pins = json.loads(artifacts.read(published.adapter, "pins.json"))
    assert pins["base"] == "tiny"
    assert pins["dataset"] == published.dataset
    assert set(pins["base_sha256"]) == {"weights", "config", "tokenizer", "chat_template"}
    assert set(pins["libraries"]) >= {"torch", "transformers", "peft"}
    assert {"base_revision", "chat_template_arguments", "config_digest", "code", "python"} <= set(
        pins
    )
    assert 0 < pins["rounding"] < 1
    probes = json.loads(artifacts.read(published.adapter, "probes.json"))
    assert len(probes) == 8
    assert artifacts.document(published.dataset)


async def test_the_same_labels_and_settings_give_the_same_adapter_which_is_no_new_version(
    stores: Stores, settings: Settings
) -> None:
    async with working(stores, settings):
        first = await enqueue(stores, epochs=1)

        async def registered() -> bool:
            return (await stores.runs.get(first.id)).version is not None

        await until(registered, seconds=120)
        await stores.runs.request_cancel(first.id)
        await wait_for(stores, first, "cancelled")
        second = await wait_for(stores, await enqueue(stores, epochs=1), "refused")
    assert "exactly the adapter of triage@2" in second.reason
