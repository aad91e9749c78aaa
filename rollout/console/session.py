"""Who is at the console: a cookie signed with the digest of the key that logged in.

Nothing is stored: any controller can check it, and a revoked key ends its sessions.
"""

import hashlib
import hmac
import re
from datetime import datetime, timedelta
from typing import Protocol

from rollout.credentials import ApiKey

COOKIE = "sluice_session"
LIFETIME = timedelta(hours=12)
_EXPIRES = re.compile(r"[0-9]{1,12}")


class Keys(Protocol):
    async def named(self, key_id: str) -> ApiKey | None: ...


def issue(key: ApiKey, now: datetime) -> str:
    expires = int((now + LIFETIME).timestamp())
    return f"{key.id}.{expires}.{_sign(key, f'session:{key.id}:{expires}')}"


async def check(keys: Keys, cookie: str, now: datetime) -> ApiKey | None:
    """The key behind the cookie, or None where it is forged, too old or of a revoked key."""
    key_id, _, rest = cookie.partition(".")
    expires, _, signature = rest.partition(".")
    if not _EXPIRES.fullmatch(expires) or int(expires) < now.timestamp():
        return None
    key = await keys.named(key_id)
    if key is None:
        return None
    wanted = _sign(key, f"session:{key_id}:{expires}")
    return key if hmac.compare_digest(wanted.encode(), signature.encode()) else None


def form_token(key: ApiKey, cookie: str) -> str:
    """What a form must bring along, so that no other site can send it in somebody's name."""
    return _sign(key, f"form:{cookie}")


def _sign(key: ApiKey, text: str) -> str:
    return hmac.new(key.digest.encode(), text.encode(), hashlib.sha256).hexdigest()
