"""The bodies that the control API sends and its client reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from rollout.cases import Case, CaseState, JudgeRecord, Label, decide
from rollout.credentials import NO_LIMITS, KeyLimits
from rollout.datasets import Change, Manifest
from rollout.engines import Placement
from rollout.evidence import Evidence, Report, Verdict
from rollout.exchanges import Answer, Arm, Feedback
from rollout.planner import Standing
from rollout.records import HistoryEntry
from rollout.retraining import Outlook
from rollout.routes import Judge, Route
from rollout.runs import TrainingRun
from rollout.state import Rollout
from rollout.versions import Version

Verb = Literal["propose", "canary", "advance", "hold", "resume", "promote", "rollback", "withdraw"]
Source = Literal["capture", "gateway", "feedback", "version"]


@dataclass(frozen=True, slots=True)
class RouteView:
    route: Route
    rollout: Rollout


@dataclass(frozen=True, slots=True)
class RolloutView:
    """Where a rollout stands. `stable`, `candidate` and `previous` are version names.

    `evidence` and `verdicts` are the present trial's. `open_cases` still wait for a person.
    `placements` says of each of the three that has an adapter where it is resident, `standing` how
    far the trial has come in its plan and what it waits for. `queued` come after it. `retraining`
    says when the route is trained by itself next, where it ever is. `last` is the newest commit.
    """

    rollout: Rollout
    stable: str
    candidate: str | None
    previous: str | None
    evidence: Evidence | None
    verdicts: tuple[Verdict, ...]
    open_cases: int
    placements: Mapping[str, Placement] = field(default_factory=dict)
    standing: Standing | None = None
    queued: tuple[str, ...] = ()
    retraining: Outlook | None = None
    last: HistoryEntry | None = None


@dataclass(frozen=True, slots=True)
class Changed:
    """A committed change. Gateways follow it once they report `catalog_revision` or more."""

    rollout: Rollout
    catalog_revision: int


@dataclass(frozen=True, slots=True)
class VersionView:
    """`resident_on` are the replicas that answer for it now; `report` is its newest evaluation.

    `missing` are the replicas that answer, but not for it, and `down` those that don't answer, each
    with the reason.
    """

    name: str
    served_name: str
    resident_on: tuple[str, ...]
    version: Version
    report: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    down: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """`missing` are the versions that should be resident and are not, `down` why it is not ready."""

    url: str
    ready: bool
    served: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    down: str = ""


@dataclass(frozen=True, slots=True)
class EngineView:
    name: str
    kind: str
    base: str
    replicas: tuple[ReplicaView, ...]


@dataclass(frozen=True, slots=True)
class AnswerView:
    """`error` says why there is no answer."""

    text: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CaseView:
    """A case as a labeler sees it: nothing tells which version gave which answer, or what others
    said. It has `labels` of the `needed` ones; `mine` tells that the caller's is among them."""

    id: str
    route: str
    messages: tuple[Mapping[str, Any], ...]
    first: AnswerView
    second: AnswerView
    created_at: datetime
    state: CaseState
    labels: int = 0
    needed: int = 1
    mine: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """`recorded` is False where the case is decided, or has a label of the caller's already."""

    recorded: bool


@dataclass(frozen=True, slots=True)
class Imported:
    added: int
    known: int


@dataclass(frozen=True, slots=True)
class Remnant:
    """A dataset that holds erased `cases`, and what was trained on it. It stays as it is."""

    dataset: str
    cases: int
    runs: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ErasureView:
    """How much was erased, and `remnants`: what erasing does not reach."""

    cases: int
    labels: int
    captures: int
    feedback: int
    differences: int = 0
    remnants: tuple[Remnant, ...] = ()


@dataclass(frozen=True, slots=True)
class DatasetDifference:
    """What became of each row of `before` in `after`, and which are new; sorted by case."""

    before: Manifest
    after: Manifest
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class KeyView:
    id: str
    name: str
    scopes: tuple[str, ...]
    routes: tuple[str, ...] | None
    created_at: datetime
    limits: KeyLimits = NO_LIMITS


@dataclass(frozen=True, slots=True)
class NewKey:
    """The only time that the secret is shown."""

    secret: str
    key: KeyView


@dataclass(frozen=True, slots=True)
class Answered:
    """How one request was answered. `bucket` and `weight` are in percent: the unit belongs to the
    candidate where its bucket lies below the weight. None where it isn't known."""

    source: Source
    arm: Arm
    trial: str | None
    unit: str | None = None
    bucket: float | None = None
    weight: float | None = None
    instead: bool = False
    at: datetime | None = None
    status: int | None = None


@dataclass(frozen=True, slots=True)
class CaseOf:
    """A case that was made of the request. Its answers are not shown: somebody may judge it yet."""

    id: str
    trial: str
    kind: str
    agreement: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """`commit` is what let the version answer, `commits` all that moved it, oldest first. `run`
    trained it, `report` is its newest evaluation. `notes` say what could not be told, and why."""

    route: str
    request_id: str | None
    version: VersionView
    answered: Answered | None
    commit: HistoryEntry | None
    commits: tuple[HistoryEntry, ...]
    run: TrainingRun | None
    report: Report | None
    cases: tuple[CaseOf, ...]
    feedback: tuple[Feedback, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JudgeView:
    """`judge` is None where the route has none (now). The record is of the cases that are kept."""

    route: str
    judge: Judge | None
    record: JudgeRecord
    position_bias: float | None


def case_view(
    case: Case, state: CaseState, labels: Sequence[Label] = (), caller: str = ""
) -> CaseView:
    first, second = case.answers
    return CaseView(
        id=case.id,
        route=case.route,
        messages=case.messages,
        first=_answer_view(first),
        second=_answer_view(second),
        created_at=case.created_at,
        state=state,
        labels=len(labels),
        needed=decide(case, labels).needed,
        mine=any(label.labeler == caller for label in labels),
    )


def _answer_view(answer: Answer) -> AnswerView:
    error = None if answer.ok else "no usable answer"
    return AnswerView(text=answer.text, tool_calls=answer.tool_calls, error=error)
