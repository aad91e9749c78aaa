"""API keys: shown once, stored hashed, each with scopes, the routes it may use, and limits."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Literal, get_args

Scope = Literal["infer", "label", "operate", "train", "admin"]
SCOPES: frozenset[str] = frozenset(get_args(Scope))
# Far beyond any use, and whole numbers stay exact everywhere that they pass through.
LARGEST_LIMIT = 10**12


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may use, over all gateways together. None is no limit.

    `concurrency` are requests at once. `monthly_tokens` are those of prompts and answers in a
    calendar month in UTC.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    monthly_tokens: int | None = None

    @property
    def unlimited(self) -> bool:
        return (
            self.requests_per_minute is None
            and self.tokens_per_minute is None
            and self.concurrency is None
            and self.monthly_tokens is None
        )


NO_LIMITS = KeyLimits()


def limit_problems(limits: KeyLimits) -> Iterator[tuple[str, str]]:
    """The name of each limit that cannot be, with what to do."""
    for each in fields(limits):
        value: int | None = getattr(limits, each.name)
        if value is not None and not 1 <= value <= LARGEST_LIMIT:
            yield (
                each.name,
                f"{each.name} is {value}: give a whole number from 1 to {LARGEST_LIMIT}, or leave "
                "it out for no limit",
            )


@dataclass(frozen=True, slots=True)
class ApiKey:
    """`routes` None is all of them. `admin` includes every other scope."""

    id: str
    name: str
    digest: str
    scopes: frozenset[str]
    created_at: datetime
    routes: frozenset[str] | None = None
    limits: KeyLimits = NO_LIMITS

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def allows_route(self, route: str) -> bool:
        return self.routes is None or route in self.routes


def digest_secret(secret: str) -> str:
    """The sha256 under which a key is stored and found, in hex.

    A key carries 256 bits of chance, so a slow hash would only slow the data plane.
    """
    return hashlib.sha256(secret.encode()).hexdigest()
