"""The ledger of keys' limits: what each gateway worker has spent of them, and what it may spend."""

from collections.abc import Sequence
from typing import Final

from rollout.quotas import PATIENCE_SECONDS, KeyGrant, KeyReport, Settlement
from rollout.stores import keys
from rollout.stores.codec import decode, encode_as
from rollout.stores.link import RedisLink

# A worker that is silent for longer loses its share.
SILENCE_SECONDS: Final = 5.0
# A key that nobody asked with for longer has all of its limits a minute again.
ACTIVE_SECONDS: Final = 60.0
_KEEP_MONTH_SECONDS: Final = 100 * 86_400
# So many keys in use are named to each worker; beyond, one learns of a key when it is asked with.
_NAMED: Final = 2_000


class QuotaStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def settle(
        self, incarnation: str, period: str, reports: Sequence[KeyReport]
    ) -> Settlement:
        """Report and be granted, for all keys in one step.

        What is reported is absolute, so a report that is sent twice spends nothing twice.
        """
        workers, grants, active = await self._link.script(
            "quotas",
            [
                keys.GATEWAYS_SEEN,
                keys.QUOTAS_ACTIVE,
                keys.month_tokens(period),
                keys.month_tokens_by_worker(period),
                *(keys.quota(report.id) for report in reports),
            ],
            [
                incarnation,
                encode_as(list[KeyReport], list(reports)),
                int(SILENCE_SECONDS * 1000),
                int(ACTIVE_SECONDS * 1000),
                _KEEP_MONTH_SECONDS,
                _NAMED,
                int(PATIENCE_SECONDS * 1000),
            ],
        )
        return Settlement(
            workers=workers,
            grants={
                report.id: decode(KeyGrant, text)
                for report, text in zip(reports, grants, strict=True)
            },
            active=frozenset(active),
        )

    async def month_tokens(self, period: str) -> dict[str, int]:
        """The tokens of each key in a month (`2026-01`), by the key's id."""
        table = await self._link.run("HGETALL", keys.month_tokens(period))
        return {key: int(tokens) for key, tokens in table.items()}
