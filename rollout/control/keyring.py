"""Who a secret belongs to, remembered for a second so that a page is not a dozen store reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from rollout.credentials import ApiKey, digest_secret
from rollout.stores import Stores

# A revoked key is refused after this long at the latest.
_REMEMBERED_SECONDS = 1.0
BOOTSTRAP_ID = "bootstrap"


@dataclass(frozen=True, slots=True)
class _Known:
    at: float
    by_digest: Mapping[str, ApiKey]


class Keyring:
    """The store's keys, and the bootstrap key, which works with the store gone as well."""

    def __init__(
        self, stores: Stores, bootstrap: str | None, monotonic: Callable[[], float]
    ) -> None:
        self._stores = stores
        self._bootstrap = None if bootstrap is None else _bootstrap_key(bootstrap)
        self._monotonic = monotonic
        self._known: _Known | None = None

    async def find(self, secret: str) -> ApiKey | None:
        """The key with this secret, or None. Raises StoreUnavailableError."""
        digest = digest_secret(secret)
        if self._bootstrap is not None and digest == self._bootstrap.digest:
            return self._bootstrap
        return (await self._keys()).get(digest)

    async def named(self, key_id: str) -> ApiKey | None:
        """The key with this id, or None. Raises StoreUnavailableError."""
        if self._bootstrap is not None and key_id == self._bootstrap.id:
            return self._bootstrap
        keys = await self._keys()
        return next((key for key in keys.values() if key.id == key_id), None)

    def forget(self) -> None:
        """Read the store again at the next question: a key was added or revoked here."""
        self._known = None

    async def _keys(self) -> Mapping[str, ApiKey]:
        now = self._monotonic()
        if self._known is None or now - self._known.at > _REMEMBERED_SECONDS:
            keys = await self._stores.credentials.list()
            self._known = _Known(now, {key.digest: key for key in keys})
        return self._known.by_digest


def _bootstrap_key(secret: str) -> ApiKey:
    return ApiKey(
        id=BOOTSTRAP_ID,
        name="bootstrap",
        digest=digest_secret(secret),
        scopes=frozenset({"admin"}),
        created_at=datetime.fromtimestamp(0, UTC),
    )
