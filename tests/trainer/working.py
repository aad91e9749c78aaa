"""A trainer at work in a test, and what its runs are waited for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from rollout.runs import RunEvent, RunState, TrainingRun
from rollout.settings import Settings, check_section
from rollout.stores import Stores
from tests.trainer.samples import sentences, training_run, until
from trainer.folders import CHECKPOINT_FILE, CHECKPOINTS
from trainer.settings import TrainerSettings
from trainer.worker import Worker


@contextlib.asynccontextmanager
async def working(stores: Stores, settings: Settings) -> AsyncIterator[asyncio.Event]:
    """A worker at work; leaving ends it as SIGTERM does."""
    own = check_section(TrainerSettings, settings.trainer, "trainer")
    stopping = asyncio.Event()
    task = asyncio.create_task(Worker(stores, settings, own).serve(stopping))
    try:
        yield stopping
    finally:
        stopping.set()
        await asyncio.wait_for(task, 60)


async def enqueue(stores: Stores, *, labels: int = 60, **config: Any) -> TrainingRun:
    await stores.cases.put_labelled(sentences(labels))
    run = training_run(**config)
    await stores.runs.enqueue(run)
    return run


async def wait_for(stores: Stores, run: TrainingRun, *states: RunState) -> TrainingRun:
    """The run in one of these states. Without an engine it stays in "publishing" for minutes."""
    found = run

    async def there() -> bool:
        nonlocal found
        found = await stores.runs.get(run.id)
        return found.state in states

    await until(there, seconds=240)
    return found


async def wait_until_begun(stores: Stores, run: TrainingRun, jobs: int) -> None:
    """Until so many jobs, and no more, have begun to train it."""

    async def begun() -> bool:
        events = await stores.runs.events(run.id)
        return sum(event.message.startswith("loading") for _, event in events) == jobs

    await until(begun)


async def last_entry(stores: Stores, run: TrainingRun) -> str:
    return (await stores.runs.events(run.id))[-1][0]


async def steps(stores: Stores, run: TrainingRun, after: str = "0") -> list[RunEvent]:
    """What was told of the loop's steps, at most one a second."""
    events = await stores.runs.events(run.id, after=after)
    return [event for _, event in events if "loss" in event.values]


async def wait_for_steps(stores: Stores, run: TrainingRun) -> int:
    """Until the loop has been at work for seconds; returns how many steps it has done at least.

    One that began anew would not have done as many when it tells of its steps for the first time.
    """

    async def stepping() -> bool:
        return len(await steps(stores, run)) >= 2

    await until(stepping, seconds=240)
    return (await steps(stores, run))[1].done


async def first_step_after(stores: Stores, run: TrainingRun, position: str) -> int:
    """How many steps were done when the loop told of them for the first time since then."""

    async def stepping() -> bool:
        return bool(await steps(stores, run, position))

    await until(stepping, seconds=240)
    return (await steps(stores, run, position))[0].done


async def wait_for_checkpoint(settings: Settings, run: TrainingRun) -> None:
    """Until the loop has taken a step and saved it, which is long before it tells of it."""
    file = settings.data_path / "runs" / run.id / CHECKPOINTS / CHECKPOINT_FILE

    async def saved() -> bool:
        return file.is_file()

    await until(saved, seconds=240)
