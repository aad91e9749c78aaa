"""Datasets: asking for one, bringing one in, showing what is in it and what differs."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from rollout.control.access import require_route
from rollout.control.context import Control
from rollout.control.queueing import check_room, run_of_now
from rollout.control.views import DatasetDifference
from rollout.credentials import ApiKey
from rollout.datasets import (
    Contradiction,
    Dataset,
    Dropped,
    Manifest,
    Split,
    difference,
    from_rows,
    load,
    read_ledger,
)
from rollout.errors import NotFoundError
from rollout.formats import Format, read_rows, write_rows
from rollout.runs import ENDED, TrainingRun
from rollout.stores.audit import audit_entry

_POLL_SECONDS: Final = 0.2
_RUNS_LOOKED_AT: Final = 1000


async def build(
    control: Control, caller: ApiKey, route: str, config: Mapping[str, Any], wait_seconds: float
) -> TrainingRun:
    """Queue a run that ends in a dataset; the run as it is when it has ended or time is up."""
    rollout = await control.stores.rollouts.get(route)
    await check_room(control, route, "dataset")
    run = run_of_now(control, caller, "dataset", route, f"{route}@{rollout.stable}", config)
    await control.stores.runs.enqueue(run)
    entry = audit_entry("dataset.build", run.id, caller.name, after=run)
    await control.stores.audit.append(entry)
    return await _ended(control, run, wait_seconds)


async def bring_in(
    control: Control,
    caller: ApiKey,
    route: str,
    content: bytes,
    *,
    name: Format | None,
    file: str,
    config: Mapping[str, Any],
    wait_seconds: float,
) -> TrainingRun:
    """Make a dataset of a file's rows, by the same rules. A broken line refuses all of it."""
    require_route(caller, route)
    await control.stores.rollouts.get(route)
    read = await asyncio.to_thread(read_rows, content, route, name, caller.name)
    rows = await asyncio.to_thread(from_rows, read.rows, read.unanswered)
    source = await asyncio.to_thread(control.artifacts.put_document, rows.content)
    config = {**config, "source": source, "file": f"{file} ({read.format})"}
    return await build(control, caller, route, config, wait_seconds)


async def datasets(control: Control, caller: ApiKey, route: str | None) -> list[Manifest]:
    found = await control.stores.datasets.list(route)
    return [each for each in found if caller.allows_route(each.route)]


async def manifest(control: Control, caller: ApiKey, digest: str) -> Manifest:
    found = await _find(control, digest)
    require_route(caller, found.route)
    return found


async def _find(control: Control, digest: str) -> Manifest:
    try:
        return await control.stores.datasets.get(digest)
    except NotFoundError:
        # Runs of older releases left nothing in the index.
        for run in await control.stores.runs.list(None, _RUNS_LOOKED_AT):
            if run.dataset == digest:
                return Manifest(digest, run.route, run.created_at, run.created_by, run.id)
        raise


async def lines(
    control: Control, caller: ApiKey, digest: str, name: Format, split: Split | None
) -> bytes:
    """The rows in a format."""
    found = await manifest(control, caller, digest)
    content = await asyncio.to_thread(control.artifacts.document, found.digest)
    if name == "rows" and split is None:
        return content
    return await asyncio.to_thread(lambda: b"".join(write_rows(load(content), name, split)))


async def dropped(
    control: Control, caller: ApiKey, digest: str, reason: str | None
) -> Sequence[Dropped]:
    """The cases that are not in it, each with its reason."""
    found, _ = await _ledger(control, await manifest(control, caller, digest))
    return [each for each in found if reason is None or reason in each.reason]


async def contradictions(control: Control, caller: ApiKey, digest: str) -> Sequence[Contradiction]:
    _, found = await _ledger(control, await manifest(control, caller, digest))
    return found


async def compare(control: Control, caller: ApiKey, before: str, after: str) -> DatasetDifference:
    """What became of each row from one dataset to the other."""
    old = await manifest(control, caller, before)
    new = await manifest(control, caller, after)
    left_out, _ = await _ledger(control, new)
    was, now = await _rows(control, old), await _rows(control, new)
    changes = await asyncio.to_thread(difference, was, now, left_out)
    return DatasetDifference(before=old, after=new, changes=tuple(changes))


async def _rows(control: Control, found: Manifest) -> Dataset:
    content = await asyncio.to_thread(control.artifacts.document, found.digest)
    dataset = await asyncio.to_thread(load, content)
    return replace(dataset, content=b"")


async def _ledger(
    control: Control, found: Manifest
) -> tuple[Sequence[Dropped], Sequence[Contradiction]]:
    if found.ledger is None:
        return (), ()
    content = await asyncio.to_thread(control.artifacts.document, found.ledger)
    return await asyncio.to_thread(read_ledger, content)


async def _ended(control: Control, run: TrainingRun, seconds: float) -> TrainingRun:
    async def follow() -> TrainingRun:
        while True:
            found = await control.stores.runs.get(run.id)
            if found.state in ENDED:
                return found
            await asyncio.sleep(_POLL_SECONDS)

    try:
        async with asyncio.timeout(seconds):
            return await follow()
    except TimeoutError:
        return await control.stores.runs.get(run.id)
