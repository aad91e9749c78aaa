"""The collaborators of every action, put together once by the composition root."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from rollout.artifacts import ArtifactStore
from rollout.control.keyring import Keyring
from rollout.settings import Settings
from rollout.stores import Stores


@dataclass(frozen=True, slots=True)
class Control:
    stores: Stores
    settings: Settings
    artifacts: ArtifactStore
    keyring: Keyring
    now: Callable[[], datetime]
