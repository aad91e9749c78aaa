"""Who changed what, when and why: an append-only stream."""

from datetime import UTC, datetime

from rollout.records import AuditEntry
from rollout.stores import keys
from rollout.stores.codec import decode, encode
from rollout.stores.link import RedisLink


def audit_entry(
    action: str,
    subject: str,
    by: str,
    *,
    reason: str = "",
    before: object | None = None,
    after: object | None = None,
) -> AuditEntry:
    """An entry of this moment."""
    return AuditEntry(
        action=action,
        subject=subject,
        by=by,
        at=datetime.now(UTC),
        reason=reason,
        before=None if before is None else encode(before).decode(),
        after=None if after is None else encode(after).decode(),
    )


class AuditStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def append(self, entry: AuditEntry) -> None:
        await self._link.run(
            "XADD", keys.AUDIT, "MAXLEN", "~", 100_000, "*", "entry", encode(entry)
        )

    async def list(self, limit: int = 100) -> list[AuditEntry]:
        """The newest first."""
        rows = await self._link.run("XREVRANGE", keys.AUDIT, "+", "-", "COUNT", limit)
        return [decode(AuditEntry, fields["entry"]) for _, fields in rows]
