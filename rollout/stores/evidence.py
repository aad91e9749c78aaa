"""What the gateways and the shadow counted for a trial, and what the gates said of it."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Literal

from rollout.evidence import ArmCounts, Evidence, PairCounts, Verdict
from rollout.stores import keys
from rollout.stores.captures import KEEP_TRIAL_SECONDS
from rollout.stores.codec import decode, encode, encode_as
from rollout.stores.link import RedisLink


class EvidenceStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def report(
        self,
        incarnation: str,
        route: str,
        trial: str,
        arms: Mapping[Literal["stable", "candidate"], ArmCounts],
    ) -> None:
        """Set what one gateway incarnation has counted so far.

        The values are absolute, so a report that is sent twice can't count twice.
        """
        if not arms:
            return
        pairs: list[str | bytes] = []
        for arm, counts in arms.items():
            pairs += [f"{incarnation}|{arm}", encode(counts)]
        await self._link.run_all(
            [
                ("HSET", keys.evidence(route, trial), *pairs),
                ("EXPIRE", keys.evidence(route, trial), KEEP_TRIAL_SECONDS),
            ]
        )

    async def read(self, route: str, trial: str) -> Evidence:
        """The sum over all incarnations, and the pairs."""
        reports, pairs = await self._link.run_all(
            [("HGETALL", keys.evidence(route, trial)), ("HGETALL", keys.pairs(route, trial))]
        )
        arms: dict[str, list[ArmCounts]] = {"stable": [], "candidate": []}
        for name, text in reports.items():
            arms[name.rpartition("|")[2]].append(decode(ArmCounts, text))
        return Evidence(
            route=route,
            trial=trial,
            stable=_sum(arms["stable"]),
            candidate=_sum(arms["candidate"]),
            pairs=PairCounts(**{name: int(count) for name, count in pairs.items()}),
        )

    async def put_verdicts(self, route: str, trial: str, verdicts: Sequence[Verdict]) -> None:
        text = encode_as(list[Verdict], list(verdicts))
        await self._link.run("SET", keys.verdicts(route, trial), text, "EX", KEEP_TRIAL_SECONDS)

    async def verdicts(self, route: str, trial: str) -> list[Verdict]:
        """What was said last; none where no gate has looked yet."""
        text = await self._link.run("GET", keys.verdicts(route, trial))
        return decode(list[Verdict], text) if text else []


def _sum(counts: Sequence[ArmCounts]) -> ArmCounts:
    return ArmCounts(
        **{
            field.name: sum(getattr(count, field.name) for count in counts)
            for field in fields(ArmCounts)
        }
    )
