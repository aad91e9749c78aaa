"""The collaborators of every action, put together once by the composition root."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from rollout.artifacts import ArtifactStore
from rollout.control.keyring import Keyring
from rollout.settings import Settings
from rollout.stores import Stores

# Adapters that are fetched from a URL at the same time: each takes a disk's and a network's share.
_FETCHES = 2


@dataclass(frozen=True, slots=True)
class Control:
    stores: Stores
    settings: Settings
    artifacts: ArtifactStore
    keyring: Keyring
    now: Callable[[], datetime]
    fetches: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_FETCHES))
