"""Replays: asked for, taken by one shadow at a time, and what each has found so far."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from rollout.cases import Case
from rollout.errors import ConflictError, NotFoundError
from rollout.exchanges import Comparison
from rollout.replays import Difference, Replay, ReplayReport
from rollout.stores import keys
from rollout.stores.captures import Offer, Settled, Taken, pair_counts, read_pairs, settle
from rollout.stores.codec import decode, encode, milliseconds
from rollout.stores.leases import LeaseStore
from rollout.stores.link import RedisLink

MAXIMUM_UNDER_WAY: Final = 10
MAXIMUM_DIFFERENCES: Final = 500
_MAXIMUM_KEPT: Final = 500


class ReplayStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._leases = LeaseStore(link)

    async def ask(self, replay: Replay) -> None:
        """Queue it. Raises ConflictError where too many of its route are under way."""
        known = await self.list()
        under_way = [each for each in known if each.route == replay.route and not each.ended]
        if len(under_way) >= MAXIMUM_UNDER_WAY:
            raise ConflictError(
                f"{len(under_way)} replays of {replay.route} are under way: wait for them, or "
                "cancel one"
            )
        ended = [each.id for each in known if each.ended]
        commands: list[tuple[object, ...]] = [
            ("HSET", keys.REPLAYS, replay.id, encode(replay)),
            ("ZADD", keys.REPLAYS_QUEUED, milliseconds(replay.asked_at), replay.id),
        ]
        if forgotten := ended[_MAXIMUM_KEPT:]:
            commands.append(("HDEL", keys.REPLAYS, *forgotten))
        await self._link.run_all(commands)

    async def list(self, route: str | None = None) -> Sequence[Replay]:
        """The newest first."""
        table = await self._link.run("HGETALL", keys.REPLAYS)
        found = [decode(Replay, text) for text in table.values()]
        kept = [each for each in found if route in (None, each.route)]
        return sorted(kept, key=lambda each: each.asked_at, reverse=True)

    async def get(self, replay_id: str) -> Replay:
        """Raises NotFoundError where there is none."""
        return decode(Replay, await self._text(replay_id))

    async def report(self, replay_id: str) -> ReplayReport:
        """What it has found so far. Raises NotFoundError where there is none."""
        replay = await self.get(replay_id)
        settled, pairs, counts, rows = await self._link.run_all(
            [
                ("SCARD", keys.replay_settled(replay_id)),
                ("HGETALL", keys.pairs(replay.route, replay_id)),
                ("HGETALL", keys.replay_counts(replay_id)),
                ("LRANGE", keys.replay_differences(replay_id), 0, -1),
            ]
        )
        return ReplayReport(
            replay=replay,
            settled=int(settled),
            pairs=read_pairs(pairs),
            kinds=_below("kind", counts),
            skipped=_below("skipped", counts),
            offered=int(counts.get("offered", 0)),
            differences=tuple(decode(Difference, row) for row in rows),
        )

    async def take(self, worker: str, lease_seconds: float) -> Replay | None:
        """The oldest replay that nobody works on, for so long; None where there is none."""
        for replay_id in await self._link.run("ZRANGE", keys.REPLAYS_QUEUED, 0, -1):
            if await self._leases.acquire(_lease(replay_id), worker, lease_seconds) is not None:
                return await self.get(replay_id)
        return None

    async def renew(self, replay_id: str, worker: str, seconds: float) -> bool:
        """Whether the worker should go on: it is its own still, and nobody has cancelled it."""
        if not await self._leases.renew(_lease(replay_id), worker, seconds):
            return False
        return not (await self.get(replay_id)).ended

    async def release(self, replay_id: str, worker: str) -> None:
        await self._leases.release(_lease(replay_id), worker)

    async def change(self, replay_id: str, **changes: object) -> Replay:
        """Change some of its fields. One that has ended stays as it is."""
        while True:
            text = await self._text(replay_id)
            before = decode(Replay, text)
            if before.ended:
                return before
            after = replace(before, **changes)  # type: ignore[arg-type]
            replaced = await self._link.script(
                "replace_replay",
                [keys.REPLAYS, keys.REPLAYS_QUEUED],
                [replay_id, text, encode(after), int(after.ended)],
            )
            if replaced:
                return after

    async def unsettled(self, replay_id: str, page: Sequence[Taken]) -> Sequence[Taken]:
        """Those of the page that the replay is not done with."""
        entries = [taken.entry for taken in page]
        known = await self._link.run("SMISMEMBER", keys.replay_settled(replay_id), *entries)
        return [taken for taken, settled in zip(page, known, strict=True) if not settled]

    async def settled(self, replay_id: str) -> int:
        return int(await self._link.run("SCARD", keys.replay_settled(replay_id)))

    async def settle(
        self,
        replay: Replay,
        taken: Taken,
        found: tuple[Comparison, Difference | None] | str,
        case: Case | None = None,
        maximum_cases: int = 0,
    ) -> Settled:
        """Count what came of one exchange, or why nothing did, in one atomic step."""
        guard = (keys.replay_settled(replay.id), "", taken.entry)
        counts, offer = (
            keys.replay_counts(replay.id),
            Offer(replay.route, replay.id, case, maximum_cases),
        )
        if isinstance(found, str):
            done, _ = await settle(self._link, guard, {counts: {f"skipped|{found}": 1}}, offer)
            return Settled("dropped" if done else "already")
        comparison, difference = found
        done, offered = await settle(
            self._link,
            guard,
            {
                counts: {f"kind|{comparison.kind}": 1},
                keys.pairs(replay.route, replay.id): pair_counts(comparison),
            },
            offer,
            (
                keys.replay_differences(replay.id),
                encode(difference) if difference else b"",
                MAXIMUM_DIFFERENCES,
            ),
        )
        if offered:
            # For show alone, so it need not be part of the step.
            await self._link.run("HINCRBY", counts, "offered", 1)
        return Settled("counted" if done else "already", offered=offered)

    async def _text(self, replay_id: str) -> str:
        text = await self._link.run("HGET", keys.REPLAYS, replay_id)
        if text is None:
            raise NotFoundError(
                f"there is no replay {replay_id!r}; `sluice rollout replays ROUTE` lists them",
                param="replay",
            )
        return str(text)


def _lease(replay_id: str) -> str:
    return f"replay:{replay_id}"


def _below(name: str, counts: dict[str, str]) -> dict[str, int]:
    found: Collection[tuple[str, str]] = [
        (key.partition("|")[2], count)
        for key, count in counts.items()
        if key.startswith(f"{name}|")
    ]
    return {key: int(count) for key, count in found}
