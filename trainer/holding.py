"""The run that a trainer holds: all that is written about it, and the lease that allows it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from rollout.errors import StoreUnavailableError
from rollout.runs import RunEvent, RunState, TrainingRun
from rollout.stores import Stores
from trainer.sinks import Watcher

log = logging.getLogger(__name__)
T = TypeVar("T")

_NOTE_SECONDS: Final = 1.0
_WANT_SECONDS: Final = 600.0
_STORE_PATIENCE_SECONDS: Final = 300.0


class RunInHand:
    """The run that this trainer holds. All that is written about it goes through here."""

    def __init__(self, stores: Stores, run: TrainingRun, watchers: Sequence[Watcher] = ()) -> None:
        self.run = run
        self._stores = stores
        self._watchers = watchers
        self._wanted: tuple[str, ...] = ()
        self._noted = 0.0

    async def advance(self, state: RunState, message: str, **changes: Any) -> None:
        """Store the run in its new state. Raises LeaseLostError where another trainer has it."""
        after = replace(self.run, state=state, **changes)
        await patiently(lambda: self._stores.runs.update(after))
        self.run = after
        log.info("run %s: %s: %s", self.run.id, state, message)
        for watcher in self._watchers:
            watcher.advanced(after)
        await self.note(message)

    def lost(self) -> None:
        """Another trainer has it: nothing more is written about it from here."""
        for watcher in self._watchers:
            watcher.advanced(replace(self.run, state="queued"))

    async def note(
        self,
        message: str,
        *,
        done: int = 0,
        total: int = 0,
        eta: float | None = None,
        values: Mapping[str, float] | None = None,
    ) -> None:
        """Tell whoever watches. A line that cannot be stored is lost, and nothing else is."""
        event = RunEvent(self.run.state, message, datetime.now(UTC), done, total, eta, values or {})
        for watcher in self._watchers:
            watcher.noted(self.run, event)
        with contextlib.suppress(StoreUnavailableError):
            await self._stores.runs.note(self.run.id, event)
        self._noted = time.monotonic()

    async def note_progress(
        self,
        message: str,
        *,
        done: int,
        total: int,
        eta: float | None = None,
        values: Mapping[str, float] | None = None,
    ) -> None:
        """As `note`, but at most one line a second, the last one always."""
        if done == total or time.monotonic() - self._noted >= _NOTE_SECONDS:
            await self.note(message, done=done, total=total, eta=eta, values=values)

    async def want(self, *names: str) -> None:
        """Have these versions on the engines until `let_go`, whether routes ask them or not."""
        self._wanted = names
        await self._want_for(_WANT_SECONDS)

    async def let_go(self) -> None:
        """What was wanted for the evaluation alone may leave the engines."""
        with contextlib.suppress(StoreUnavailableError):
            await self._want_for(0)

    async def _want_for(self, seconds: float) -> None:
        for name in self._wanted:
            await self._stores.catalog.want(name, seconds)

    async def keep_lease(self, seconds: float) -> RunState:
        """Renew it until somebody asks the run to be "cancelled" or "paused", which is returned.

        Raises LeaseLostError where another trainer has it, and StoreUnavailableError while there is
        still time to stop before one might.
        """
        pause = seconds / 6
        give_up = time.monotonic() + seconds / 2
        while True:
            asked = time.monotonic()
            try:
                # A store that hangs must not be waited for until the lease is over.
                async with asyncio.timeout(min(2 * pause, give_up - asked)):
                    seen = await self._stores.runs.renew(self.run, seconds)
                    give_up = asked + seconds / 2
                    await self._want_for(_WANT_SECONDS)
                if seen.cancel_requested:
                    return "cancelled"
                if seen.pause_requested:
                    return "paused"
            except (StoreUnavailableError, TimeoutError) as exc:
                log.warning("cannot renew the lease on run %s: %s", self.run.id, exc)
                if time.monotonic() >= give_up:
                    raise StoreUnavailableError(
                        "the lease cannot be renewed, for the store does not answer"
                    ) from exc
            await asyncio.sleep(max(0.0, min(pause, give_up - time.monotonic())))


async def patiently(write: Callable[[], Awaitable[T]]) -> T:
    """Try again while the store is away, for minutes: what was trained is worth the wait."""
    give_up = time.monotonic() + _STORE_PATIENCE_SECONDS
    while True:
        try:
            return await write()
        except StoreUnavailableError as exc:
            if time.monotonic() > give_up:
                raise
            log.warning("%s; trying again", exc.message)
            await asyncio.sleep(1.0)
