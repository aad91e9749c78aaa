"""Server-sent events: bytes in, events out, in whatever pieces the bytes arrive."""

from collections.abc import Iterator
from typing import Final

import msgspec

from gateway import shapes
from gateway.shapes import Usage

_ENDS: Final = (b"\n\n", b"\r\n\r\n")
_DONE: Final = b"[DONE]"
# Only where one of these occurs does an event need to be read. Within a string they can't: their
# quotes would be escaped there.
_USAGE: Final = b'"usage":'
_ERROR: Final = b'"error"'
_NULL: Final = (b"null", b" null")
# No mark has it, so none can begin before it and end behind it.
_BEGINNING_END: Final = b"["
# How /v1/responses says that it failed.
_FAILURES: Final = ("error", "response.failed")
# An event that is larger than this passes through in pieces, so that no engine can make us hold
# more of a stream.
_LARGEST_HELD: Final = 2**20


class StreamReader:
    """Passes a stream on in whole events, and finds its usage and how it ended.

    A piece is looked into only where it may hold the usage or an error, and at the end. With
    `strip_usage` the event that only carries usage is taken out, for the client has not asked for
    it. After an error there is no `[DONE]`, whatever the engine says: vLLM sends both.
    """

    __slots__ = ("_alike", "_held", "_strip", "failed", "usage")

    def __init__(self, *, strip_usage: bool = False) -> None:
        self._strip = strip_usage
        self._held = b""
        # How events of this stream begin: in there is no mark.
        self._alike = b""
        self.usage: Usage | None = None
        self.failed = False

    def feed(self, data: bytes) -> bytes:
        """What may be passed on now: whole events, in the engine's own bytes."""
        if self._held:
            data = self._held + data
            self._held = b""
        if not data.endswith(_ENDS):
            data = self._hold(data)
            if not data:
                return b""
        if self.failed:
            return self._look_into(data)
        mark = _first_mark(data, len(self._alike) if data.startswith(self._alike) else 0)
        if mark >= 0:
            # An engine that is quicker than we are sends many events at once.
            begin = _last_end(data, mark)
            data = data[:begin] + self._look_into(data[begin:])
        elif not self._alike:
            self._alike = data[: data.find(_BEGINNING_END) + 1]
        return data

    def close(self) -> bytes:
        """What was held back, once the engine has ended its answer; reads the last events."""
        rest, self._held = self._held, b""
        if rest:
            rest = self._look_into(rest)
        return rest

    def _hold(self, data: bytes) -> bytes:
        cut = _last_end(data, len(data))
        if len(data) - cut > _LARGEST_HELD:
            return data
        self._held = data[cut:]
        return data[:cut]

    def _look_into(self, data: bytes) -> bytes:
        return b"".join(block for block in blocks(data) if self._keeps(event_data(block)))

    def _keeps(self, data: bytes) -> bool:
        """Note what the event says; whether it is passed on."""
        if data == _DONE:
            return not self.failed
        tail = _read(data)
        if tail is None:
            return True
        if tail.error is not None or tail.type in _FAILURES:
            self.failed = True
        usage = tail.usage or (tail.response.usage if tail.response is not None else None)
        if usage is not None:
            self.usage = usage
        return not (self._strip and tail.choices == [] and tail.usage is not None)


def _first_mark(data: bytes, begin: int) -> int:
    """Where something stands from there on for which an event has to be read; less than 0 where
    nothing does."""
    usage = data.find(_USAGE, begin)
    while usage >= 0 and data.startswith(_NULL, usage + len(_USAGE)):
        # Some engines say so in every event but the last.
        usage = data.find(_USAGE, usage + len(_USAGE))
    error = data.find(_ERROR, begin)
    return usage if error < 0 or 0 <= usage < error else error


def _last_end(data: bytes, before: int) -> int:
    """Where the last event that ends in front of `before` ends; 0 where none does."""
    return max(
        found + len(end) if (found := data.rfind(end, 0, before)) >= 0 else 0 for end in _ENDS
    )


def blocks(data: bytes) -> Iterator[bytes]:
    """The events of `data` in their own bytes, each with the blank line that ends it."""
    position = 0
    # Nearly every engine ends its lines with a line feed alone.
    possible = _ENDS if data.find(b"\r") >= 0 else _ENDS[:1]
    while position < len(data):
        ends = [found + len(end) for end in possible if (found := data.find(end, position)) >= 0]
        end = min(ends, default=len(data))
        yield data[position:end]
        position = end


def events(data: bytes) -> Iterator[bytes]:
    """The data of each event of `data` that has any."""
    plain = data.find(b"\r") < 0
    for block in data.split(b"\n\n") if plain else blocks(data):
        if text := event_data(block):
            yield text


def event_data(block: bytes) -> bytes:
    """The data of one event: its `data` lines, joined as the standard says."""
    if block.startswith(b"data: ") and block.find(b"\r") < 0:
        text = block.removesuffix(b"\n\n")
        if text.find(b"\n") < 0:
            return text[6:]
    lines = [
        line[5:].removeprefix(b" ") for line in block.splitlines() if line.startswith(b"data:")
    ]
    return b"\n".join(lines)


def _read(data: bytes) -> shapes.Tail | None:
    if not data or data == _DONE:
        return None
    try:
        return shapes.tail.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return None
