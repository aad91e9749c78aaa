"""How values are written into the store and read back: JSON, checked against their types."""

from datetime import datetime
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def encode(value: object) -> bytes:
    """JSON for a dataclass of ours, or a list of them. `decode` with its type reads it back."""
    return encode_as(type(value), value)


def encode_as(kind: Any, value: object) -> bytes:
    """The same for values whose type cannot be seen from them: unions and generics."""
    return _adapter(kind).dump_json(value)


def decode(kind: type[T], text: bytes | str) -> T:
    """Read a value back; raises pydantic's ValidationError where it does not fit its type."""
    value: T = _adapter(kind).validate_json(text)  # type: ignore[arg-type]
    return value


def milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)
