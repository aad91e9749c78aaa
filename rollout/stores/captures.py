"""The stream of captured exchanges: from the gateways to the shadow, then kept for replays."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import msgspec
import redis.exceptions

from rollout import tallies
from rollout.cases import Case, prompt_digest
from rollout.evidence import PairCounts
from rollout.exchanges import Comparison, Exchange
from rollout.stores import keys
from rollout.stores.codec import decode, encode, milliseconds
from rollout.stores.link import BLOCK_SECONDS, RedisLink

KEEP_TRIAL_SECONDS: Final = 90 * 86400
# Exchanges read at a time by who goes through all of them.
_PAGE: Final = 100

FLOOR: Final = "floor|"
_PAIR_FIELDS: Final = tuple(field.name for field in fields(PairCounts))

Counts = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Keeping:
    """How many captures are kept, of all routes together, and for how long.

    Those that were compared stay until they are too many or too old, so that they can be replayed
    and explained. The oldest give way first, compared or not: the shadow is for what is served now.
    """

    count: int = 10_000
    hours: float = 168.0


@dataclass(frozen=True, slots=True)
class Taken:
    """An exchange that this consumer holds until it settles it; `entry` is its stream id."""

    entry: str
    exchange: Exchange


@dataclass(frozen=True, slots=True)
class Settled:
    """`already`: somebody else settled it before, and nothing was changed."""

    state: Literal["counted", "dropped", "already"]
    offered: bool = False


class CaptureStore:
    def __init__(self, link: RedisLink, keeping: Keeping | None = None) -> None:
        self._link = link
        self._keeping = keeping or Keeping()

    async def append(self, exchanges: Sequence[Exchange]) -> None:
        if not exchanges:
            return
        arguments: list[Any] = [self._keeping.count, self._oldest()]
        for exchange in exchanges:
            # In half the time of `encode`, for the gateways pay it; `decode` reads it the same.
            text = msgspec.json.encode(exchange)
            arguments += [_place(exchange.route, exchange.request_id), text]
        await self._link.script("append_captures", [keys.CAPTURES, keys.CAPTURE_INDEX], arguments)

    async def trim(self) -> None:
        """Let go of what is too old, also where nothing new comes."""
        oldest = self._oldest()
        await self._link.run_all(
            [
                ("XTRIM", keys.CAPTURES, "MINID", oldest),
                ("ZREMRANGEBYSCORE", keys.CAPTURE_INDEX, "-inf", f"({oldest}"),
            ]
        )

    async def take(self, consumer: str, count: int, wait_seconds: float) -> list[Taken]:
        """Up to `count` new captures; waits for the first one at most `wait_seconds`."""
        # Redis reads a block of 0 as "for ever".
        block = max(1, int(min(wait_seconds, BLOCK_SECONDS) * 1000))
        command: tuple[Any, ...] = (
            "XREADGROUP",
            "GROUP",
            keys.SHADOW_GROUP,
            consumer,
            "COUNT",
            count,
        )
        command += ("BLOCK", block, "STREAMS", keys.CAPTURES, ">")
        answer = await self._with_group(command)
        return _taken(entry for _, entries in answer or () for entry in entries)

    async def take_over(self, consumer: str, idle_seconds: float, count: int) -> list[Taken]:
        """Captures that another consumer took and has not settled for `idle_seconds`."""
        command: tuple[Any, ...] = ("XAUTOCLAIM", keys.CAPTURES, keys.SHADOW_GROUP, consumer)
        command += (int(idle_seconds * 1000), "0-0", "COUNT", count)
        answer = await self._with_group(command)
        return _taken(answer[1])

    async def settle(
        self,
        taken: Taken,
        comparison: Comparison | None,
        case: Case | None,
        maximum_cases: int,
        floor: Comparison | None = None,
    ) -> Settled:
        """Acknowledge the capture, count its pair and offer its case, in one atomic step.

        `floor` is the pair of stable's answer with stable's own second one, where it was asked
        again. Without a comparison the capture is dropped. A second call changes nothing.
        """
        route, counts = taken.exchange.route, dict[str, Counts]()
        if comparison is not None:
            counts[keys.pairs(route, comparison.trial)] = pair_counts(comparison) | (
                {f"{FLOOR}{name}": count for name, count in pair_counts(floor).items()}
                if floor is not None
                else {}
            )
        trial = comparison.trial if comparison else ""
        guard = (keys.CAPTURES, keys.SHADOW_GROUP, taken.entry)
        counted, offered = await settle(
            self._link, guard, counts, Offer(route, trial, case, maximum_cases)
        )
        if not counted:
            return Settled("already")
        return Settled("counted" if comparison else "dropped", offered=offered)

    async def waiting(self) -> int:
        """Captures that nobody has settled yet."""
        try:
            groups = await self._link.run("XINFO GROUPS", keys.CAPTURES)
        except redis.exceptions.ResponseError as exc:
            if "no such key" not in str(exc):
                raise
            return 0
        group = next((each for each in groups if each["name"] == keys.SHADOW_GROUP), None)
        # Redis can't tell the lag for a while after entries were erased: all of them at most.
        if group is None or group.get("lag") is None:
            return int(await self._link.run("XLEN", keys.CAPTURES))
        return int(group["pending"]) + int(group["lag"])

    async def find(self, route: str, request_id: str) -> Exchange | None:
        """The newest captured exchange of that request, while it is kept."""
        at = await self._link.run("ZSCORE", keys.CAPTURE_INDEX, _place(route, request_id))
        if at is None:
            return None
        place = int(float(at))
        rows = await self._link.run("XREVRANGE", keys.CAPTURES, place, place)
        found = (taken.exchange for taken in _taken(rows))
        return next((e for e in found if (e.route, e.request_id) == (route, request_id)), None)

    async def between(
        self, route: str, since: datetime, until: datetime
    ) -> AsyncIterator[Sequence[Taken]]:
        """A route's captures of that time, the newest first, page by page; settled ones too."""
        first, end = milliseconds(since), str(milliseconds(until))
        while True:
            rows = await self._link.run("XREVRANGE", keys.CAPTURES, end, first, "COUNT", _PAGE)
            if not rows:
                return
            page = [taken for taken in _taken(rows) if taken.exchange.route == route]
            if page:
                yield page
            end = f"({rows[-1][0]}"

    async def erase(self, matches: Callable[[Exchange], bool]) -> int:
        """Erase the captures that match, waiting or kept; how many they were."""
        erased, end = 0, "+"
        while rows := await self._link.run("XREVRANGE", keys.CAPTURES, end, "-", "COUNT", _PAGE):
            found = [taken for taken in _taken(rows) if matches(taken.exchange)]
            if found:
                places = [_place(t.exchange.route, t.exchange.request_id) for t in found]
                entries = [taken.entry for taken in found]
                await self._link.run_all(
                    [
                        ("ZREM", keys.CAPTURE_INDEX, *places),
                        # Acknowledged, so that a shadow that holds one can't settle it any more.
                        ("XACK", keys.CAPTURES, keys.SHADOW_GROUP, *entries),
                        ("XDEL", keys.CAPTURES, *entries),
                    ]
                )
                erased += len(found)
            end = f"({rows[-1][0]}"
        return erased

    async def _with_group(self, command: tuple[Any, ...]) -> Any:
        """Run a command of the consumer group, which is made where it is missing."""
        try:
            return await self._link.run(*command)
        except redis.exceptions.ResponseError as exc:
            if not str(exc).startswith("NOGROUP"):
                raise
        try:
            create = ("XGROUP", "CREATE", keys.CAPTURES, keys.SHADOW_GROUP, "0", "MKSTREAM")
            await self._link.run(*create)
        except redis.exceptions.ResponseError as exc:
            if not str(exc).startswith("BUSYGROUP"):
                raise
        return await self._link.run(*command)

    def _oldest(self) -> int:
        return milliseconds(datetime.now(UTC) - timedelta(hours=self._keeping.hours))


