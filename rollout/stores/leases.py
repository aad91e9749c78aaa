"""Leases with fencing tokens: at most one holder, and none for longer than it renews."""

from rollout.stores import keys
from rollout.stores.link import RedisLink


class LeaseStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def acquire(self, name: str, holder: str, seconds: float) -> int | None:
        """The fencing token where `holder` has the lease now, None where somebody else has it."""
        return await self._lease(name, holder, seconds, "acquire")

    async def renew(self, name: str, holder: str, seconds: float) -> bool:
        """Whether `holder` still has it."""
        return await self._lease(name, holder, seconds, "renew") is not None

    async def release(self, name: str, holder: str) -> None:
        await self._link.script("release", [keys.lease(name)], [holder])

    async def _lease(self, name: str, holder: str, seconds: float, how: str) -> int | None:
        fence = await self._link.script(
            "lease",
            [keys.lease(name), keys.lease_fence(name)],
            [holder, int(seconds * 1000), how],
        )
        return None if fence == -1 else int(fence)
