"""The index of suites, how often each was looked at, and answers that are kept to be used again."""

from collections.abc import Sequence

from rollout.stores import keys
from rollout.stores.codec import decode, encode
from rollout.stores.digests import find
from rollout.stores.link import RedisLink
from rollout.suites import Look, SuiteManifest


class SuiteStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def put(self, manifest: SuiteManifest) -> SuiteManifest:
        """Index a suite. The same rows and scorers again are the suite that is there already."""
        await self._link.run("HSETNX", keys.SUITE_INDEX, manifest.digest, encode(manifest))
        return await self.get(manifest.digest)

    async def get(self, digest: str) -> SuiteManifest:
        """By its digest, a beginning of it that no other has, or its name."""
        wanted = digest.rpartition(":")[2]
        text = await find(self._link, keys.SUITE_INDEX, wanted, "suite", param="suite")
        return decode(SuiteManifest, text)

    async def list(self, route: str | None = None) -> Sequence[SuiteManifest]:
        """The newest first."""
        table = await self._link.run("HGETALL", keys.SUITE_INDEX)
        found = [decode(SuiteManifest, text) for text in table.values()]
        found = [each for each in found if route in (None, each.route)]
        return sorted(found, key=lambda each: each.created_at, reverse=True)

    async def of_route(self, route: str) -> SuiteManifest | None:
        """The newest one of a route that is open to everyone."""
        return next((each for each in await self.list(route) if not each.vault), None)

    async def look(self, look: Look) -> int:
        """Count a look before its result is known; how many versions the suite has judged by now.

        The same version for the same run counts once, however often the run is taken up.
        """
        field = f"{look.version}|{look.run}"
        await self._link.run("HSETNX", keys.suite_looks(look.suite), field, encode(look))
        return len({each.version for each in await self.looks(look.suite)})

    async def looks(self, digest: str) -> Sequence[Look]:
        """The oldest first."""
        table = await self._link.run("HGETALL", keys.suite_looks(digest))
        return sorted((decode(Look, text) for text in table.values()), key=lambda each: each.at)

    async def keep_answers(self, fingerprint: str, document: str) -> None:
        """Remember where the answers lie that a version gives to a suite under one decoding."""
        await self._link.run("HSET", keys.KEPT_ANSWERS, fingerprint, document)

    async def kept_answers(self, fingerprint: str) -> str | None:
        document: str | None = await self._link.run("HGET", keys.KEPT_ANSWERS, fingerprint)
        return document
