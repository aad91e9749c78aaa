"""What each arm of each trial did at this worker, reported as absolute numbers.

Requests are all counted; units once each, by their first request. A unit that can't come again
counts at once. Of one that may have been seen by another worker the store is asked, about once a
second and beside the requests, and only the worker that was first counts it. So the request that
came first counts, however long its answer takes, and nothing that is sent twice counts twice.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from operator import attrgetter
from typing import Final, Literal

from rollout.errors import StoreUnavailableError
from rollout.evidence import ArmCounts
from rollout.state import Trial
from rollout.stores.evidence import (
    ARM_FIELDS,
    UNIT_FIELDS,
    Claim,
    Claimed,
    EvidenceStore,
    Row,
    Table,
)

_log = logging.getLogger(__name__)
_REPORT_SECONDS: Final = 1.0
# Units of which this worker knows that it was asked about them already. Who is forgotten is only
# asked about again.
_MAXIMUM_KNOWN: Final = 100_000
# Units that wait for the store's word; the rest is left out, whatever becomes of it.
_MAXIMUM_WAITING: Final = 20_000
_CLAIMED_AT_ONCE: Final = 2_000
# In between, requests have their turn.
_REPORTED_AT_ONCE: Final = 50
# Trials in a report. With more on, each is reported every few seconds: the store's work is bounded.
REPORTED_AT_MOST: Final = 100
# A ledger that is left behind is folded, and with it go the trials that have ended.
_LEDGER_SECONDS: Final = 86_400.0

TrialArm = Literal["stable", "candidate"]
# What one request or rating adds, in the order of UnitCounts.
_Ended = tuple[int, int, int, int, int, int]


class Tally:
    """The counts of one assigned arm: all its requests."""

    __slots__ = (
        "errors", "fallbacks", "negative", "positive", "requests", "seconds", "slow_first_token",
        "slow_total",
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

    def counts(self) -> ArmCounts:
        return ArmCounts(*_arm_row(self))

    def row(self) -> Row:
        row = list(_arm_row(self))
        row[_SECONDS] = round(row[_SECONDS], 3)
        return row

    def subtract(self, row: Row) -> None:
        for name, count in zip(ARM_FIELDS, row, strict=False):
            setattr(self, name, getattr(self, name) - count)


class UnitTally:
    """The counts of one assigned arm at one weight: each unit once."""

    __slots__ = ("bad", "errors", "rated", "slow_first_token", "slow_total", "units")

    def __init__(self) -> None:
        self.units = 0
        self.errors = 0
        self.slow_first_token = 0
        self.slow_total = 0
        self.rated = 0
        self.bad = 0

    def end(self, *, failed: bool, slow_first_token: bool, slow_total: bool) -> None:
        """Count a unit by how its first request ended."""
        self.units += 1
        self.errors += failed
        self.slow_first_token += slow_first_token
        self.slow_total += slow_total

    def rate(self, *, bad: bool) -> None:
        self.rated += 1
        self.bad += bad

    def row(self) -> tuple[int, ...]:
        row: tuple[int, ...] = _unit_row(self)
        return row

    def add(self, ended: _Ended) -> None:
        for name, count in zip(UNIT_FIELDS, ended, strict=True):
            if count:
                setattr(self, name, getattr(self, name) + count)

    def subtract(self, row: Row) -> None:
        for name, count in zip(UNIT_FIELDS, row, strict=True):
            setattr(self, name, getattr(self, name) - count)


class First:
    """What may be the first request of its unit: counts once it has ended and the store agrees.

    The same for what may be its first rating, which has ended from the beginning.
    """

    __slots__ = ("_ended", "_granted", "_tally", "book", "kind", "unit")

    def __init__(self, book: "Book", kind: Claimed, unit: str, tally: UnitTally) -> None:
        self.book = book
        self.kind = kind
        self.unit = unit
        self._tally = tally
        self._granted = False
        self._ended: _Ended | None = None

    def end(self, *, failed: bool, slow_first_token: bool, slow_total: bool) -> None:
        self._end((1, failed, slow_first_token, slow_total, 0, 0))

    def rate(self, *, bad: bool) -> None:
        self._end((0, 0, 0, 0, 1, bad))

    def grant(self) -> None:
        """Nobody else was first."""
        self._granted = True
        if self._ended is not None:
            self._count(self._ended)

    def _end(self, ended: _Ended) -> None:
        self._ended = ended
        if self._granted:
            self._count(ended)

    def _count(self, ended: _Ended) -> None:
        self._tally.add(ended)
        self.book.dirty = True


class Cell:
    """Where a request counts: in an arm of a trial, and there at the weight of the moment.

    `units` is None in the shadow, where nothing is assigned to the candidate: units are counted
    from the moment on at which they could have come to either arm.
    """

    __slots__ = ("book", "tally", "units")

    def __init__(self, book: "Book", tally: Tally, units: UnitTally | None) -> None:
        self.book = book
        self.tally = tally
        self.units = units

    def first(self, unit: str) -> First | None:
        """A request of a unit that may come again; None where it is not its first one here."""
        if self.units is None:
            return None
        return self.book.first(unit, self.units)

    def rate(self, unit: str, *, bad: bool) -> None:
        """Count what a caller says of an answer; `unit` is empty where it can't come again."""
        self.tally.positive += not bad
        self.tally.negative += bad
        self.book.dirty = True
        if self.units is None:
            return
        if not unit:
            self.units.rate(bad=bad)
        elif (first := self.book.claims.put(self.book, "rated", unit, self.units)) is not None:
            first.rate(bad=bad)


