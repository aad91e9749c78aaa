"""Which gateways are alive, and which catalog revision each of them serves."""

from rollout.records import GatewayPresence
from rollout.stores import keys
from rollout.stores.codec import decode, encode
from rollout.stores.link import RedisLink


class PresenceStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def report(self, presence: GatewayPresence, ttl_seconds: float = 10.0) -> None:
        """Say that it lives; after `ttl_seconds` of silence it is taken for dead."""
        await self._link.script(
            "presence",
            [keys.GATEWAYS, keys.GATEWAYS_SEEN],
            [presence.incarnation, encode(presence), int(ttl_seconds * 1000)],
        )

    async def leave(self, incarnation: str) -> None:
        """Say goodbye, so that nobody waits for it."""
        await self._link.run_all(
            [
                ("HDEL", keys.GATEWAYS, incarnation),
                ("ZREM", keys.GATEWAYS_SEEN, incarnation),
            ]
        )

    async def live(self) -> list[GatewayPresence]:
        rows = await self._link.script("live", [keys.GATEWAYS, keys.GATEWAYS_SEEN], [])
        return [decode(GatewayPresence, row) for row in rows if row]
