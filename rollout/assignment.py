"""Where a unit falls: a keyed hash that every gateway computes alike, with no stored state."""

import hashlib
from functools import lru_cache
from typing import Final

# Of 64 bits, as a fraction: exact, for it only moves the point.
_PLACE: Final = 2.0**-64
_UNKEYED: Final = hashlib.blake2b(digest_size=16)


def unit_of(key_id: str, sticky: str) -> str:
    """What is assigned to an arm: a client's identity, never shared by two keys (32 hex digits)."""
    hashed = _UNKEYED.copy()
    hashed.update(f"{key_id}\x1f{sticky}".encode())
    return hashed.hexdigest()


def bucket(salt: str, unit: str) -> float:
    """A place in [0, 1) that only the salt and the unit decide."""
    hashed = _salted(salt).copy()
    hashed.update(unit.encode())
    return float(int.from_bytes(hashed.digest(), "big")) * _PLACE


@lru_cache(maxsize=1024)
def _salted(salt: str) -> "hashlib.blake2b":
    """The hash before any unit: making one costs more than all the rest."""
    # A key may be no longer than 64 bytes; a route's name alone may be that long.
    key = salt.encode()
    if len(key) > hashlib.blake2b.MAX_KEY_SIZE:
        key = hashlib.blake2b(key).digest()
    return hashlib.blake2b(key=key, digest_size=8)
