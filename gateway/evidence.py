"""What each arm of each trial did at this worker, reported as absolute numbers."""

import asyncio
import logging
from collections.abc import Collection
from typing import Final, Literal

from rollout.errors import StoreUnavailableError
from rollout.evidence import ArmCounts
from rollout.stores.evidence import EvidenceStore

_log = logging.getLogger(__name__)
_REPORT_SECONDS: Final = 1.0

TrialArm = Literal["stable", "candidate"]


class Tally:
    """The counts of one assigned arm; `dirty` until they were reported."""

    __slots__ = (
        "dirty", "errors", "fallbacks", "negative", "positive", "requests", "seconds",
        "slow_first_token", "slow_total",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.fallbacks = 0
        self.slow_first_token = 0
        self.slow_total = 0
        self.seconds = 0.0
        self.positive = 0
        self.negative = 0
        self.dirty = False

    def counts(self) -> ArmCounts:
        return ArmCounts(
            requests=self.requests,
            errors=self.errors,
            fallbacks=self.fallbacks,
            slow_first_token=self.slow_first_token,
            slow_total=self.slow_total,
            seconds=self.seconds,
            positive=self.positive,
            negative=self.negative,
        )


class Evidence:
    """The tallies of this incarnation. Values are absolute, so a repeated report counts once."""

    def __init__(self, incarnation: str) -> None:
        self._incarnation = incarnation
        self._tallies: dict[tuple[str, str], dict[TrialArm, Tally]] = {}

    def tally(self, route: str, trial: str, arm: TrialArm) -> Tally:
        arms = self._tallies.get((route, trial))
        if arms is None:
            arms = self._tallies[(route, trial)] = {"stable": Tally(), "candidate": Tally()}
        return arms[arm]

    def forget(self, trials_on: Collection[str]) -> None:
        """Let go of trials that have ended and were reported to the end."""
        for route, trial in list(self._tallies):
            arms = self._tallies[(route, trial)]
            if trial not in trials_on and not any(tally.dirty for tally in arms.values()):
                del self._tallies[(route, trial)]

    async def flush(self, store: EvidenceStore) -> None:
        """Report what has changed. Raises StoreUnavailableError; nothing is lost by that."""
        for (route, trial), arms in list(self._tallies.items()):
            if not any(tally.dirty for tally in arms.values()):
                continue
            for tally in arms.values():
                tally.dirty = False
            try:
                await store.report(
                    self._incarnation,
                    route,
                    trial,
                    {arm: tally.counts() for arm, tally in arms.items()},
                )
            except BaseException:
                for tally in arms.values():
                    tally.dirty = True
                raise

    async def report(self, store: EvidenceStore) -> None:
        """Flush about once a second, for ever."""
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            try:
                await self.flush(store)
            except StoreUnavailableError:
                continue
            except Exception:  # noqa: BLE001 - this loop must not end; it says what happened
                _log.exception("evidence could not be reported; it is tried again")
