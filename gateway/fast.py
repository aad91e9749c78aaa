"""The plain case answered without a task: one request, one engine that answers at once and well.

Everything is decided by the functions that the relay has for it. What has to wait for something
else than the engine's answer is handed over to the relay, with the attempt that was begun: where no
connection is idle, where an engine fails or refuses, where an answer is too large to be held.
"""

import asyncio
import logging
from functools import partial
from time import perf_counter
from typing import Final

from gateway.accounts import CLIENT_GONE, Accounts, usage_so_far
from gateway.attempts import Attempt, Attempts, is_stream
from gateway.call import Call
from gateway.errors import UpstreamError, error_event
from gateway.protocol import Exchange
from gateway.relay import Relay
from gateway.sse import StreamReader
from gateway.wire import INFERENCE_PATHS, read_usage
from rollout.errors import SluiceError

_log = logging.getLogger(__name__)
_PATHS: Final = {path.encode(): path for path in INFERENCE_PATHS}


class FastPath:
    """Takes requests that have arrived whole; every answer under way is known until it is out."""

    __slots__ = ("accounts", "attempts", "relay", "under_way")

    def __init__(self, relay: Relay, attempts: Attempts, accounts: Accounts) -> None:
        self.relay = relay
        self.attempts = attempts
        self.accounts = accounts
        self.under_way: set[_Answering] = set()

    def take(self, exchange: Exchange) -> bool:
        """Answer a request for inference, now or when the engine does; False leaves it alone."""
        path = _PATHS.get(exchange.url)
        if path is None:
            return False
        relay = self.relay
        call = relay.enter(path, b"")
        try:
            key = relay.greet(call, exchange.headers)
            relay.open(call, key, exchange.take_body())
            attempt = self.attempts.begin(call)
        except SluiceError as error:
            self._refuse(exchange, call, error)
            return True
        except BaseException:
            relay.leave(call)
            raise
        if attempt is None or not attempt.response.started:
            exchange.hand_over(partial(relay.go_on, call, attempt))
            return True
        answering = _Answering(self, exchange, call, attempt)
        self.under_way.add(answering)
        exchange.sink = answering
        attempt.response.listen(answering.arrived)
        return True

    def _refuse(self, exchange: Exchange, call: Call, error: SluiceError) -> None:
        exchange.hand_over(lambda _, send: self.relay.refuse(call, error, send))

    def end(self) -> None:
        """Cut off what is still under way, and count it."""
        for answering in tuple(self.under_way):
            answering.cut()


class _Answering:
    """One call that waits for its engine: woken by what arrives, and by the client."""

    __slots__ = (
        "_accounts", "_attempt", "_call", "_exchange", "_largest", "_reader", "_relay",
        "_under_way",
    )  # fmt: skip

    def __init__(self, path: FastPath, exchange: Exchange, call: Call, attempt: Attempt) -> None:
        self._relay = path.relay
        self._accounts = path.accounts
        self._largest = path.attempts.largest
        self._under_way = path.under_way
        self._exchange = exchange
        self._call = call
        self._attempt = attempt
        # Set with the first byte to the client: from then on the stream is passed on.
        self._reader: StreamReader | None = None

    # What the engine's connection calls.

    def arrived(self) -> None:
        try:
            if self._reader is not None:
                self._pass_on(self._reader)
            else:
                self._look_at_answer()
        except Exception:  # noqa: BLE001 - the last net; it says what happened
            _log.exception("a request failed in a way that nobody foresaw")
            self._attempt.end("unknown")
            self._leave()
            self._exchange.cut()

    # What the client's connection calls.

    def pause(self) -> None:
        self._attempt.response.pause()

    def resume(self) -> None:
        self._attempt.response.resume()

    def gone(self) -> None:
        call, attempt = self._call, self._attempt
        if self._reader is None:
            self._accounts.unanswered(call, asyncio.CancelledError())
        else:
            self._accounts.answered(call, attempt, CLIENT_GONE, usage_so_far(attempt))
        attempt.end("unknown")
        self._leave()

    def cut(self) -> None:
        """End as if the client had gone away."""
        self.gone()
        self._exchange.cut()

    # Before the first byte.

    def _look_at_answer(self) -> None:
        attempt = self._attempt
        response = attempt.response
        if not response.has_head:
            if response.broken is not None:
                self._hand_over()
        elif response.status != 200:
            self._hand_over()
        elif attempt.reader is not None or is_stream(response):
            self._look_at_events(attempt.reader or attempt.read_stream(self._call))
        elif response.buffered > self._largest:
            self._hand_over()
        elif response.complete:
            self._deliver(response.take())
        elif response.full or response.broken is not None:
            self._hand_over()

    def _look_at_events(self, reader: StreamReader) -> None:
        attempt = self._attempt
        response = attempt.response
        if data := response.take():
            attempt.first = reader.feed(data)
        if reader.failed:
            self._hand_over()
        elif attempt.first or response.complete:
            self._call.first_byte_at = perf_counter()
            self._reader = reader
            self._exchange.begin(200, self._relay.headers(self._call, attempt))
            self._pass_on(reader, attempt.first)
        elif response.broken is not None:
            self._hand_over()
        else:
            response.resume()

    def _hand_over(self) -> None:
        """Let the relay go on with the attempt, and make others where that is of use."""
        self._under_way.discard(self)
        self._attempt.response.listen(None)
        self._exchange.hand_over(partial(self._relay.go_on, self._call, self._attempt))

    # The answer.

    def _deliver(self, body: bytes) -> None:
        call, attempt = self._call, self._attempt
        call.first_byte_at = perf_counter()
        attempt.end("answered")
        headers = self._relay.headers(call, attempt)
        headers.append((b"content-length", b"%d" % len(body)))
        self._exchange.begin(200, headers)
        self._exchange.write(body)
        self._accounts.answered(call, attempt, 200, read_usage(body))
        if call.capture:
            self._accounts.keep(call, attempt, 200, body)
        self._leave()

    def _pass_on(self, reader: StreamReader, data: bytes = b"") -> None:
        response, exchange = self._attempt.response, self._exchange
        if read := response.take():
            data = reader.feed(read)
        if data:
            self._note(data)
        if response.complete:
            self._end_stream(reader, data)
        elif response.broken is not None:
            self._break_off(data, response.broken)
        else:
            if data:
                exchange.write(data, more=True)
            if response.full and not exchange.write_paused:
                response.resume()

    def _note(self, data: bytes) -> None:
        self._call.pieces += 1
        if self._call.capture:
            self._accounts.tee(self._call, data)

    def _end_stream(self, reader: StreamReader, data: bytes) -> None:
        call, attempt = self._call, self._attempt
        rest = reader.close()
        attempt.end("failed" if reader.failed else "answered")
        self._exchange.write(data + rest)
        self._accounts.answered(call, attempt, 502 if reader.failed else 200, reader.usage)
        if call.capture:
            self._accounts.tee(call, rest)
        if call.capture:
            self._accounts.keep(call, attempt, 200, b"".join(call.captured))
        self._leave()

    def _break_off(self, data: bytes, error: UpstreamError) -> None:
        self._exchange.write(data + error_event(error))
        self._accounts.broke(self._call, self._attempt, error)
        self._leave()

    def _leave(self) -> None:
        self._under_way.discard(self)
        self._relay.leave(self._call)