@dataclass(frozen=True, slots=True)
class Offer:
    """A case to offer, if there is one, among those of a trial (or replay) of the route."""

    route: str
    trial: str
    case: Case | None
    maximum: int


async def settle(
    link: RedisLink,
    guard: tuple[str, str, str],
    counts: Mapping[str, Counts],
    offer: Offer,
    row: tuple[str, bytes, int] = ("", b"", 0),
) -> tuple[bool, bool]:
    """Count, and offer the case, unless the entry was settled before; whether it did either.

    `guard` is the key that knows, its consumer group ("" where it is a set) and the entry. `row`
    is a list's key, what to append to it, and how many it holds.
    """
    route, case = offer.route, offer.case
    used = {key: each for key, each in counts.items() if each}
    fixed = [
        guard[0],
        keys.CASES,
        keys.cases_open(route),
        keys.cases_waiting(route),
        keys.case_prompts(route, offer.trial),
        keys.CASES_DROPPED,
        keys.cases_created(route),
        keys.case_tallies(route),
        row[0],
    ]
    triples = [
        part
        for place, each in enumerate(used.values(), start=len(fixed) + 1)
        for field, number in each.items()
        for part in (place, field, number)
    ]
    counted, offered = await link.script(
        "settle",
        [*fixed, *used],
        [
            guard[1],
            guard[2],
            case.id if case else "",
            encode(case) if case else "",
            case.priority if case else 0,
            milliseconds(case.created_at) if case else 0,
            prompt_digest(case.messages) if case else "",
            route,
            offer.maximum,
            KEEP_TRIAL_SECONDS,
            tallies.offered(case) if case else "",
            row[1],
            row[2],
            *triples,
        ],
    )
    return bool(counted), bool(offered)


def pair_counts(comparison: Comparison) -> dict[str, int]:
    """Fields of keys.pairs that one more pair adds to."""
    if comparison.kind == "failure":
        found = ["failed"]
    else:
        found = ["agree" if comparison.agrees else "disagree"]
    if comparison.outcome is not None:
        found.append({"win": "wins", "loss": "losses", "tie": "ties"}[comparison.outcome])
    if comparison.kind == "schema":
        # The step settles a pair only where one side alone keeps the schema.
        won = comparison.outcome == "win"
        found.append("only_candidate_valid" if won else "only_stable_valid")
    return dict.fromkeys(found, 1)


def read_pairs(table: Mapping[str, str], prefix: str = "") -> PairCounts:
    """The pairs of a hash that was counted into, or stable's beside itself."""
    return PairCounts(**{name: int(table.get(f"{prefix}{name}", 0)) for name in _PAIR_FIELDS})


def _place(route: str, request_id: str) -> str:
    return f"{route}|{request_id}"


def _taken(entries: Any) -> list[Taken]:
    # An entry that was trimmed while somebody held it comes back without fields.
    return [
        Taken(entry, decode(Exchange, fields["exchange"])) for entry, fields in entries if fields
    ]
