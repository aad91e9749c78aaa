"""Erasing what people said and were told: by client, by request, by age.

It looks at everything that is kept, a piece at a time, so that the store is never held up.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from rollout.exchanges import Exchange, Feedback
from rollout.replays import Difference, Replay
from rollout.stores import keys
from rollout.stores.captures import CaptureStore
from rollout.stores.cases import CaseStore
from rollout.stores.codec import decode, encode
from rollout.stores.link import RedisLink

_PAGE = 500


@dataclass(frozen=True, slots=True)
class Erased:
    """How much was erased. `differences` are those that replays showed.

    `case_ids` name the cases; what was in them is gone.
    """

    cases: int = 0
    labels: int = 0
    captures: int = 0
    feedback: int = 0
    differences: int = 0
    case_ids: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.cases or self.captures or self.feedback or self.differences)

    def __add__(self, other: "Erased") -> "Erased":
        return Erased(
            self.cases + other.cases,
            self.labels + other.labels,
            self.captures + other.captures,
            self.feedback + other.feedback,
            self.differences + other.differences,
            self.case_ids + other.case_ids,
        )


class ErasureStore:
    def __init__(self, link: RedisLink, cases: CaseStore, captures: CaptureStore) -> None:
        self._link = link
        self._cases = cases
        self._captures = captures

    async def erase(self, *, unit: str | None = None, request_id: str | None = None) -> Erased:
        """Erase all that belongs to the unit, and all of that one request.

        A second call finds what arrived since, or nothing.
        """
        requests = set() if request_id is None else {request_id}

        def belongs(exchange: Exchange) -> bool:
            if unit and exchange.unit == unit:
                requests.add(exchange.request_id)
            return exchange.request_id in requests

        # First, so that no shadow makes a case of one while the cases are looked at.
        erased = Erased(captures=await self._captures.erase(belongs))
        for name, value in (("unit", unit), ("request_id", request_id)):
            if not value:
                continue
            for case_id in await self._cases.find(f'"{name}":{encode(value).decode()}'):
                case = await self._cases.find_one(case_id)
                # The text may also stand in what a client said.
                if case is not None and getattr(case, name) == value:
                    requests.add(case.request_id)
                    erased += await self._erase_case(case_id)
        return erased + Erased(
            feedback=await self._erase_feedback(unit, requests),
            differences=await self._erase_differences(requests),
        )

    async def expire(self, before: Mapping[str, datetime], limit: int) -> Mapping[str, Erased]:
        """Erase what is older than the route's moment in `before`: of each at most `limit` cases.

        Returns what was erased by route; as many cases as the limit mean that there may be more.
        """
        found = dict.fromkeys(before, Erased())
        for route, moment in before.items():
            for case_id in await self._cases.created_before(route, moment, limit):
                found[route] += await self._erase_case(case_id)
        for route in await self._erase_old_captures(before):
            found[route] += Erased(captures=1)
        for replay in await self._replays():
            if replay.route in before and replay.asked_at < before[replay.route]:
                key = keys.replay_differences(replay.id)
                shown, _ = await self._link.run_all([("LLEN", key), ("DEL", key)])
                found[replay.route] += Erased(differences=shown)
        async for key, field, feedback in self._feedback():
            route = feedback.receipt.route if feedback.receipt else ""
            if route in before and feedback.given_at < before[route]:
                found[route] += Erased(feedback=await self._link.run("HDEL", key, field))
        return {route: erased for route, erased in found.items() if erased}

    async def _erase_case(self, case_id: str) -> Erased:
        labels = await self._cases.erase(case_id)
        return Erased() if labels is None else Erased(1, labels, case_ids=(case_id,))

    async def _erase_feedback(self, unit: str | None, requests: set[str]) -> int:
        erased = 0
        async for key, field, feedback in self._feedback():
            own = unit and feedback.receipt and feedback.receipt.unit == unit
            if own or feedback.request_id in requests:
                erased += await self._link.run("HDEL", key, field)
        async for entry, fields in self._entries(keys.FEEDBACK_UNCLAIMED):
            if decode(Feedback, fields["feedback"]).request_id in requests:
                erased += await self._link.run("XDEL", keys.FEEDBACK_UNCLAIMED, entry)
        return erased

    async def _erase_old_captures(self, before: Mapping[str, datetime]) -> Sequence[str]:
        """The route of each that was erased."""
        routes: list[str] = []

        def is_old(exchange: Exchange) -> bool:
            old = exchange.route in before and exchange.captured_at < before[exchange.route]
            if old:
                routes.append(exchange.route)
            return old

        await self._captures.erase(is_old)
        return routes

    async def _erase_differences(self, requests: set[str]) -> int:
        erased = 0
        for replay in await self._replays():
            key = keys.replay_differences(replay.id)
            for text in await self._link.run("LRANGE", key, 0, -1):
                if decode(Difference, text).request_id in requests:
                    erased += await self._link.run("LREM", key, 1, text)
        return erased

    async def _replays(self) -> Sequence[Replay]:
        return [decode(Replay, text) for text in await self._link.run("HVALS", keys.REPLAYS)]

    async def _feedback(self) -> AsyncIterator[tuple[str, str, Feedback]]:
        async for key in self._keys(keys.FEEDBACK_OF_ANY):
            cursor = "0"
            while True:
                cursor, table = await self._link.run("HSCAN", key, cursor, "COUNT", _PAGE)
                for field, text in table.items():
                    yield key, field, decode(Feedback, text)
                if int(cursor) == 0:
                    break

    async def _keys(self, pattern: str) -> AsyncIterator[str]:
        cursor = 0
        while True:
            cursor, found = await self._link.run(
                "SCAN", cursor, "MATCH", pattern, "COUNT", _PAGE, "TYPE", "hash"
            )
            for key in found:
                yield key
            if int(cursor) == 0:
                return

    async def _entries(self, stream: str) -> AsyncIterator[tuple[str, Mapping[str, str]]]:
        start = "-"
        while page := await self._link.run("XRANGE", stream, start, "+", "COUNT", _PAGE):
            for entry, fields in page:
                yield entry, fields
            start = f"({page[-1][0]}"
