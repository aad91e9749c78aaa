"""API keys: shown once, stored hashed, each with scopes and the routes that it may use."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

Scope = Literal["infer", "label", "operate", "train", "admin"]
SCOPES: frozenset[str] = frozenset(get_args(Scope))


@dataclass(frozen=True, slots=True)
class ApiKey:
    """`routes` None is all of them. `admin` includes every other scope."""

    id: str
    name: str
    digest: str
    scopes: frozenset[str]
    created_at: datetime
    routes: frozenset[str] | None = None

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def allows_route(self, route: str) -> bool:
        return self.routes is None or route in self.routes


def digest_secret(secret: str) -> str:
    """The sha256 under which a key is stored and found, in hex.

    A key carries 256 bits of chance, so a slow hash would only slow the data plane.
    """
    return hashlib.sha256(secret.encode()).hexdigest()
