"""What gateway workers tell the store of a key's use, and what they may spend of its limits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

# After this long without a word from the ledger a worker refills its share by itself.
PATIENCE_SECONDS: Final = 3.0

Limit = Literal["requests", "tokens", "concurrency"]


@dataclass(frozen=True, slots=True)
class LimitReport:
    """What one worker tells of one limit.

    `spent` is absolute for as long as the worker keeps count of the key; for `concurrency` it is
    what is under way. `acknowledged` is what of it the ledger knew at the last answer. `demand` is
    what was lately asked for, refused or not. `refilled` is credit that the worker has given itself
    since then, for it heard nothing; it is not in `spent`.
    """

    limit: Limit
    maximum: int
    spent: float
    acknowledged: float
    demand: float
    refilled: float = 0.0


@dataclass(frozen=True, slots=True)
class KeyReport:
    """`tokens` is what this worker has counted in the month so far, absolute. `count` tells one
    count of `LimitReport.spent` from the next, which begins at nothing."""

    id: str
    tokens: int
    limits: tuple[LimitReport, ...] = ()
    count: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """`credit` is what may be spent beyond what was reported; `share` is this worker's part of the
    limit; `elsewhere` is what others hold or nobody holds. For `concurrency` the credit is how many
    may be under way."""

    credit: float
    share: float
    elsewhere: float


@dataclass(frozen=True, slots=True)
class KeyGrant:
    """`tokens` is what all workers together have counted in the month."""

    tokens: int
    limits: Mapping[str, Grant] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settlement:
    """The ledger's answer: a grant for each key of the report, how many workers there are, and the
    keys that are in use anywhere."""

    workers: int
    grants: Mapping[str, KeyGrant]
    active: frozenset[str]
