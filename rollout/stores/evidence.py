"""What the gateways and the shadow counted for a trial, and what the gates said of it.

Each gateway worker writes into a ledger of its own, under a name that is new with every start:
absolute numbers, so that a report which is sent twice can't count twice. A reader sums the ledgers.
One that has been silent for an hour is folded into what is past and closed for ever: whoever wrote
it and comes back is told so, and goes on in a new one.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import fields
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

_READ_AT_ONCE: Final = 500

Trial = tuple[str, str]
Claimed = Literal["seen", "rated"]
# Numbers in the order of the fields of ArmCounts, or of UnitCounts. A new field comes last, for
# what was stored before lacks it.
Row = Sequence[int | float]


class Table(NamedTuple):
    """What a ledger says of a trial: each stratum is its weight, stable's units, candidate's."""

    stable: Row
    candidate: Row
    strata: Sequence[Row]


ARM_FIELDS: Final = tuple(field.name for field in fields(ArmCounts))
UNIT_FIELDS: Final = tuple(field.name for field in fields(UnitCounts))
_ARM_WIDTH: Final = len(ARM_FIELDS)
_UNIT_WIDTH: Final = len(UNIT_FIELDS)
_STRATUM_WIDTH: Final = 1 + 2 * _UNIT_WIDTH

_Numbers = list[int | float]
_Read = tuple[_Numbers, _Numbers, list[_Numbers]]
_table: Final = msgspec.json.Decoder(_Read)
_tables: Final = msgspec.json.Decoder(list[_Read | None])


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

    async def report(self, ledger: str, tables: Mapping[Trial, Table]) -> bool:
        """Set what stands in a ledger for these trials; False where it was closed.

        The values are absolute, so a report that is sent twice can't count twice.
        """
        pairs: list[Any] = []
        for (route, trial), table in tables.items():
            pairs += [f"{route}|{trial}", msgspec.json.encode(table)]
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
        """The same for many trials, in their order; of each, all is of one moment."""
        ledgers = await self._link.run("ZRANGE", keys.LEDGERS, 0, -1) if trials else []
        found: list[Evidence] = []
        for first in range(0, len(trials), _READ_AT_ONCE):
            found += await self._read(trials[first : first + _READ_AT_ONCE], ledgers)
        return found

    async def _read(self, trials: Sequence[Trial], ledgers: Sequence[str]) -> list[Evidence]:
        # One step: a ledger that is folded meanwhile is either still there or in the past.
        pasts, pairs, texts = await self._link.script(
            "read_evidence",
            [
                *(keys.evidence(*each) for each in trials),
                *(keys.pairs(*each) for each in trials),
                *(keys.ledger(ledger) for ledger in ledgers),
            ],
            [f"{route}|{trial}" for route, trial in trials],
        )
        tables = [_past(_mapping(past)) for past in pasts]
        for text in texts:
            # Whoever reads so much at once has other things to do as well.
            await asyncio.sleep(0)
            for known, table in zip(tables, _tables.decode(text), strict=True):
                if table is not None:
                    known.append(table)
        return [
            _evidence(trial, _total(known), _mapping(counts))
            for trial, known, counts in zip(trials, tables, pairs, strict=True)
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
            total = _total([_table.decode(each) for each in (past, text) if each is not None])
            arguments += [name, text, past or "", msgspec.json.encode(total)]
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


def _evidence(trial: Trial, table: Table, pairs: Mapping[str, str]) -> Evidence:
    stable, candidate, strata = table
    return Evidence(
        *trial,
        stable=ArmCounts(*stable),  # type: ignore[arg-type]
        candidate=ArmCounts(*candidate),  # type: ignore[arg-type]
        strata=tuple(
            Stratum(
                float(weight),
                UnitCounts(*row[:_UNIT_WIDTH]),  # type: ignore[arg-type]
                UnitCounts(*row[_UNIT_WIDTH:]),  # type: ignore[arg-type]
            )
            for weight, *row in strata
        ),
        pairs=read_pairs(pairs),
        floor=read_pairs(pairs, FLOOR),
    )


def _total(tables: Sequence[_Read]) -> Table:
    strata: dict[float, list[_Numbers]] = {}
    for _, _, rows in tables:
        for row in rows:
            strata.setdefault(row[0], []).append(row)
    return Table(
        _sum([stable for stable, _, _ in tables], _ARM_WIDTH),
        _sum([candidate for _, candidate, _ in tables], _ARM_WIDTH),
        [[weight, *_sum(rows, _STRATUM_WIDTH)[1:]] for weight, rows in sorted(strata.items())],
    )


def _sum(rows: Sequence[_Numbers], width: int) -> _Numbers:
    """Added up by position. Another release may have written fewer numbers, or more."""
    if any(len(row) != width for row in rows):
        rows = [(row + [0] * width)[:width] for row in rows]
    return list(map(sum, zip(*rows, strict=True))) if rows else [0] * width


def _past(stored: Mapping[str, str]) -> list[_Read]:
    """What was folded; and what was counted before there were ledgers, as `incarnation|arm`."""
    tables: list[_Read] = []
    for name, text in stored.items():
        if name == "past":
            tables.append(_table.decode(text))
        else:
            row: _Numbers = list(attrgetter(*ARM_FIELDS)(decode(ArmCounts, text)))
            tables.append((row, [], []) if name.endswith("|stable") else ([], row, []))
    return tables


def _mapping(flat: Sequence[str]) -> dict[str, str]:
    """A hash as a script returns it."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _named(name: str) -> Trial:
    route, _, trial = name.partition("|")
    return route, trial
