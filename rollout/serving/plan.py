"""Which adapters an engine must hold, and what a replica has to load and unload to get there."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from rollout.catalog import Catalog
from rollout.state import Rollout
from rollout.versions import Version

_DIGEST = re.compile(r"[0-9a-f]{20}")


@dataclass(frozen=True, slots=True)
class ResidencyPlan:
    """Served names to load and to unload on one replica, and those that it has no slot for."""

    load: tuple[str, ...] = ()
    unload: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def required_versions(
    catalog: Catalog, wanted: Collection[str]
) -> Mapping[str, tuple[Version, ...]]:
    """The versions with an adapter that each engine must hold, the most important first.

    That is by what would suffer, over all routes: every stable, for it has the traffic; then the
    candidates; then what somebody wants to look at, for a while; then the last stables, each route's
    way back. Versions that share weights are one.
    """
    required: dict[str, dict[str, Version]] = {}
    for name in _needed(list(catalog.rollouts.values()), wanted):
        version = catalog.versions.get(name)
        if version is not None and version.adapter is not None:
            required.setdefault(version.engine, {}).setdefault(version.served_name, version)
    return {engine: tuple(versions.values()) for engine, versions in required.items()}


def _needed(rollouts: Sequence[Rollout], wanted: Collection[str]) -> Iterator[str]:
    yield from (f"{rollout.route}@{rollout.stable}" for rollout in rollouts)
    yield from (f"{r.route}@{r.trial.candidate}" for r in rollouts if r.trial is not None)
    yield from sorted(wanted)
    yield from (f"{r.route}@{r.previous}" for r in rollouts if r.previous is not None)


def residency_plan(
    adapters: Set[str],
    required: Sequence[str],
    drained: Set[str],
    *,
    base: str,
    max_adapters: int,
) -> ResidencyPlan:
    """What to do on a replica that holds `adapters`, so that it comes to hold `required`.

    `required` is in the order of importance. Only names of our own scheme are unloaded, and only
    those in `drained`. Adapters that somebody else loaded keep their slots. Never plans for more
    than `max_adapters` at a time.
    """
    slots = _slots(adapters, base, max_adapters)
    missing = [name for name in required[:slots] if name not in adapters]
    idle = idle_adapters(adapters, required, base=base, max_adapters=max_adapters)
    return ResidencyPlan(
        load=tuple(missing[: max(0, max_adapters - len(adapters))]),
        unload=tuple(sorted(idle & drained)),
        refused=tuple(required[slots:]),
    )


def idle_adapters(
    adapters: Set[str], required: Sequence[str], *, base: str, max_adapters: int
) -> frozenset[str]:
    """Those of our adapters that nothing needs, or that must make room for more important ones."""
    kept = required[: _slots(adapters, base, max_adapters)]
    return _ours(adapters, base) - frozenset(kept)


def is_ours(name: str, base: str) -> bool:
    """Whether `name` follows our scheme for adapters, `base-<20 hex digits>`."""
    prefix, _, digest = name.rpartition("-")
    return prefix == base and _DIGEST.fullmatch(digest) is not None


def _ours(adapters: Set[str], base: str) -> frozenset[str]:
    return frozenset(name for name in adapters if is_ours(name, base))


def _slots(adapters: Set[str], base: str, max_adapters: int) -> int:
    """How many of our adapters there is room for."""
    return max(0, max_adapters - len(adapters - _ours(adapters, base)))
