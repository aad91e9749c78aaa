"""Training runs: asking for one, following it, pausing and stopping it."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from rollout.control.context import Control
from rollout.control.queueing import check_room, run_of_now
from rollout.credentials import ApiKey
from rollout.errors import ConflictError, InvalidInputError, NotFoundError
from rollout.runs import ENDED, RunEvent, TrainingRun
from rollout.stores.audit import audit_entry


async def start(
    control: Control,
    caller: ApiKey,
    route: str,
    config: Mapping[str, Any],
    dataset: str | None = None,
    *,
    propose: bool = True,
) -> TrainingRun:
    """Queue a run: on the labels as they are when it begins, or on a dataset that there is."""
    rollout = await control.stores.rollouts.get(route)
    if dataset is not None:
        manifest = await control.stores.datasets.get(dataset)
        if manifest.route != route:
            raise InvalidInputError(
                f"the dataset {dataset} is of route {manifest.route!r}: what is held out there may "
                f"be trained on here; build or import one for {route!r}",
                param="dataset",
            )
        dataset = manifest.digest
    await check_room(control, route, "train")
    run = replace(
        run_of_now(control, caller, "train", route, f"{route}@{rollout.stable}", config),
        dataset=dataset,
        labels=await control.stores.cases.decided_count(route),
        propose=propose,
    )
    await control.stores.runs.enqueue(run)
    await _note(control, caller, "run.start", run)
    return run


async def runs(
    control: Control, caller: ApiKey, route: str | None, limit: int
) -> list[TrainingRun]:
    rows = await control.stores.runs.list(route, limit)
    return [run for run in rows if caller.allows_route(run.route)]


async def run(control: Control, caller: ApiKey, run_id: str) -> TrainingRun:
    found = await control.stores.runs.get(run_id)
    if not caller.allows_route(found.route):
        raise NotFoundError(f"there is no run {run_id!r}")
    return found


async def cancel(control: Control, caller: ApiKey, run_id: str) -> TrainingRun:
    """Ask the trainer to stop; a run that has ended is a conflict."""
    found = await _going_on(control, caller, run_id)
    await control.stores.runs.request_cancel(run_id)
    await _note(control, caller, "run.cancel", found)
    return await control.stores.runs.get(run_id)


async def pause(control: Control, caller: ApiKey, run_id: str) -> TrainingRun:
    """Ask the trainer to save the run and give it back; a run that has ended is a conflict."""
    found = await _going_on(control, caller, run_id)
    if not await control.stores.runs.request_pause(run_id):
        raise _ended(await control.stores.runs.get(run_id))
    await _note(control, caller, "run.pause", found)
    return await control.stores.runs.get(run_id)


async def resume(control: Control, caller: ApiKey, run_id: str) -> TrainingRun:
    """Let a paused run wait for a trainer; one that is not paused is a conflict."""
    found = await _going_on(control, caller, run_id)
    if not await control.stores.runs.resume(run_id):
        raise ConflictError(f"{run_id} is not paused: it is {found.state}")
    await _note(control, caller, "run.resume", found)
    return await control.stores.runs.get(run_id)


async def _going_on(control: Control, caller: ApiKey, run_id: str) -> TrainingRun:
    found = await run(control, caller, run_id)
    if found.state in ENDED:
        raise _ended(found)
    return found


def _ended(found: TrainingRun) -> ConflictError:
    return ConflictError(f"{found.id} has ended already: {found.state}")


async def _note(control: Control, caller: ApiKey, action: str, found: TrainingRun) -> None:
    await control.stores.audit.append(audit_entry(action, found.id, caller.name, after=found))


async def events(control: Control, run_id: str) -> list[RunEvent]:
    """Every line of progress so far."""
    found: list[RunEvent] = []
    after = "0"
    while page := await control.stores.runs.events(run_id, after):
        found += [event for _, event in page]
        after = page[-1][0]
    return found


async def follow(
    control: Control, run_id: str, after: str, wait_seconds: float
) -> AsyncIterator[tuple[str, RunEvent] | TrainingRun | None]:
    """Progress as it comes, None where there was none for a while, and at the end the run."""
    while True:
        # Read before the events: a run that has ended by now has written all of them.
        found = await control.stores.runs.get(run_id)
        ended = found.state in ENDED
        page = await control.stores.runs.events(run_id, after, 0 if ended else wait_seconds)
        for entry, event in page:
            after = entry
            yield entry, event
        if ended and not page:
            yield found
            return
        if not page:
            yield None
