"""Who is asking: a bearer key, found in the catalog by its digest."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from rollout.credentials import NO_LIMITS, ApiKey, Scope, digest_secret
from rollout.errors import AuthenticationError, PermissionDeniedError

_SCHEME: Final = b"bearer "
# Where the key brought along by automation was made is not known, nor does it matter.
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# Headers whose key is remembered, so that it is not hashed again for each request.
_MOST_KNOWN: Final = 1024


class Authenticator:
    """Knows the bootstrap key; every other is in the catalog that comes with each request."""

    __slots__ = ("_bootstrap", "_infers", "_keys", "_known")

    def __init__(self, bootstrap_secret: str | None) -> None:
        self._bootstrap: Mapping[str, ApiKey] = {}
        if bootstrap_secret:
            digest = digest_secret(bootstrap_secret)
            key = ApiKey("bootstrap", "bootstrap", digest, frozenset({"admin"}), _EPOCH)
            self._bootstrap = {digest: key}
        # Whom the last headers belong to, as long as the catalog's keys are these, and who of them
        # may infer.
        self._keys: Mapping[str, ApiKey] = {}
        self._known: dict[bytes, ApiKey] = {}
        self._infers: dict[bytes, ApiKey] = {}

    def authenticate(
        self, authorization: bytes | None, keys: Mapping[str, ApiKey], scope: Scope = "infer"
    ) -> ApiKey:
        """The caller's key; one that is not limited has NO_LIMITS itself. Raises
        AuthenticationError, or PermissionDeniedError for the scope."""
        if authorization is None:
            raise AuthenticationError(
                "no API key: send it as `Authorization: Bearer KEY`, or set it in the client"
            )
        if keys is not self._keys:
            self._keys, self._known, self._infers = keys, {}, {}
        elif scope == "infer" and (known := self._infers.get(authorization)) is not None:
            return known
        key = self._known.get(authorization)
        if key is None:
            key = self._find(authorization, keys)
        if not key.allows(scope):
            raise PermissionDeniedError(f"this API key lacks the scope `{scope}`")
        if scope == "infer":
            self._infers[authorization] = key
        return key

    def _find(self, authorization: bytes, keys: Mapping[str, ApiKey]) -> ApiKey:
        if authorization[:7].lower() != _SCHEME:
            raise AuthenticationError("the API key must be sent as `Authorization: Bearer KEY`")
        digest = hashlib.sha256(authorization[7:].strip()).hexdigest()
        key = keys.get(digest) or self._bootstrap.get(digest)
        if key is None:
            raise AuthenticationError("this API key is not valid, or was revoked")
        if key.limits.unlimited:
            key = replace(key, limits=NO_LIMITS)
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
            self._infers.clear()
        self._known[authorization] = key
        return key
