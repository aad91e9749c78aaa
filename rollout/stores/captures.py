"""The stream of captured exchanges, from the gateways to the shadow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import redis.exceptions

from rollout import tallies
from rollout.cases import Case, prompt_digest
from rollout.exchanges import Comparison, Exchange
from rollout.stores import keys
from rollout.stores.codec import decode, encode, milliseconds
from rollout.stores.link import BLOCK_SECONDS, RedisLink

# The oldest captures give way to new ones: the shadow is for what is served now.
MAXIMUM_CAPTURES = 10_000
KEEP_TRIAL_SECONDS = 90 * 86400


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
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def append(self, exchanges: Sequence[Exchange]) -> None:
        if exchanges:
            append = ("XADD", keys.CAPTURES, "MAXLEN", "~", MAXIMUM_CAPTURES, "*", "exchange")
            await self._link.run_all([(*append, encode(exchange)) for exchange in exchanges])

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
    ) -> Settled:
        """Acknowledge the capture, count its pair and offer its case, in one atomic step.

        Without a comparison it is acknowledged and dropped. A second call changes nothing.
        """
        trial = comparison.trial if comparison else ""
        counted, offered = await self._link.script(
            "settle",
            [
                keys.CAPTURES,
                keys.pairs(taken.exchange.route, trial),
                keys.CASES,
                keys.cases_open(taken.exchange.route),
                keys.cases_waiting(taken.exchange.route),
                keys.case_prompts(taken.exchange.route, trial),
                keys.CASES_DROPPED,
                keys.cases_created(taken.exchange.route),
                keys.case_tallies(taken.exchange.route),
            ],
            [
                keys.SHADOW_GROUP,
                taken.entry,
                ",".join(_counted(comparison)) if comparison else "",
                case.id if case else "",
                encode(case) if case else "",
                case.priority if case else 0,
                milliseconds(case.created_at) if case else 0,
                prompt_digest(case.messages) if case else "",
                taken.exchange.route,
                maximum_cases,
                KEEP_TRIAL_SECONDS,
                tallies.offered(case) if case else "",
            ],
        )
        if not counted:
            return Settled("already")
        return Settled("counted" if comparison else "dropped", offered=bool(offered))

    async def waiting(self) -> int:
        """Captures that nobody has settled yet."""
        return int(await self._link.run("XLEN", keys.CAPTURES))

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


def _counted(comparison: Comparison) -> list[str]:
    if comparison.kind == "failure":
        fields = ["failed"]
    else:
        fields = ["agree" if comparison.agrees else "disagree"]
    if comparison.outcome is not None:
        fields.append({"win": "wins", "loss": "losses", "tie": "ties"}[comparison.outcome])
    return fields


def _taken(entries: Any) -> list[Taken]:
    # An entry that was trimmed while somebody held it comes back without fields.
    return [
        Taken(entry, decode(Exchange, fields["exchange"])) for entry, fields in entries if fields
    ]
