"""Where a unit falls: a keyed hash that every gateway computes alike, with no stored state."""

import hashlib
from functools import lru_cache
from typing import Final

_BUCKETS: Final = 2**64


def unit_of(key_id: str, sticky: str) -> str:
    """What is assigned to an arm: a client's identity, never shared by two keys (32 hex digits)."""
    return hashlib.blake2b(f"{key_id}\x1f{sticky}".encode(), digest_size=16).hexdigest()


def bucket(salt: str, unit: str) -> float:
    """A place in [0, 1) that only the salt and the unit decide."""
    hashed = _salted(salt).copy()
    hashed.update(unit.encode())
    return int.from_bytes(hashed.digest(), "big") / _BUCKETS


@lru_cache(maxsize=1024)
def _salted(salt: str) -> "hashlib.blake2b":
    """The hash before any unit: making one costs more than all the rest."""
    # A key may be no longer than 64 bytes; a route's name alone may be that long.
    key = salt.encode()
    if len(key) > hashlib.blake2b.MAX_KEY_SIZE:
        key = hashlib.blake2b(key).digest()
    return hashlib.blake2b(key=key, digest_size=8)
