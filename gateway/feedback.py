"""What callers say of answers: taken at once, counted for its arm, written beside the requests.

A worker knows the newest requests that it has answered itself. Of any other it asks around through
the store, and the worker that knows the request counts it: so each is counted once, by the one
incarnation whose evidence it belongs to. No request waits for the store.
"""

import asyncio
import logging
from collections import deque
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Final

import msgspec

from gateway.call import HeaderList, Receive
from gateway.errors import OverloadedError, TooLargeError
from gateway.metrics import Metrics
from gateway.receipts import Receipts
from gateway.settings import FeedbackSection
from rollout.credentials import ApiKey
from rollout.errors import InvalidInputError, NotFoundError, StoreUnavailableError
from rollout.exchanges import Feedback, Rating, Receipt
from rollout.redaction import RedactionTimeoutError, Redactor
from rollout.stores import Stores
from rollout.stores.feedback import FeedbackStore

_log = logging.getLogger(__name__)
_RETRY_SECONDS: Final = 0.5
_LISTEN_SECONDS: Final = 2.0
_LOOK_SECONDS: Final = 2.0
_LONGEST_TEXT: Final = 32_768

_RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_Text = Annotated[str, msgspec.Meta(max_length=_LONGEST_TEXT)]


class _Given(msgspec.Struct, forbid_unknown_fields=True):
    request_id: _RequestId
    rating: Rating
    correction: _Text | None = None
    comment: _Text | None = None


_given: Final = msgspec.json.Decoder(_Given)


class FeedbackDesk:
    """`take` never waits; `run` carries to the store what was taken."""

    def __init__(
        self,
        settings: FeedbackSection,
        receipts: Receipts,
        redactor: Redactor,
        metrics: Metrics,
        incarnation: str,
    ) -> None:
        self._settings = settings
        self._receipts = receipts
        self._redactor = redactor
        self._metrics = metrics
        self._incarnation = incarnation
        self._waiting: deque[Feedback] = deque()
        self._arrived = asyncio.Event()
        # Whether no other worker lives that could know a request.
        self._alone = False

    def take(self, key: ApiKey, body: bytes) -> bool:
        """Accept what a caller says of an answer; False where something was said of it before.

        Raises InvalidInputError, NotFoundError where nobody can know the request, OverloadedError.
        """
        given = _read(body)
        if len(self._waiting) >= self._settings.maximum_waiting:
            raise OverloadedError("too much feedback waits for the store: try again")
        feedback = Feedback(
            request_id=given.request_id,
            key=key.id,
            rating=given.rating,
            given_at=datetime.now(UTC),
            correction=given.correction,
            comment=given.comment or "",
        )
        if self._receipts.find(key.id, given.request_id) is not None:
            return self._claim(feedback)
        if self._alone:
            raise NotFoundError(
                f"no request {given.request_id!r} of this API key is known: rate an answer soon, "
                "by the x-request-id that came with it",
                param="request_id",
            )
        self._put(feedback)
        return True

    async def run(self, stores: Stores) -> None:
        """Write, listen to what others ask, and look who else is there, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write(stores.feedback))
            tasks.create_task(self._listen(stores.feedback))
            tasks.create_task(self._look_around(stores))

    async def flush(self, store: FeedbackStore) -> None:
        """Write what waits, once, at the end."""
        while self._waiting:
            await self._store(store, self._waiting[0])
            self._waiting.popleft()

    def _claim(self, feedback: Feedback) -> bool:
        """Count feedback on a request of this worker, the first time; whether it was the first."""
        known = self._receipts.find(feedback.key, feedback.request_id)
        if known is None or not self._receipts.rate(feedback.key, feedback.request_id):
            return False
        version, arm, trial, cell, unit = known
        if cell is not None:
            cell.rate(unit, bad=feedback.rating == "bad")
        self._metrics.rated(version.route, feedback.rating)
        receipt = Receipt(version.route, version.number, arm, trial or None, unit)
        self._put(replace(feedback, receipt=receipt))
        return True

    def _put(self, feedback: Feedback) -> None:
        if len(self._waiting) >= self._settings.maximum_waiting:
            self._metrics.feedback_dropped("full")
            return
        self._waiting.append(feedback)
        self._arrived.set()

    async def _write(self, store: FeedbackStore) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            try:
                await self.flush(store)
            except StoreUnavailableError:
                await asyncio.sleep(_RETRY_SECONDS)
                self._arrived.set()
            except Exception:  # noqa: BLE001 - this loop must not end; it says what happened
                _log.exception("feedback could not be written and was dropped")
                self._metrics.feedback_dropped("error")
                self._waiting.popleft()
                self._arrived.set()

    async def _store(self, store: FeedbackStore, feedback: Feedback) -> None:
        feedback = await self._redacted(feedback)
        if feedback.receipt is None:
            await store.ask_around(feedback)
        elif await store.put(feedback) == "full":
            self._metrics.feedback_dropped("full")

    async def _redacted(self, feedback: Feedback) -> Feedback:
        if feedback.correction is None and not feedback.comment:
            return feedback
        try:
            correction, comment = await asyncio.to_thread(
                lambda: (
                    self._redactor.text(feedback.correction or ""),
                    self._redactor.text(feedback.comment),
                )
            )
        except RedactionTimeoutError:
            self._metrics.feedback_dropped("redaction")
            return replace(feedback, correction=None, comment="")
        return replace(feedback, correction=correction or None, comment=comment)

    async def _listen(self, store: FeedbackStore) -> None:
        """Claim what others were told of requests that this worker has answered."""
        position: str | None = None
        while True:
            try:
                if position is None:
                    position = await store.newest()
                for entry, feedback in await store.asked(position, _LISTEN_SECONDS):
                    self._claim(feedback)
                    position = entry
            except StoreUnavailableError:
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception:  # noqa: BLE001 - this loop must not end; it says what happened
                _log.exception("what others were told could not be read; it is tried again")
                position = None
                await asyncio.sleep(_RETRY_SECONDS)

    async def _look_around(self, stores: Stores) -> None:
        while True:
            try:
                live = await stores.presence.live()
                self._alone = {each.incarnation for each in live} <= {self._incarnation}
            except StoreUnavailableError:
                self._alone = False
            except Exception:  # noqa: BLE001 - this loop must not end; it says what happened
                _log.exception("cannot tell which other gateways live")
                self._alone = False
            await asyncio.sleep(_LOOK_SECONDS)


async def read_body(receive: Receive, headers: HeaderList, maximum: int, seconds: float) -> bytes:
    """A small body, whole. Raises TooLargeError, or InvalidInputError where it comes too slowly."""
    if next((int(v) for n, v in headers if n == b"content-length"), 0) > maximum:
        raise TooLargeError(f"the body is larger than {maximum} bytes")
    parts: list[bytes] = []
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                parts.append(message.get("body", b""))
                if sum(map(len, parts)) > maximum:
                    raise TooLargeError(f"the body is larger than {maximum} bytes")
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError as exc:
        raise InvalidInputError(f"the body did not arrive within {seconds:g} s") from exc


def _read(body: bytes) -> _Given:
    try:
        return _given.decode(body)
    except msgspec.ValidationError as exc:
        _, found, path = str(exc).partition("`$.")
        raise InvalidInputError(
            f'send {{"request_id", "rating": "good" or "bad", "correction"?, "comment"?}}: {exc}',
            param=path.rstrip("`") if found else None,
        ) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidInputError(f"the body is no valid JSON: {exc}") from exc
