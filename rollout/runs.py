"""One training run, from the queue to a proposed version or a reason why not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

# What a run is to end in: a proposed version, or a dataset or a report alone.
RunKind = Literal["train", "dataset", "evaluation"]
RunState = Literal[
    "queued",
    "dataset",
    "training",
    "publishing",
    "evaluating",
    "paused",
    "proposed",
    "ready",
    "built",
    "evaluated",
    "refused",
    "failed",
    "cancelled",
]
ENDED: frozenset[RunState] = frozenset(
    {"proposed", "ready", "built", "evaluated", "refused", "failed", "cancelled"}
)


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """`config` holds what the asker set; the trainer fills in the rest by its own defaults.

    `parent` is the version (`route@number`) that the adapter must beat. `fence` grows with each
    trainer that takes the run; only the holder of the newest may write. `reason` says why it
    ended as it did, `why` what it was started for, where no person asked for it (then `trigger`
    names the rule). `labels` is how many decided cases the route had then. A run that does not
    `propose` ends as ready where it won. `checkpoint` names the state that a trainer left in the
    artifact store when it gave the run back.
    """

    id: str
    route: str
    parent: str
    created_at: datetime
    created_by: str
    config: Mapping[str, Any] = field(default_factory=dict)
    state: RunState = "queued"
    fence: int = 0
    dataset: str | None = None
    adapter: str | None = None
    version: str | None = None
    report: str | None = None
    reason: str = ""
    updated_at: datetime | None = None
    cancel_requested: bool = False
    kind: RunKind = "train"
    pause_requested: bool = False
    why: str = ""
    trigger: str = ""
    labels: int | None = None
    propose: bool = True
    checkpoint: str | None = None


@dataclass(frozen=True, slots=True)
class RunEvent:
    """A line of progress. `done` of `total` counts the steps of `stage`; `eta` is in seconds."""

    stage: str
    message: str
    at: datetime
    done: int = 0
    total: int = 0
    eta: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
