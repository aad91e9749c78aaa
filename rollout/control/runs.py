"""Training runs: asking for one, following it, stopping it."""

import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any

from rollout.control.context import Control
from rollout.credentials import ApiKey
from rollout.errors import ConflictError, InvalidInputError, NotFoundError
from rollout.runs import ENDED, RunEvent, TrainingRun

# One trainer works on one run at a time: what is queued beyond this waits for days.
_MAXIMUM_WAITING = 10


async def start(
    control: Control,
    caller: ApiKey,
    route: str,
    config: Mapping[str, Any],
    dataset: str | None = None,
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
    waiting = [
        run
        for run in await control.stores.runs.list(route)
        if run.state not in ENDED and run.kind == "train"
    ]
    if len(waiting) >= _MAXIMUM_WAITING:
        raise ConflictError(
            f"{len(waiting)} runs of {route} are under way or queued: wait, or cancel some"
        )
    now = control.now()
    run = TrainingRun(
        id=f"run-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
        route=route,
        parent=f"{route}@{rollout.stable}",
        created_at=now,
        created_by=caller.name,
        config=config,
        dataset=dataset,
    )
    await control.stores.runs.enqueue(run)
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
    found = await run(control, caller, run_id)
    if found.state in ENDED:
        raise ConflictError(f"{run_id} has ended already: {found.state}")
    await control.stores.runs.request_cancel(run_id)
    return await control.stores.runs.get(run_id)


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
