"""The files that commands read and write: `-` is standard input, and what is written is whole."""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from rollout.errors import InvalidInputError


def read(path: Path) -> bytes:
    """All of the file, or of standard input."""
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as exc:
        raise InvalidInputError(f"cannot read {path}: {exc.strerror}") from exc


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as exc:
        raise InvalidInputError(f"cannot read {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise InvalidInputError(f"cannot read {path}: it is no UTF-8 at byte {exc.start}") from exc


def write(pieces: Iterable[bytes], target: Path | None) -> int:
    """Write to the file, or to standard output; returns how many lines it were.

    The file is there once all of it is on the disk: what was there before stays until then.
    """
    if target is None:
        return _write(pieces, sys.stdout.buffer)
    draft = target.with_name(f".{target.name}.part")
    try:
        with draft.open("wb") as file:
            lines = _write(pieces, file)
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as exc:
        raise InvalidInputError(f"cannot write {target}: {exc.strerror}") from exc
    finally:
        with suppress(OSError):
            draft.unlink()
    return lines


def _write(pieces: Iterable[bytes], file: BinaryIO) -> int:
    lines = 0
    for piece in pieces:
        lines += piece.count(b"\n")
        file.write(piece)
    file.flush()
    return lines
