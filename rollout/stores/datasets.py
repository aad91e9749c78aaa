"""The index of datasets, what was ever evaluated on, and which prompt belongs to which split."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from rollout.datasets import Manifest, SuiteUse
from rollout.stores import keys
from rollout.stores.codec import decode, encode
from rollout.stores.digests import find
from rollout.stores.link import RedisLink

T = TypeVar("T")

_BATCH = 1000


@dataclass(frozen=True, slots=True)
class KeptPlaces:
    """`anchors`: a prompt's digest to that of its cluster; `held`: anchors once held out."""

    anchors: Mapping[str, str]
    held: frozenset[str]


class DatasetStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def put(self, manifest: Manifest) -> Manifest:
        """Index a dataset. The same rows made again keep the time and the run of the first."""
        known = await self._link.run("HGET", keys.DATASETS, manifest.digest)
        if known is not None:
            first = decode(Manifest, known)
            if first.route == manifest.route:
                manifest = replace(
                    manifest,
                    created_at=first.created_at,
                    created_by=first.created_by,
                    run=first.run,
                )
        await self._link.run("HSET", keys.DATASETS, manifest.digest, encode(manifest))
        return manifest

    async def get(self, digest: str) -> Manifest:
        """By its digest, or a beginning of it that no other has."""
        return decode(
            Manifest, await find(self._link, keys.DATASETS, digest, "dataset", param="digest")
        )

    async def list(self, route: str | None = None) -> Sequence[Manifest]:
        """The newest first."""
        table = await self._link.run("HGETALL", keys.DATASETS)
        found = [decode(Manifest, text) for text in table.values()]
        found = [each for each in found if route in (None, each.route)]
        return sorted(found, key=lambda each: each.created_at, reverse=True)

    async def note_suite(self, use: SuiteUse) -> None:
        """Remember for good that something is evaluated on these prompts."""
        await self._link.run("HSETNX", keys.SUITES, use.prompts, encode(use))

    async def suites(self) -> Sequence[SuiteUse]:
        """Every suite that any route was ever evaluated on."""
        table = await self._link.run("HGETALL", keys.SUITES)
        return sorted(
            (decode(SuiteUse, text) for text in table.values()), key=lambda use: use.prompts
        )

    async def places(self, route: str) -> KeptPlaces:
        anchors, held = await self._link.run_all(
            [
                ("HGETALL", keys.dataset_anchors(route)),
                ("SMEMBERS", keys.dataset_held(route)),
            ]
        )
        return KeptPlaces(anchors, frozenset(held))

    async def keep_places(
        self, route: str, anchors: Mapping[str, str], held: Iterable[str]
    ) -> None:
        """Add to what is known; what was put somewhere once stays there."""
        # Held out comes first: cut off in between, nothing is trained on that was held out.
        for names in _batches(held):
            await self._link.run("SADD", keys.dataset_held(route), *names)
        for pairs in _batches(anchors.items()):
            flat = [text for pair in pairs for text in pair]
            await self._link.script("keep_places", [keys.dataset_anchors(route)], flat)


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, _BATCH)):
        yield batch
