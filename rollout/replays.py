"""A replay: past captures of a route put through a version, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal

from rollout.evidence import PairCounts

ReplayState = Literal["queued", "running", "done", "cancelled", "failed"]
ENDED: Final[frozenset[ReplayState]] = frozenset({"done", "cancelled", "failed"})


@dataclass(frozen=True, slots=True)
class Replay:
    """What was asked for, and how far it has come. `version` is a number of the route's.

    Exchanges captured between `since` and `asked_at` take part, the newest first, at most `limit`.
    Its `id` stands in the place of a trial's where its cases are counted. `found` is how many took
    part, known once all were seen; `reason` says why it ended otherwise than done.
    """

    id: str
    route: str
    version: int
    since: datetime
    limit: int
    by: str
    asked_at: datetime
    state: ReplayState = "queued"
    found: int | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    reason: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True, slots=True)
class Difference:
    """One exchange that the version answered otherwise; texts are cut short.

    `then_version` gave the answer `then`, the replayed version `now`. `case` is the id under which
    a person may judge it, if it was chosen for one.
    """

    request_id: str
    agreement: float
    kind: str
    asked: str
    then_version: int
    then: str
    now: str
    case: str | None = None


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """`kinds` are the pairs by the step that settled them, `skipped` the exchanges that made no
    pair, by reason. Wins, losses and ties in `pairs` are the replayed version's."""

    replay: Replay
    settled: int = 0
    pairs: PairCounts = field(default_factory=PairCounts)
    kinds: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    offered: int = 0
    differences: tuple[Difference, ...] = ()
