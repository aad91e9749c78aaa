"""Routes that are trained by themselves: what is known of each, and the start of what is due."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime

from rollout.catalog import Catalog
from rollout.control.context import Control
from rollout.retraining import Known, Outlook, accord, learnt_from, outlook
from rollout.routes import Route
from rollout.runs import RunEvent, TrainingRun
from rollout.state import Rollout
from rollout.stores import Stores
from rollout.stores.audit import audit_entry

_ALL = 10_000
# Whom history and audit name where no person asked.
BY = "sluice"


async def outlooks(stores: Stores, catalog: Catalog, now: datetime) -> Mapping[str, Outlook]:
    """Of each route that asks to be trained by itself."""
    asking = [
        (route, catalog.rollouts[name])
        for name, route in catalog.routes.items()
        if route.retrain is not None and route.retrain.enabled and name in catalog.rollouts
    ]
    if not asking:
        return {}
    runs = await stores.runs.list(limit=_ALL)
    return {
        route.name: await _outlook(stores, route, rollout, runs, now) for route, rollout in asking
    }


async def outlook_of(control: Control, route: Route, rollout: Rollout) -> Outlook | None:
    """None of a route that says nothing about it."""
    if route.retrain is None:
        return None
    if not control.settings.controller.retraining:
        return Outlook("off", "`retraining` under [controller] is false")
    runs = await control.stores.runs.list(route.name, _ALL)
    return await _outlook(control.stores, route, rollout, runs, control.now())


async def start(
    stores: Stores, route: Route, rollout: Rollout, found: Outlook, now: datetime
) -> TrainingRun | None:
    """Enqueue the run that is due, once however many controllers try; None where one is there."""
    retrain = route.retrain
    if found.state != "due" or retrain is None:
        return None
    run = TrainingRun(
        id=f"run-{now:%Y%m%d-%H%M%S}-{hashlib.sha256(route.name.encode()).hexdigest()[:6]}",
        route=route.name,
        parent=f"{route.name}@{rollout.stable}",
        created_at=now,
        created_by=BY,
        config=retrain.config,
        why=found.reason,
        trigger=found.trigger or "",
        labels=await stores.cases.decided_count(route.name),
        propose=retrain.propose,
    )
    if not await stores.runs.enqueue_alone(run):
        return None
    await stores.runs.note(run.id, RunEvent("queued", f"started because {run.why}", now))
    await stores.audit.append(audit_entry("run.start", run.id, BY, reason=run.why, after=run))
    return run


async def _outlook(
    stores: Stores, route: Route, rollout: Rollout, runs: Sequence[TrainingRun], now: datetime
) -> Outlook:
    mine = [run for run in runs if run.route == route.name and run.kind == "train"]
    last = learnt_from(mine)
    labels = await stores.cases.decided_count(route.name)
    trial = rollout.trial
    known = Known(
        runs=mine,
        labels=labels,
        new_labels=labels if last is None else await _labels_since(stores, last, labels),
        accord=None,
        trial=None if trial is None else f"{route.name}@{trial.candidate}",
    )
    retrain = route.retrain
    if retrain is None or not retrain.agreement_below:
        return outlook(retrain, known, now)
    rows = await stores.cases.newest_labelled(route.name, retrain.window)
    seen = accord(rows, rollout.stable, await stores.cases.tallies(route.name))
    return outlook(
        retrain,
        Known(known.runs, known.labels, known.new_labels, seen, known.trial),
        now,
    )


async def _labels_since(stores: Stores, run: TrainingRun, labels: int) -> int:
    """By the clock, or by the number where that is more: an import may bring older labels."""
    since = await stores.cases.decided_count(run.route, run.created_at)
    return max(since, labels - (labels if run.labels is None else run.labels))