class Claims:
    """Units that wait for the store's word; at most `maximum` of them."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.dropped = 0
        self.waiting = deque[First]()

    def put(self, book: "Book", kind: Claimed, unit: str, tally: UnitTally) -> First | None:
        if len(self.waiting) >= self.maximum:
            self.dropped += 1
            return None
        first = First(book, kind, unit, tally)
        self.waiting.append(first)
        return first


class Known:
    """Units that this worker need not ask about again; the older ones go where they are many."""

    def __init__(self, maximum: int) -> None:
        self._half = maximum // 2
        self._count = 0
        # By book, because a set of pairs would be many objects for the garbage collector.
        self._new: dict[Book, set[str]] = {}
        self._old: dict[Book, set[str]] = {}

    def add(self, book: "Book", unit: str) -> bool:
        """Whether it was not known yet."""
        units = self._new.get(book)
        if units is None:
            units = self._new[book] = set()
        elif unit in units:
            return False
        before = self._old.get(book)
        known = before is not None and unit in before
        units.add(unit)
        self._count += 1
        if self._count >= self._half:
            self._old, self._new, self._count = self._new, {}, 0
        return not known

    def discard(self, book: "Book", unit: str) -> None:
        for units in (self._new, self._old):
            units.get(book, set()).discard(unit)

    def forget(self, books: Iterable["Book"]) -> None:
        for book in books:
            self._new.pop(book, None)
            self._old.pop(book, None)


class Book:
    """All that this worker counts of one trial; `dirty` until it was reported."""

    def __init__(self, route: str, trial: str, claims: Claims, known: Known) -> None:
        self.route = route
        self.trial = trial
        self.claims = claims
        self.dirty = False
        self._known = known
        self._arms: dict[TrialArm, Tally] = {"stable": Tally(), "candidate": Tally()}
        self._strata: dict[float, dict[TrialArm, UnitTally]] = {}
        self._cells: dict[tuple[float, TrialArm], Cell] = {}
        # What was sent last, and before that: it may have arrived.
        self._sent = self._sent_before = _NOTHING

    def tally(self, arm: TrialArm) -> Tally:
        return self._arms[arm]

    def cell(self, weight: float, arm: TrialArm) -> Cell:
        cell = self._cells.get((weight, arm))
        if cell is None:
            units = None
            if weight > 0:
                new: dict[TrialArm, UnitTally] = {"stable": UnitTally(), "candidate": UnitTally()}
                units = self._strata.setdefault(weight, new)[arm]
            cell = self._cells[weight, arm] = Cell(self, self._arms[arm], units)
        return cell

    def first(self, unit: str, tally: UnitTally) -> First | None:
        if not self._known.add(self, unit):
            return None
        first = self.claims.put(self, "seen", unit, tally)
        if first is None:
            self._known.discard(self, unit)
        return first

    def send(self) -> Table:
        """The counts as they are reported now."""
        self.dirty = False
        self._sent_before = self._sent
        self._sent = Table(
            self._arms["stable"].row(),
            self._arms["candidate"].row(),
            [
                (weight, *arms["stable"].row(), *arms["candidate"].row())
                for weight, arms in self._strata.items()
            ],
        )
        return self._sent

    def refuse(self) -> None:
        """What was sent last was not taken."""
        self.dirty = True
        self._sent = self._sent_before

    def start_again(self) -> None:
        """Go on with what was never sent: all else stands in a ledger that is closed.

        What was sent and may not have arrived is left out, so that nothing can count twice.
        """
        self._arms["stable"].subtract(self._sent.stable)
        self._arms["candidate"].subtract(self._sent.candidate)
        for weight, *row in self._sent.strata:
            self._strata[weight]["stable"].subtract(row[: len(UNIT_FIELDS)])
            self._strata[weight]["candidate"].subtract(row[len(UNIT_FIELDS) :])
        self._sent = _NOTHING


class Evidence:
    """The books of this incarnation, and the ledger into which they are written."""

    def __init__(self, incarnation: str, *, maximum_waiting: int = _MAXIMUM_WAITING) -> None:
        self._incarnation = incarnation
        self._ledger = incarnation
        self._ledgers = 0
        # What the relay gives to a request that comes without an id never comes again.
        self._own_ids = f"{incarnation[:16]}-"
        self._known = Known(_MAXIMUM_KNOWN)
        self._claims = Claims(maximum_waiting)
        self._books: dict[str, Book] = {}

    def cell(self, route: str, trial: Trial, arm: TrialArm) -> Cell:
        """Where a request of the arm counts now."""
        return self._book(route, trial.id).cell(trial.weight, arm)

    def comes_again(self, sticky: str | None, request_id: str) -> bool:
        """Whether a unit that was named so may be seen more than once, here or elsewhere.

        A client that sends an id of its own may send the same one for every request.
        """
        return bool(sticky) or not request_id.startswith(self._own_ids)

    def tally(self, route: str, trial: str, arm: TrialArm) -> Tally:
        return self._book(route, trial).tally(arm)

    def take_dropped(self) -> int:
        """Units that were left out since the last call, because too many waited for the store."""
        dropped, self._claims.dropped = self._claims.dropped, 0
        return dropped

    def forget(self, trials_on: Collection[str]) -> None:
        """Let go of trials that have ended and were reported to the end."""
        waiting = {first.book for first in self._claims.waiting}
        gone = {
            book
            for trial, book in self._books.items()
            if trial not in trials_on and not book.dirty and book not in waiting
        }
        for book in gone:
            del self._books[book.trial]
        self._known.forget(gone)

    async def flush(self, store: EvidenceStore, at_most: int | None = None) -> None:
        """Claim what waits and report what has changed, of so many trials; the others come first
        the next time. Raises StoreUnavailableError; nothing is lost by that."""
        await self._claim(store)
        dirty = [book for book in self._books.values() if book.dirty][:at_most]
        for first in range(0, len(dirty), _REPORTED_AT_ONCE):
            books = dirty[first : first + _REPORTED_AT_ONCE]
            await self._report(store, books)
            for book in books:
                self._books[book.trial] = self._books.pop(book.trial)

    async def report(self, store: EvidenceStore, dropped: Callable[[int], None]) -> None:
        """Flush about once a second, for ever; `dropped` is told how many units were left out."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            try:
                await self.flush(store, REPORTED_AT_MOST)
                if loop.time() - since > _LEDGER_SECONDS:
                    since = loop.time()
                    self._open_ledger()
            except StoreUnavailableError:
                pass  # it is all reported later
            except Exception:  # noqa: BLE001 - this loop must not end; it says what happened
                _log.exception("evidence could not be reported; it is tried again")
            finally:
                dropped(self.take_dropped())

    async def _claim(self, store: EvidenceStore) -> None:
        waiting = self._claims.waiting
        while waiting:
            asked = list(islice(waiting, _CLAIMED_AT_ONCE))
            groups = _grouped(asked)
            claims = [
                Claim(book.route, book.trial, kind, [first.unit for first in firsts])
                for (book, kind), firsts in groups.items()
            ]
            answers = await store.claim(claims)
            for _ in asked:
                waiting.popleft()
            for firsts, news in zip(groups.values(), answers, strict=True):
                for first, new in zip(firsts, news, strict=True):
                    if new:
                        first.grant()

    async def _report(self, store: EvidenceStore, books: Sequence[Book]) -> None:
        for _ in range(2):
            sent = {(book.route, book.trial): book.send() for book in books}
            try:
                if await store.report(self._ledger, sent):
                    return
            except BaseException:
                for book in books:
                    book.dirty = True
                raise
            for book in books:
                book.refuse()
            _log.info("this worker was silent for long: its evidence goes on in a new ledger")
            self._open_ledger()

    def _open_ledger(self) -> None:
        self._ledgers += 1
        self._ledger = f"{self._incarnation}.{self._ledgers}"
        for book in self._books.values():
            book.start_again()

    def _book(self, route: str, trial: str) -> Book:
        book = self._books.get(trial)
        if book is None:
            book = self._books[trial] = Book(route, trial, self._claims, self._known)
        return book


_NOTHING: Final = Table((), (), ())
_SECONDS: Final = ARM_FIELDS.index("seconds")
_arm_row: Final = attrgetter(*ARM_FIELDS)
_unit_row: Final = attrgetter(*UNIT_FIELDS)


def _grouped(asked: Sequence[First]) -> dict[tuple[Book, Claimed], list[First]]:
    groups: dict[tuple[Book, Claimed], list[First]] = {}
    for first in asked:
        groups.setdefault((first.book, first.kind), []).append(first)
    return groups
