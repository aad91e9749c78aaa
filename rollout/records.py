"""What the store says of itself to whoever looks: the history, the audit, gateways, counts of cases."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from rollout.state import Event, Rollout
from rollout.tallies import Agreement, WinRate


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One step in a route's history. `revision` is the rollout's after it."""

    revision: int
    event: Event
    at: datetime
    before: Rollout
    after: Rollout


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """`before` and `after` are JSON texts of what changed, None where there is no such side."""

    action: str
    subject: str
    by: str
    at: datetime
    reason: str = ""
    before: str | None = None
    after: str | None = None


@dataclass(frozen=True, slots=True)
class GatewayPresence:
    """One gateway worker process. `incarnation` is new with every start."""

    incarnation: str
    host: str
    pid: int
    revision: int
    started_at: datetime
    draining: bool = False


@dataclass(frozen=True, slots=True)
class CaseStats:
    """Cases of one route. `oldest_at` is when the oldest one that still waits was made.

    `agreement` is that between its labelers, `win_rates` what labels say of each trial.
    """

    route: str
    open: int
    leased: int
    labelled: int
    dropped: int
    oldest_at: datetime | None
    disputed: int = 0
    agreement: Agreement = field(default_factory=Agreement)
    win_rates: Mapping[str, WinRate] = field(default_factory=dict)
