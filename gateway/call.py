"""One request on its way through the gateway: what is known of it so far."""

from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

from gateway.evidence import Cell, First, UnitTally
from gateway.quota import Ticket
from gateway.routing import Choice, Lane
from gateway.wire import Request
from rollout.credentials import ApiKey

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Coroutine[Any, Any, Message]]
Send = Callable[[Message], Awaitable[None]]
HeaderList = list[tuple[bytes, bytes]]


class Call:
    """Filled in step by step; `request`, `lane` and `choice` once the body was read.

    Times are those of `time.perf_counter`. `pieces` counts the writes of a stream. `limited` is the
    key where it has limits, `ticket` what was taken of them. In a trial, `cell` is where it counts,
    `first` where its unit does if this is its first request, and `comes_again` whether another may
    follow.
    """

    __slots__ = (
        "authorization", "capture", "captured", "captured_bytes", "cell", "choice", "comes_again",
        "counted", "engine_headers", "fell_back", "first", "first_byte_at", "id", "key", "lane",
        "limited", "no_capture", "path", "pieces", "query", "request", "sent_at", "session",
        "started", "ticket", "trial", "unit",
    )  # fmt: skip

    request: Request
    lane: Lane
    choice: Choice

    def __init__(self, path: str, query: bytes, started: float) -> None:
        self.path = path
        self.query = query
        self.started = started
        self.id = ""
        self.key = ""
        self.authorization: bytes | None = None
        self.session: str | None = None
        self.limited: ApiKey | None = None
        self.ticket: Ticket | None = None
        self.no_capture = False
        self.engine_headers: HeaderList = []
        self.unit = ""
        self.trial = ""
        self.cell: Cell | None = None
        self.first: UnitTally | First | None = None
        self.comes_again = False
        self.capture = False
        self.captured: list[bytes] = []
        self.captured_bytes = 0
        self.fell_back = False
        self.counted = False
        self.sent_at = 0.0
        self.first_byte_at = 0.0
        self.pieces = 0
