"""All that speaks Redis. `open_stores` gives one object for each kind of thing that is kept."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rollout.records import AuditEntry, CaseStats, GatewayPresence, HistoryEntry
from rollout.stores.audit import AuditStore
from rollout.stores.captures import CaptureStore, Keeping, Settled, Taken
from rollout.stores.cases import CaseStore
from rollout.stores.catalog import CatalogStore
from rollout.stores.credentials import CredentialStore
from rollout.stores.datasets import DatasetStore
from rollout.stores.erasure import Erased, ErasureStore
from rollout.stores.evidence import EvidenceStore
from rollout.stores.feedback import FeedbackStore
from rollout.stores.leases import LeaseStore
from rollout.stores.link import RedisLink, connect
from rollout.stores.presence import PresenceStore
from rollout.stores.questions import QuestionStore
from rollout.stores.quotas import QuotaStore
from rollout.stores.replays import ReplayStore
from rollout.stores.rollouts import Commit, RolloutStore
from rollout.stores.runs import ReportStore, RunStore
from rollout.stores.suites import SuiteStore

__all__ = [
    "AuditEntry",
    "CaseStats",
    "Commit",
    "Erased",
    "GatewayPresence",
    "HistoryEntry",
    "Keeping",
    "Settled",
    "Stores",
    "Taken",
    "open_stores",
]


class Stores:
    """Every store on one connection pool. Each method raises StoreUnavailableError when Redis
    does not answer."""

    def __init__(self, link: RedisLink, keeping: Keeping | None = None) -> None:
        self._link = link
        self.catalog = CatalogStore(link)
        self.rollouts = RolloutStore(link)
        self.credentials = CredentialStore(link)
        self.presence = PresenceStore(link)
        self.leases = LeaseStore(link)
        self.captures = CaptureStore(link, keeping)
        self.replays = ReplayStore(link)
        self.evidence = EvidenceStore(link)
        self.quotas = QuotaStore(link)
        self.cases = CaseStore(link)
        self.erasure = ErasureStore(link, self.cases, self.captures)
        self.feedback = FeedbackStore(link)
        self.questions = QuestionStore(link)
        self.runs = RunStore(link)
        self.datasets = DatasetStore(link)
        self.reports = ReportStore(link)
        self.suites = SuiteStore(link)
        self.audit = AuditStore(link)

    async def ping(self) -> None:
        """Raises StoreUnavailableError unless the store answers."""
        await self._link.run("PING")


@asynccontextmanager
async def open_stores(url: str, keeping: Keeping | None = None) -> AsyncIterator[Stores]:
    """Open the stores on a Redis URL; a store that is down is no error until it is used."""
    async with connect(url) as link:
        yield Stores(link, keeping)
