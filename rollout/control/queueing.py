"""Runs on their way to a trainer: made as of now, and only so many of a kind wait for one route."""

import secrets
from collections.abc import Mapping
from typing import Any, Final

from rollout.control.context import Control
from rollout.credentials import ApiKey
from rollout.errors import ConflictError
from rollout.runs import ENDED, RunKind, TrainingRun

# One trainer works on one run at a time: what is queued beyond this waits for days.
_MAXIMUM_WAITING: Final = 10
_NAMES: Final[Mapping[RunKind, str]] = {
    "train": "run",
    "dataset": "dataset",
    "evaluation": "evaluation",
}


async def check_room(control: Control, route: str, kind: RunKind) -> None:
    """Raises ConflictError where as many of the route's runs wait as are worth waiting for."""
    runs = await control.stores.runs.list(route)
    waiting = sum(run.state not in ENDED and run.kind == kind for run in runs)
    if waiting >= _MAXIMUM_WAITING:
        raise ConflictError(
            f"{waiting} {_NAMES[kind]}s of {route} are under way or queued: wait, or cancel some"
        )


def run_of_now(
    control: Control,
    caller: ApiKey,
    kind: RunKind,
    route: str,
    parent: str,
    config: Mapping[str, Any],
) -> TrainingRun:
    """A run that nobody has queued yet."""
    now = control.now()
    return TrainingRun(
        id=f"{_NAMES[kind]}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
        route=route,
        parent=parent,
        created_at=now,
        created_by=caller.name,
        config=config,
        kind=kind,
    )
