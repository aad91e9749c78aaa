"""API keys, hashed; revoking one is announced like any other change."""

from rollout.credentials import ApiKey
from rollout.errors import NotFoundError
from rollout.stores import keys
from rollout.stores.audit import audit_entry
from rollout.stores.codec import decode, encode
from rollout.stores.link import RedisLink


class CredentialStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def add(self, key: ApiKey, *, by: str) -> None:
        """Store a key under its id; one that stands there is replaced."""
        await self._put(key.id, encode(key), "key.add", by)

    async def list(self) -> list[ApiKey]:
        """The oldest first."""
        table = await self._link.run("HGETALL", keys.CREDENTIALS)
        found = [decode(ApiKey, text) for text in table.values()]
        return sorted(found, key=lambda key: key.created_at)

    async def revoke(self, key_id: str, *, by: str) -> None:
        """Raises NotFoundError where there is no such key."""
        if not await self._put(key_id, b"", "key.revoke", by):
            raise NotFoundError(
                f"there is no key {key_id!r}; `sluice keys list` shows those that exist",
                param="id",
            )

    async def _put(self, key_id: str, text: bytes, action: str, by: str) -> bool:
        changed = await self._link.script(
            "credential",
            [keys.CREDENTIALS, keys.AUDIT, keys.REVISION],
            [key_id, text, encode(audit_entry(action, key_id, by)), keys.ANNOUNCEMENTS],
        )
        return bool(changed)
