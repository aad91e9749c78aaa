"""What the gateways and the shadow counted for a trial, and what the gates said of it.

Each gateway worker writes into a ledger of its own, under a name that is new with every start:
absolute numbers, so that a report which is sent twice can't count twice. A reader sums the ledgers.
One that has been silent for an hour is folded into what is past and closed for ever: whoever wrote
it and comes back is told so, and goes on in a new one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, Final, Literal, NamedTuple

import msgspec

from rollout.evidence import ArmCounts, Evidence, Stratum, UnitCounts, Verdict
from rollout.stores import keys
from rollout.stores.captures import FLOOR, KEEP_TRIAL_SECONDS, read_pairs
from rollout.stores.codec import decode, encode_as
from rollout.stores.link import RedisLink

# A ledger that was written within this time is not folded: its worker may live.
IDLE_SECONDS: Final = 3600.0
# Bits in which the units of a trial are remembered (256 KiB at most). Two units that fall on the
# same one count as one, whatever their arms: with 200,000 units that leaves out about 1 in 20.
UNIT_BITS: Final = 2**21
_DIGITS: Final = 6
_FOLDED_AT_ONCE: Final = 20

Trial = tuple[str, str]
Claimed = Literal["seen", "rated"]
# Numbers in the order of their fields. A new field comes last, for old reports lack it.
_Row = list[int | float]
_Table = tuple[_Row, _Row, list[_Row]]
_tables: Final = msgspec.json.Decoder(list[_Table])


@dataclass(frozen=True, slots=True)
class Counted:
    """What one ledger says of a trial."""

    stable: ArmCounts = field(default_factory=ArmCounts)
    candidate: ArmCounts = field(default_factory=ArmCounts)
    strata: tuple[Stratum, ...] = ()


class Claim(NamedTuple):
    """Units of which a worker has seen the first request, or the first rating, that it knows of.

    A unit is named by 32 hex digits, as `rollout.exchanges.unit_of` gives them.
    """

    route: str
    trial: str
    kind: Claimed
    units: Sequence[str]


class EvidenceStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def report(self, ledger: str, counted: Mapping[Trial, Counted]) -> bool:
        """Set what stands in a ledger for these trials; False where it was closed.

        The values are absolute, so a report that is sent twice can't count twice.
        """
        pairs: list[Any] = []
        for (route, trial), each in counted.items():
            pairs += [f"{route}|{trial}", _encode(each)]
        accepted = await self._link.script(
            "report_evidence",
            [keys.LEDGERS, keys.LEDGERS_CLOSED, keys.ledger(ledger)],
            [ledger, KEEP_TRIAL_SECONDS, *pairs],
        )
        return bool(accepted)

    async def claim(self, claims: Sequence[Claim]) -> list[list[bool]]:
        """For each unit whether it is new to the trial; from then on it is known.

        Where the connection breaks before the answer, the second attempt finds them known: a unit
        is never claimed twice, and may be claimed by nobody.
        """
        commands: list[tuple[Any, ...]] = []
        for claim in claims:
            key = keys.units(claim.route, claim.trial, claim.kind)
            bits: list[Any] = []
            for unit in claim.units:
                bits += ["SET", "u1", int(unit[:_DIGITS], 16) % UNIT_BITS, 1]
            commands += [("BITFIELD", key, *bits), ("EXPIRE", key, KEEP_TRIAL_SECONDS)]
        answers = await self._link.run_all(commands) if commands else []
        return [[bit == 0 for bit in bits] for bits in answers[::2]]

    async def read(self, route: str, trial: str) -> Evidence:
        """The sum over all ledgers, and the pairs."""
        return (await self.read_many([(route, trial)]))[0]

    async def read_many(self, trials: Sequence[Trial]) -> list[Evidence]:
        """The same for many trials as of one moment, in their order."""
        if not trials:
            return []
        ledgers = await self._link.run("ZRANGE", keys.LEDGERS, 0, -1)
        names = [f"{route}|{trial}" for route, trial in trials]
        # One transaction: a ledger that is folded meanwhile is either still there or in the past.
        answers = await self._link.run_all(
            [("HGETALL", keys.evidence(*each)) for each in trials]
            + [("HGETALL", keys.pairs(*each)) for each in trials]
            + [("HMGET", keys.ledger(ledger), *names) for ledger in ledgers]
        )
        count = len(trials)
        sums = [_past(hash_) for hash_ in answers[:count]]
        for texts in answers[2 * count :]:
            written = [place for place, text in enumerate(texts) if text is not None]
            for place, table in zip(written, _decode(texts[p] for p in written), strict=True):
                sums[place].add(table)
        return [
            total.evidence(each, pairs)
            for total, each, pairs in zip(sums, trials, answers[count : 2 * count], strict=True)
        ]

    async def fold(self, idle_seconds: float = IDLE_SECONDS) -> int:
        """Close ledgers that have been silent for so long, a few at a time; how many it were."""
        seconds, _ = await self._link.run("TIME")
        latest = int((int(seconds) - idle_seconds) * 1000)
        command = ("ZRANGEBYSCORE", keys.LEDGERS, "-inf", latest, "LIMIT", 0, _FOLDED_AT_ONCE)
        folded = 0
        for ledger in await self._link.run(*command):
            folded += await self._fold(ledger, latest)
        return folded

    async def _fold(self, ledger: str, latest: int) -> bool:
        table = await self._link.run("HGETALL", keys.ledger(ledger))
        past_keys = [keys.evidence(*_named(name)) for name in table]
        before = await self._link.run_all([("HGET", key, "past") for key in past_keys])
        arguments: list[Any] = []
        for (name, text), past in zip(table.items(), before, strict=True):
            total = _Sum()
            for each in _decode([text] if past is None else [past, text]):
                total.add(each)
            arguments += [name, text, past or "", _encode(total.counted())]
        folded = await self._link.script(
            "fold_evidence",
            [keys.LEDGERS, keys.LEDGERS_CLOSED, keys.ledger(ledger), *past_keys],
            [ledger, latest, KEEP_TRIAL_SECONDS, *arguments],
        )
        return bool(folded)

    async def put_verdicts(self, route: str, trial: str, verdicts: Sequence[Verdict]) -> None:
        await self.put_verdicts_many({(route, trial): verdicts})

    async def put_verdicts_many(self, verdicts: Mapping[Trial, Sequence[Verdict]]) -> None:
        if verdicts:
            await self._link.run_all(
                [
                    (
                        "SET", keys.verdicts(*trial), encode_as(list[Verdict], list(said)),
                        "EX", KEEP_TRIAL_SECONDS,
                    )
                    for trial, said in verdicts.items()
                ]
            )  # fmt: skip

    async def verdicts(self, route: str, trial: str) -> list[Verdict]:
        """What was said last; none where no gate has looked yet."""
        return (await self.verdicts_many([(route, trial)]))[0]

    async def verdicts_many(self, trials: Sequence[Trial]) -> list[list[Verdict]]:
        if not trials:
            return []
        texts = await self._link.run("MGET", *(keys.verdicts(*trial) for trial in trials))
        return [decode(list[Verdict], text) if text else [] for text in texts]


class _Sum:
    """Tables added up, by position."""

    __slots__ = ("candidate", "stable", "strata")

    def __init__(self) -> None:
        self.stable: _Row = [0] * len(fields(ArmCounts))
        self.candidate: _Row = [0] * len(fields(ArmCounts))
        self.strata: dict[float, _Row] = {}

    def add(self, table: _Table) -> None:
        stable, candidate, strata = table
        _add(self.stable, stable)
        _add(self.candidate, candidate)
        for weight, *row in strata:
            total = self.strata.get(weight)
            if total is None:
                total = self.strata[weight] = [0] * (2 * _WIDTH)
            _add(total, row)

    def counted(self) -> Counted:
        return Counted(
            stable=ArmCounts(*self.stable),  # type: ignore[arg-type]
            candidate=ArmCounts(*self.candidate),  # type: ignore[arg-type]
            strata=tuple(
                Stratum(float(weight), UnitCounts(*row[:_WIDTH]), UnitCounts(*row[_WIDTH:]))  # type: ignore[arg-type]
                for weight, row in sorted(self.strata.items())
            ),
        )

    def evidence(self, trial: Trial, pairs: Mapping[str, str]) -> Evidence:
        counted = self.counted()
        return Evidence(
            *trial,
            stable=counted.stable,
            candidate=counted.candidate,
            strata=counted.strata,
            pairs=read_pairs(pairs),
            floor=read_pairs(pairs, FLOOR),
        )


_WIDTH: Final = len(fields(UnitCounts))
_arm_row: Final = attrgetter(*(each.name for each in fields(ArmCounts)))
_unit_row: Final = attrgetter(*(each.name for each in fields(UnitCounts)))


def _add(total: _Row, row: _Row) -> None:
    # A later release may have written more numbers than this one knows.
    for place, number in enumerate(row[: len(total)]):
        if number:
            total[place] += number


def _encode(counted: Counted) -> bytes:
    strata = [(s.weight, *_unit_row(s.stable), *_unit_row(s.candidate)) for s in counted.strata]
    arms = [
        [round(number, 3) if isinstance(number, float) else number for number in _arm_row(arm)]
        for arm in (counted.stable, counted.candidate)
    ]
    return msgspec.json.encode((*arms, strata))


def _decode(texts: Iterable[str]) -> list[_Table]:
    # All at once: a call of the decoder for each would cost more than the decoding.
    return _tables.decode(f"[{','.join(texts)}]")


def _past(stored: Mapping[str, str]) -> _Sum:
    """What was folded; and what was counted before there were ledgers, as `incarnation|arm`."""
    total = _Sum()
    for name, text in stored.items():
        if name == "past":
            total.add(_decode([text])[0])
        else:
            arm = total.stable if name.endswith("|stable") else total.candidate
            _add(arm, list(_arm_row(decode(ArmCounts, text))))
    return total


def _named(name: str) -> Trial:
    route, _, trial = name.partition("|")
    return route, trial
