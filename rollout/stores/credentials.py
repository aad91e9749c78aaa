"""API keys, hashed; revoking one is announced like any other change."""

from collections.abc import Callable
from dataclasses import replace

from rollout.credentials import ApiKey
from rollout.errors import ConflictError, NotFoundError
from rollout.records import AuditEntry
from rollout.stores import keys
from rollout.stores.audit import audit_entry
from rollout.stores.codec import decode, encode
from rollout.stores.link import RedisLink

# More than this many changes of one key between a look and a write are a fight.
_ATTEMPTS = 5


class CredentialStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def add(self, key: ApiKey, *, by: str) -> None:
        """Store a key under its id; one that stands there is replaced."""
        entry = audit_entry("key.add", key.id, by, after=_told(key))
        await self._put(key.id, encode(key), entry)

    async def list(self) -> list[ApiKey]:
        """The oldest first."""
        table = await self._link.run("HGETALL", keys.CREDENTIALS)
        found = [decode(ApiKey, text) for text in table.values()]
        return sorted(found, key=lambda key: key.created_at)

    async def change(self, key_id: str, change: Callable[[ApiKey], ApiKey], *, by: str) -> ApiKey:
        """Put `change` of the key in its place; one that is revoked meanwhile stays revoked.

        Raises NotFoundError where there is no such key.
        """
        for _ in range(_ATTEMPTS):
            before = await self._link.run("HGET", keys.CREDENTIALS, key_id)
            if before is None:
                raise _unknown(key_id)
            now = decode(ApiKey, before)
            after = change(now)
            if after == now:
                return after
            entry = audit_entry("key.change", key_id, by, before=_told(now), after=_told(after))
            if await self._put(key_id, encode(after), entry, before=before):
                return after
        raise ConflictError(f"the key {key_id} is being changed by somebody else: try again")

    async def revoke(self, key_id: str, *, by: str) -> None:
        """Raises NotFoundError where there is no such key."""
        before = await self._link.run("HGET", keys.CREDENTIALS, key_id)
        told = None if before is None else _told(decode(ApiKey, before))
        entry = audit_entry("key.revoke", key_id, by, before=told)
        if not await self._put(key_id, b"", entry):
            raise _unknown(key_id)

    async def _put(self, key_id: str, text: bytes, entry: AuditEntry, *, before: str = "") -> bool:
        changed = await self._link.script(
            "credential",
            [keys.CREDENTIALS, keys.AUDIT, keys.REVISION],
            [key_id, text, encode(entry), keys.ANNOUNCEMENTS, before],
        )
        return bool(changed)


def _told(key: ApiKey) -> ApiKey:
    """The key as the audit may show it."""
    return replace(key, digest="")


def _unknown(key_id: str) -> NotFoundError:
    return NotFoundError(
        f"there is no key {key_id!r}; `sluice keys list` shows those that exist", param="id"
    )
