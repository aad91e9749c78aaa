"""An adapter fetched from a URL into a directory, within limits of size and time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

import fsspec
import httpx2

from rollout.adapters import CONFIG_FILE, WEIGHTS_FILE
from rollout.errors import InvalidInputError, UnavailableError

_PIECE_BYTES = 1 << 20
_CONFIG_BYTES = 1 << 20
_CONNECT_SECONDS = 10.0
# Between two pieces.
_SILENCE_SECONDS = 30.0
_REDIRECTS = 5


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """For all files of one adapter together."""

    bytes: int = 2 << 30
    seconds: float = 300.0


def fetch_adapter(
    url: str,
    folder: Path,
    limits: FetchLimits,
    *,
    monotonic: Callable[[], float] = time.monotonic,
) -> None:
    """Put the two files of the adapter at `url` into `folder`; blocks, `limits.seconds` at most.

    `url` is that of the directory that holds them: https, or whatever fsspec opens. Raises
    InvalidInputError where it is none or holds too much, UnavailableError where it does not
    deliver.
    """
    _check(url)
    budget = _Budget(url, limits, monotonic)
    scheme = urlsplit(url).scheme
    read = _over_http if scheme in ("http", "https") else _by_fsspec
    with _explained(url):
        # The small one first: what has none is no adapter.
        for name, most in ((CONFIG_FILE, _CONFIG_BYTES), (WEIGHTS_FILE, limits.bytes)):
            with (folder / name).open("wb") as file:
                read(url, name, file, budget.starting(name, most))


def _check(url: str) -> None:
    parts = urlsplit(url)
    if "::" in url or not parts.scheme:
        raise _wrong(f"{url!r} is no plain URL: give that of a directory with {CONFIG_FILE} in it")
    if parts.scheme in ("http", "https") and not parts.hostname:
        raise _wrong(f"{url!r} names no host")


class _Budget:
    """Counts what arrives, and ends the fetch where that is too much or takes too long."""

    def __init__(self, url: str, limits: FetchLimits, monotonic: Callable[[], float]) -> None:
        self._url = url
        self._limits = limits
        self._monotonic = monotonic
        self._until = monotonic() + limits.seconds
        self._left = 0
        self._name = ""

    def starting(self, name: str, most: int) -> "_Budget":
        self._name, self._left = name, most
        return self

    def announced(self, size: int | None) -> None:
        """Refuse at once what says that it is too large."""
        if size is not None and size > self._left:
            raise self._too_large()

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise self._too_large()
        if self._monotonic() > self._until:
            raise UnavailableError(
                f"{self._url} did not deliver {self._name} within {self._limits.seconds:g} s: try again, "
                "or raise fetch_seconds under [artifacts]",
            )

    def _too_large(self) -> InvalidInputError:
        return _wrong(
            f"{self._name} at {self._url} is larger than an adapter may be: raise "
            "maximum_adapter_bytes under [artifacts] if that is meant"
        )


def _over_http(url: str, name: str, file: BinaryIO, budget: _Budget) -> None:
    parts = urlsplit(url)
    address = urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
    timeout = httpx2.Timeout(_SILENCE_SECONDS, connect=_CONNECT_SECONDS)
    with (
        httpx2.Client(timeout=timeout, follow_redirects=True, max_redirects=_REDIRECTS) as client,
        client.stream("GET", address) as answer,
    ):
        if parts.scheme == "https" and answer.url.scheme != "https":
            raise _wrong(f"{url} leads to {answer.url.scheme}://, where anybody could change it")
        if answer.status_code in (404, 410):
            raise _wrong(f"there is no {name} at {url}")
        if answer.status_code in (401, 403):
            raise _wrong(f"{url} does not give {name} to this controller ({answer.status_code})")
        if answer.status_code != 200:
            raise UnavailableError(f"{url} answers {answer.status_code} to {name}: try again later")
        length = answer.headers.get("content-length", "")
        budget.announced(int(length) if length.isdecimal() else None)
        for piece in answer.iter_bytes(_PIECE_BYTES):
            budget.take(len(piece))
            file.write(piece)


def _by_fsspec(url: str, name: str, file: BinaryIO, budget: _Budget) -> None:
    source: Any
    fs, root = fsspec.core.url_to_fs(url)
    path = f"{root.rstrip('/')}/{name}"
    try:
        budget.announced(fs.info(path).get("size"))
        with fs.open(path, "rb") as source:
            while piece := source.read(_PIECE_BYTES):
                budget.take(len(piece))
                file.write(piece)
    except FileNotFoundError as exc:
        raise _wrong(f"there is no {name} at {url}") from exc


@contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except httpx2.TooManyRedirects as exc:
        raise _wrong(f"{url} leads in a circle") from exc
    except httpx2.InvalidURL as exc:
        raise _wrong(f"{url!r} is no URL: {exc}") from exc
    except httpx2.HTTPError as exc:
        raise UnavailableError(f"{url} cannot be read: {exc}") from exc
    except (ImportError, ValueError) as exc:
        # fsspec names the package that is missing, or the kinds that it knows.
        raise _wrong(f"{url} cannot be opened: {exc}") from exc
    except OSError as exc:
        raise UnavailableError(f"{url} cannot be read: {exc.strerror or exc}") from exc


def _wrong(message: str) -> InvalidInputError:
    return InvalidInputError(message, param="adapter_url")
