"""The labeling queue: claim with a lease, label once, export and import."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rollout.cases import Case, CaseState, Label, LabelledCase, outcome
from rollout.errors import ConflictError, NotFoundError
from rollout.stores import keys
from rollout.stores.codec import decode, encode, milliseconds
from rollout.stores.link import RedisLink

# How many of a big table are fetched in one command.
_BATCH = 1000
# Pairs of these kinds were counted when they were compared.
_DECIDED = frozenset({"failure", "schema"})


@dataclass(frozen=True, slots=True)
class CaseStats:
    """Cases of one route. `oldest_at` is when the oldest one that still waits was made."""

    route: str
    open: int
    leased: int
    labelled: int
    dropped: int
    oldest_at: datetime | None


class CaseStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def claim(
        self,
        labeler: str,
        *,
        route: str | None = None,
        count: int = 1,
        lease_seconds: float = 600.0,
    ) -> list[Case]:
        """Lease up to `count` cases, those of the highest priority first within each route."""
        claimed: list[Case] = []
        for name in await self._routes(route):
            if len(claimed) >= count:
                break
            rows = await self._link.script(
                "claim",
                [
                    keys.CASES,
                    keys.cases_open(name),
                    keys.cases_leased(name),
                    keys.CASE_LEASES,
                ],
                [labeler, count - len(claimed), int(lease_seconds * 1000)],
            )
            claimed += [decode(Case, row) for row in rows]
        return claimed

    async def label(self, label: Label) -> bool:
        """Record what a person said and count what it decides, in one atomic step.

        Returns False where the case has a label already: the second one changes nothing. Raises
        NotFoundError for an unknown case, ConflictError where another labeler holds it.
        """
        case = await self.get(label.case)
        field = {"win": "wins", "loss": "losses", "tie": "ties"}[outcome(case, label)]
        result = await self._link.script(
            "label",
            [
                keys.CASES,
                keys.LABELS,
                keys.CASE_LEASES,
                keys.cases_open(case.route),
                keys.cases_leased(case.route),
                keys.cases_waiting(case.route),
                keys.cases_labelled(case.route),
                keys.pairs(case.route, case.trial),
            ],
            [
                case.id,
                encode(label),
                label.labeler,
                milliseconds(label.labelled_at),
                "" if case.kind in _DECIDED else field,
            ],
        )
        if result == -1:
            raise _no_case(label.case)
        if result == -2:
            raise ConflictError(f"another labeler holds case {label.case!r}: claim another one")
        return bool(result)

    async def release(self, case_id: str, labeler: str) -> None:
        """Give a claimed case back; raises ConflictError where `labeler` does not hold it."""
        case = await self.get(case_id)
        released = await self._link.script(
            "release_case",
            [
                keys.CASES,
                keys.cases_open(case.route),
                keys.cases_leased(case.route),
                keys.CASE_LEASES,
            ],
            [case_id, labeler],
        )
        if not released:
            raise ConflictError(f"you do not hold case {case_id!r}: its lease has run out")

    async def get(self, case_id: str) -> Case:
        text = await self._link.run("HGET", keys.CASES, case_id)
        if text is None:
            raise _no_case(case_id)
        return decode(Case, text)

    async def list(
        self, route: str | None = None, state: CaseState | None = None, limit: int = 100
    ) -> list[tuple[Case, CaseState]]:
        """Cases with their state: open ones by priority, then leased, then labelled ones."""
        found: list[tuple[Case, CaseState]] = []
        for name in await self._routes(route):
            sets: list[tuple[CaseState, str]] = [
                ("open", keys.cases_open(name)),
                ("leased", keys.cases_leased(name)),
                ("labelled", keys.cases_labelled(name)),
            ]
            for kind, key in sets:
                room = limit - len(found)
                if room > 0 and state in (None, kind):
                    ids = await self._link.run("ZREVRANGE", key, 0, room - 1)
                    found += [(case, kind) for case in await self._cases(ids)]
        return found

    async def labelled(self, route: str) -> Sequence[LabelledCase]:
        """Every labelled case of the route, the oldest label first."""
        ids = await self._link.run("ZRANGE", keys.cases_labelled(route), 0, -1)
        labels: list[Label] = []
        for start in range(0, len(ids), _BATCH):
            rows = await self._link.run("HMGET", keys.LABELS, *ids[start : start + _BATCH])
            labels += [decode(Label, row) for row in rows]
        cases = await self._cases(ids)
        return [LabelledCase(case, label) for case, label in zip(cases, labels, strict=True)]

    async def put_labelled(self, rows: Sequence[LabelledCase]) -> int:
        """Import labelled cases. Ids that exist are left alone; returns how many were added."""
        added = 0
        for row in rows:
            if await self._link.run("HEXISTS", keys.CASES, row.case.id):
                continue
            at = milliseconds(row.label.labelled_at)
            await self._link.run_all(
                [
                    ("HSET", keys.CASES, row.case.id, encode(row.case)),
                    ("HSET", keys.LABELS, row.case.id, encode(row.label)),
                    ("ZADD", keys.cases_labelled(row.case.route), at, row.case.id),
                ]
            )
            added += 1
        return added

    async def stats(self, route: str | None = None) -> Sequence[CaseStats]:
        return [await self._stats(name) for name in await self._routes(route)]

    async def _stats(self, route: str) -> CaseStats:
        opened, leased, labelled, dropped, oldest = await self._link.run_all(
            [
                ("ZCARD", keys.cases_open(route)),
                ("ZCARD", keys.cases_leased(route)),
                ("ZCARD", keys.cases_labelled(route)),
                ("HGET", keys.CASES_DROPPED, route),
                ("ZRANGE", keys.cases_waiting(route), 0, 0, "WITHSCORES"),
            ]
        )
        return CaseStats(
            route=route,
            open=int(opened),
            leased=int(leased),
            labelled=int(labelled),
            dropped=int(dropped or 0),
            oldest_at=_time(oldest[1]) if oldest else None,
        )

    async def _routes(self, route: str | None) -> Sequence[str]:
        if route is not None:
            return [route]
        return sorted(await self._link.run("HKEYS", keys.ROUTES))

    async def _cases(self, ids: Sequence[str]) -> Sequence[Case]:
        found: list[Case] = []
        for start in range(0, len(ids), _BATCH):
            rows = await self._link.run("HMGET", keys.CASES, *ids[start : start + _BATCH])
            found += [decode(Case, row) for row in rows]
        return found


def _time(score: float | str) -> datetime:
    return datetime.fromtimestamp(float(score) / 1000, UTC)


def _no_case(case_id: str) -> NotFoundError:
    return NotFoundError(f"there is no case {case_id!r}", param="case")
