"""All that a gateway needs to route, as of one revision."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rollout.credentials import ApiKey
from rollout.engines import Residency
from rollout.routes import Route
from rollout.state import Rollout
from rollout.versions import Version


@dataclass(frozen=True, slots=True)
class Catalog:
    """`revision` is the store's count of announced changes; a gateway reports the one it serves.

    `versions` are keyed by their name (`route@number`), `keys` by the digest of their secret,
    `residency` by the replica's url.
    """

    revision: int = 0
    routes: Mapping[str, Route] = field(default_factory=dict)
    rollouts: Mapping[str, Rollout] = field(default_factory=dict)
    versions: Mapping[str, Version] = field(default_factory=dict)
    keys: Mapping[str, ApiKey] = field(default_factory=dict)
    residency: Mapping[str, Residency] = field(default_factory=dict)
