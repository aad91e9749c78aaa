"""Every error that Sluice raises on purpose, named after what the caller can do.

SluiceError
├── InvalidInputError          mend the input and try again
│   └── ConfigError            mend the configuration file
├── AuthenticationError        send a valid key
│   └── PermissionDeniedError  ask for a key with that scope or route
├── NotFoundError              ask for something that exists
├── ConflictError              reload, look, decide again
│   ├── StaleRevisionError     somebody else committed first
│   └── RefusedError           the present state does not allow it
├── UnservableError            the engine cannot serve this adapter
├── LeaseLostError             stop: another process has taken over
└── UnavailableError           wait and try again
    ├── StoreUnavailableError  Redis does not answer
    └── EngineUnavailableError no replica answers
"""

from typing import ClassVar


class SluiceError(Exception):
    """Base of all of them: a message for people, and how HTTP speaks of it.

    `param` names the field at fault, in the spelling of whoever sent it.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidInputError(SluiceError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_input"


class ConfigError(InvalidInputError):
    code = "invalid_configuration"


class AuthenticationError(SluiceError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDeniedError(AuthenticationError):
    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFoundError(SluiceError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ConflictError(SluiceError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class StaleRevisionError(ConflictError):
    code = "stale_revision"


class RefusedError(ConflictError):
    code = "refused"


class UnservableError(SluiceError):
    status = 422
    type = "invalid_request_error"
    code = "unservable_adapter"


class LeaseLostError(SluiceError):
    status = 409
    type = "server_error"
    code = "lease_lost"


class UnavailableError(SluiceError):
    status = 503
    type = "server_error"
    code = "unavailable"


class StoreUnavailableError(UnavailableError):
    code = "store_unavailable"


class EngineUnavailableError(UnavailableError):
    code = "engine_unavailable"
