"""Which version answers: the catalog, indexed for the hot path, and the choice made on it."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from rollout.assignment import bucket
from rollout.catalog import Catalog
from rollout.credentials import ApiKey
from rollout.engines import Engine, Residency
from rollout.exchanges import Arm
from rollout.routes import Route
from rollout.state import Trial
from rollout.versions import Version

_PLACES: Final = 2**32
_LAST_PLACE: Final = _PLACES - 1
_ODD: Final = 0x9E3779B1


@dataclass(frozen=True, slots=True)
class Served:
    """A version with the replicas that serve it now; `name` is the served name as JSON.

    `rewrites` is whether more of a body changes than the model's name.
    """

    version: Version
    name: bytes
    urls: tuple[str, ...]
    rewrites: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """What answers, and what answers instead where that fails before its first byte.

    `arm` is the assigned arm: evidence goes by it even where `fallback` answered.
    """

    served: Served
    arm: Arm
    fallback: Served | None = None


@dataclass(frozen=True, slots=True)
class Lane:
    """A route with its stable version and the candidate of its trial, or one pinned version.

    `as_stable` and `as_candidate` are all that can be chosen here, made once.
    """

    route: Route
    stable: Served
    candidate: Served | None = None
    trial: Trial | None = None
    pinned: bool = False
    revision: int = 0
    as_stable: Choice = field(init=False)
    as_candidate: Choice = field(init=False)

    def __post_init__(self) -> None:
        stable = Choice(self.stable, "pinned" if self.pinned else "stable")
        candidate = stable
        if self.candidate is not None:
            candidate = Choice(self.candidate, "candidate", self.stable)
        object.__setattr__(self, "as_stable", stable)
        object.__setattr__(self, "as_candidate", candidate)

    @property
    def number(self) -> int:
        return self.stable.version.number


@dataclass(frozen=True, slots=True)
class View:
    """A catalog as the hot path reads it: `lanes` by what a client may put into `model`."""

    revision: int = 0
    lanes: Mapping[str, Lane] = field(default_factory=dict)
    keys: Mapping[str, ApiKey] = field(default_factory=dict)
    versions: Mapping[str, Version] = field(default_factory=dict)


def index(catalog: Catalog, engines: Mapping[str, Engine]) -> View:
    """Lay the catalog out for the hot path. A route without a known stable version has no lane."""
    served = {
        name: _served(version, engines, catalog.residency)
        for name, version in catalog.versions.items()
    }
    lanes: dict[str, Lane] = {}
    for name, one in served.items():
        if (route := catalog.routes.get(one.version.route)) is not None:
            lanes[name] = Lane(route=route, stable=one, pinned=True)
    for route in catalog.routes.values():
        rollout = catalog.rollouts.get(route.name)
        stable = served.get(f"{route.name}@{rollout.stable}") if rollout else None
        if rollout is None or stable is None:
            continue
        trial = rollout.trial
        candidate = served.get(f"{route.name}@{trial.candidate}") if trial else None
        lanes[route.name] = Lane(
            route=route,
            stable=stable,
            candidate=candidate,
            trial=trial if candidate else None,
            revision=rollout.revision,
        )
    return View(
        revision=catalog.revision, lanes=lanes, keys=catalog.keys, versions=catalog.versions
    )


def choose(lane: Lane, unit: str) -> Choice:
    """The version that answers this unit, by the keyed hash of its trial."""
    if lane.pinned or lane.trial is None or not on_candidate(lane.trial, unit):
        return lane.as_stable
    return lane.as_candidate


def on_candidate(trial: Trial, unit: str) -> bool:
    """Whether this unit belongs to the candidate.

    The trial's id is the salt: every trial deals anew, and within one a unit that was dealt the
    candidate at some weight keeps it at every larger weight.
    """
    return trial.weight > 0 and bucket(trial.id, unit) * 100 < trial.weight


def wants_capture(request_id: str, rate: float) -> bool:
    """Whether this exchange is kept; `rate` is the chance of it.

    A checksum is as good here as a keyed hash, for nobody gains by choosing what is kept. The ids
    of one worker follow one another, and their checksums lie in lines; multiplied by an odd number
    and cut off they lie as if by chance (Knuth, The Art of Computer Programming, 6.4).
    """
    checksum = zlib.crc32(request_id.encode())
    # The product of both, in two halves: whole it would be too large for the compiler's integers.
    upper, lower = checksum >> 16, checksum & 0xFFFF
    place = (((upper * _ODD & 0xFFFF) << 16) + lower * _ODD) & _LAST_PLACE
    return place < rate * _PLACES


def _served(
    version: Version, engines: Mapping[str, Engine], residency: Mapping[str, Residency]
) -> Served:
    engine = engines.get(version.engine)
    urls = engine.urls if engine is not None else ()
    return Served(
        version=version,
        name=msgspec.json.encode(version.served_name),
        urls=tuple(url for url in urls if _is_resident(version, engine, residency.get(url))),
        rewrites=version.rewrites_body,
    )


def _is_resident(version: Version, engine: Engine | None, residency: Residency | None) -> bool:
    """Whether a replica is known to serve the version; the base needs no proof."""
    if version.adapter is None or (engine is not None and engine.kind == "openai"):
        return True
    return residency is not None and version.served_name in residency.served
