"""The labeling queue: claim with a lease, label until it is decided, erase, export and import."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from rollout import tallies
from rollout.cases import Case, CaseState, Label, LabelledCase, decide, prompt_digest
from rollout.errors import ConflictError, NotFoundError
from rollout.exchanges import Outcome
from rollout.records import CaseStats
from rollout.stores import keys
from rollout.stores.captures import KEEP_TRIAL_SECONDS
from rollout.stores.codec import decode, encode, milliseconds
from rollout.stores.link import RedisLink

# How many of a big table are fetched in one command.
_BATCH = 1000
# How many cases the store looks through in one step: about 2 ms, in which it does nothing else.
_SCANNED = 200
# How often a label is tried anew because somebody else labelled the case at the same moment.
_TRIES = 5
_COUNTED_AS: Mapping[Outcome, str] = {"win": "wins", "loss": "losses", "tie": "ties"}
# Pairs of these kinds were counted when they were compared, or belong to no trial.
_DECIDED = frozenset({"failure", "schema", "judge", "contradiction"})


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
        """Lease up to `count` cases, those of the highest priority first within each route.

        What this labeler has labelled already is left for others.
        """
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
                    keys.LABELS,
                ],
                [
                    labeler,
                    count - len(claimed),
                    int(lease_seconds * 1000),
                    _labeler_field(labeler),
                ],
            )
            claimed += [decode(Case, row) for row in rows]
        return claimed

    async def label(self, label: Label) -> bool:
        """Record what a person said and count what it decides, in one atomic step.

        The case is open again where it takes another person's label. Returns False where the case
        is decided, or has a label of this labeler already: another one changes nothing. Raises
        NotFoundError for an unknown case, ConflictError where another labeler holds it.
        """
        case = await self.get(label.case)
        for _ in range(_TRIES):
            before = await self._link.run("HGET", keys.LABELS, case.id) or ""
            result = await self._append(case, before, label)
            if result >= 0:
                return bool(result)
            if result == -1:
                raise _no_case(label.case)
            if result == -2:
                raise ConflictError(f"another labeler holds case {label.case!r}: claim another one")
        raise ConflictError(f"several people label case {label.case!r} at this moment: try again")

    async def _append(self, case: Case, before: str, label: Label) -> int:
        known = _labels(before)
        decision = decide(case, [*known, label])
        counts = decision.outcome is not None and case.kind not in _DECIDED
        return int(
            await self._link.script(
                "label",
                [
                    *_places(case.route),
                    keys.pairs(case.route, case.trial),
                    keys.case_tallies(case.route),
                ],
                [
                    case.id,
                    encode(label),
                    label.labeler,
                    _labeler_field(label.labeler),
                    before,
                    milliseconds(label.labelled_at),
                    decision.state,
                    case.priority,
                    _COUNTED_AS[decision.outcome] if decision.outcome and counts else "",
                    KEEP_TRIAL_SECONDS,
                    *_arguments(
                        tallies.changes(_tallies(case, known), _tallies(case, [*known, label]))
                    ),
                ],
            )
        )

    async def offer(self, case: Case, maximum_cases: int) -> bool:
        """Put a case before people that no exchange brought. False where it is or was there
        already, or the queue is full, which is counted."""
        offered = await self._link.script(
            "offer_case",
            [
                keys.CASES,
                keys.cases_open(case.route),
                keys.cases_waiting(case.route),
                keys.cases_created(case.route),
                keys.CASES_DROPPED,
                keys.case_tallies(case.route),
            ],
            [
                case.id,
                encode(case),
                case.priority,
                milliseconds(case.created_at),
                case.route,
                maximum_cases,
                tallies.offered(case),
            ],
        )
        return bool(offered)

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
        """Cases with their state: open ones by priority, then leased, then decided ones."""
        found: list[tuple[Case, CaseState]] = []
        for name in await self._routes(route):
            sets: list[tuple[CaseState, str]] = [
                ("open", keys.cases_open(name)),
                ("leased", keys.cases_leased(name)),
                ("labelled", keys.cases_labelled(name)),
                ("disputed", keys.cases_disputed(name)),
            ]
            for kind, key in sets:
                room = limit - len(found)
                if room > 0 and state in (None, kind):
                    ids = await self._link.run("ZREVRANGE", key, 0, room - 1)
                    found += [(case, kind) for case in await self._cases(ids)]
        return found

    async def labels(self, ids: Sequence[str]) -> Mapping[str, Sequence[Label]]:
        """What was said of these cases so far, the oldest label first."""
        found: dict[str, Sequence[Label]] = {}
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            rows = await self._link.run("HMGET", keys.LABELS, *batch)
            found |= {name: _labels(row or "") for name, row in zip(batch, rows, strict=True)}
        return found

    async def labelled(self, route: str) -> Sequence[LabelledCase]:
        """Every case of the route that its labels decided, the first decided first."""
        return await self._labelled(
            await self._link.run("ZRANGE", keys.cases_labelled(route), 0, -1)
        )

    async def _labelled(self, ids: Sequence[str]) -> Sequence[LabelledCase]:
        labels = await self.labels(ids)
        found: list[LabelledCase] = []
        for case in await self._cases(ids):
            deciding = decide(case, labels[case.id]).label
            # One that was erased in between has no labels any more.
            if deciding is not None:
                others = tuple(label for label in labels[case.id] if label is not deciding)
                found.append(LabelledCase(case, deciding, others))
        return found

    async def decided_count(self, route: str, since: datetime | None = None) -> int:
        """How many cases labels have decided, or how many of them since then."""
        first = "-inf" if since is None else f"({milliseconds(since)}"
        return int(await self._link.run("ZCOUNT", keys.cases_labelled(route), first, "+inf"))

    async def newest_labelled(self, route: str, count: int) -> Sequence[LabelledCase]:
        """The cases that labels decided last, the newest first."""
        ids = await self._link.run("ZREVRANGE", keys.cases_labelled(route), 0, count - 1)
        return await self._labelled(ids)

    async def tallies(self, route: str) -> Mapping[str, int]:
        """How many of the stored cases belong to each tally (rollout/tallies.py)."""
        counted = await self._link.run("HGETALL", keys.case_tallies(route))
        return {name: int(count) for name, count in counted.items()}

    async def put_labelled(self, rows: Sequence[LabelledCase]) -> int:
        """Import labelled cases. Ids that exist are left alone; returns how many were added."""
        added = 0
        for row in rows:
            case, labels = row.case, row.labels
            added += await self._link.script(
                "put_case",
                [
                    keys.CASES,
                    keys.LABELS,
                    keys.cases_labelled(case.route),
                    keys.cases_created(case.route),
                    keys.case_tallies(case.route),
                ],
                [
                    case.id,
                    encode(case),
                    b"\n".join(map(encode, labels)),
                    milliseconds(row.decided_at),
                    milliseconds(case.created_at),
                    *_arguments(
                        tallies.changes([], [tallies.offered(case), *_tallies(case, labels)])
                    ),
                ],
            )
        return added

    async def find_one(self, case_id: str) -> Case | None:
        text = await self._link.run("HGET", keys.CASES, case_id)
        return None if text is None else decode(Case, text)

    async def erase(self, case_id: str) -> int | None:
        """Erase a case for good; how many labels went with it, or None where there is no case.

        What it decided stays in the evidence of its trial, which holds numbers alone.
        """
        for _ in range(_TRIES):
            text, before = await self._link.run_all(
                [("HGET", keys.CASES, case_id), ("HGET", keys.LABELS, case_id)]
            )
            if text is None:
                return None
            result = await self._erase(decode(Case, text), before or "")
            if result >= 0:
                return len(_labels(before or "")) if result else None
        raise ConflictError(f"people label case {case_id!r} at this moment: try again")

    async def _erase(self, case: Case, before: str) -> int:
        counted = [tallies.offered(case), *_tallies(case, _labels(before))]
        return int(
            await self._link.script(
                "erase_case",
                [
                    *_places(case.route),
                    keys.cases_created(case.route),
                    keys.case_tallies(case.route),
                    keys.case_prompts(case.route, case.trial),
                ],
                [
                    case.id,
                    before,
                    prompt_digest(case.messages),
                    *_arguments(tallies.changes(counted, [])),
                ],
            )
        )

    async def created_before(self, route: str, before: datetime, limit: int) -> Sequence[str]:
        """Ids of at most so many cases that are older, or were decided before, in any state."""
        until = f"({milliseconds(before)}"
        found: dict[str, None] = {}
        # Cases of older releases are not in the first of them.
        for key in (keys.cases_created, keys.cases_waiting, keys.cases_labelled):
            ids = await self._link.run(
                "ZRANGEBYSCORE", key(route), "-inf", until, "LIMIT", 0, limit
            )
            found |= dict.fromkeys(ids)
        return list(found)[:limit]

    async def find(self, text: str) -> Sequence[str]:
        """Ids of the cases whose stored JSON holds this text. It looks at every case."""
        found: set[str] = set()
        cursor = "0"
        while True:
            cursor, ids = await self._link.script(
                "find_in_hash", [keys.CASES], [cursor, _SCANNED, text]
            )
            found.update(ids)
            if cursor == "0":
                return sorted(found)

    async def stats(self, route: str | None = None) -> Sequence[CaseStats]:
        return [await self._stats(name) for name in await self._routes(route)]

    async def _stats(self, route: str) -> CaseStats:
        opened, leased, labelled, disputed, dropped, oldest, counted = await self._link.run_all(
            [
                ("ZCARD", keys.cases_open(route)),
                ("ZCARD", keys.cases_leased(route)),
                ("ZCARD", keys.cases_labelled(route)),
                ("ZCARD", keys.cases_disputed(route)),
                ("HGET", keys.CASES_DROPPED, route),
                ("ZRANGE", keys.cases_waiting(route), 0, 0, "WITHSCORES"),
                ("HGETALL", keys.case_tallies(route)),
            ]
        )
        counts = {name: int(count) for name, count in counted.items()}
        return CaseStats(
            route=route,
            open=int(opened),
            leased=int(leased),
            labelled=int(labelled),
            dropped=int(dropped or 0),
            oldest_at=_time(oldest[1]) if oldest else None,
            disputed=int(disputed),
            agreement=tallies.read_agreement(counts),
            win_rates=tallies.read_win_rates(counts),
        )

    async def _routes(self, route: str | None) -> Sequence[str]:
        if route is not None:
            return [route]
        return sorted(await self._link.run("HKEYS", keys.ROUTES))

    async def _cases(self, ids: Sequence[str]) -> Sequence[Case]:
        found: list[Case] = []
        for start in range(0, len(ids), _BATCH):
            rows = await self._link.run("HMGET", keys.CASES, *ids[start : start + _BATCH])
            # One may be erased after its id was read.
            found += [decode(Case, row) for row in rows if row is not None]
        return found


def _places(route: str) -> Sequence[str]:
    """Where a case may stand, with its labels and its lease; `label` and `erase_case` begin so."""
    return (
        keys.CASES,
        keys.LABELS,
        keys.CASE_LEASES,
        keys.cases_open(route),
        keys.cases_leased(route),
        keys.cases_waiting(route),
        keys.cases_labelled(route),
        keys.cases_disputed(route),
    )


def _tallies(case: Case, labels: Sequence[Label]) -> Iterable[str | None]:
    """The tallies that a case belongs to by its labels."""
    outcome = decide(case, labels).outcome
    return tallies.agreement(case, labels), tallies.decided(case, outcome) if outcome else None


def _arguments(changes: Mapping[str, int]) -> Iterable[str | int]:
    return [part for change in changes.items() for part in change]


def _labels(text: str) -> Sequence[Label]:
    return [decode(Label, line) for line in text.split("\n") if line]


def _labeler_field(labeler: str) -> bytes:
    """The labeler as it is written in a stored label."""
    return b'"labeler":' + encode(labeler)


def _time(score: float | str) -> datetime:
    return datetime.fromtimestamp(float(score) / 1000, UTC)


def _no_case(case_id: str) -> NotFoundError:
    return NotFoundError(f"there is no case {case_id!r}", param="case")
