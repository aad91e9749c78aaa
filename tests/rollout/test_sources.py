"""Adapters behind URLs: fetched whole, within their limits, or refused with what to do."""

import threading
import uuid
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from rollout.adapters import CONFIG_FILE, WEIGHTS_FILE
from rollout.errors import InvalidInputError, SluiceError, UnavailableError
from rollout.sources import FetchLimits, fetch_adapter

FILES = {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"\0\1\2\3" * 1000}
LIMITS = FetchLimits(bytes=10_000, seconds=30.0)


class Shelf(BaseHTTPRequestHandler):
    """Serves FILES below `/adapter`, and misbehaves below other paths."""

    def do_GET(self) -> None:
        where, _, name = self.path.partition("?")[0].rpartition("/")
        body = FILES[name]
        if where == "/moved":
            self.send_response(302)
            self.send_header("location", f"/adapter/{name}")
            self.send_header("content-length", "0")
            self.end_headers()
            return
        if where == "/circle":
            self.send_response(302)
            self.send_header("location", self.path)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        status = {"/adapter": 200, "/lies": 200, "/private": 403, "/ill": 500}.get(where, 404)
        self.send_response(status)
        if where != "/lies":
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Shelf) as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def fetched(url: str, folder: Path, limits: FetchLimits = LIMITS) -> dict[str, bytes]:
    fetch_adapter(url, folder, limits)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("path", ["/adapter", "/adapter/", "/moved", "/adapter?token=x", "/lies"])
def test_it_is_fetched_over_http(shelf: str, path: str, tmp_path: Path) -> None:
    assert fetched(f"{shelf}{path}", tmp_path) == FILES


def test_it_is_fetched_through_any_file_system(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    for name, content in FILES.items():
        with fsspec.open(f"{url}/{name}", "wb") as file:
            file.write(content)
    assert fetched(url, tmp_path) == FILES
    with pytest.raises(InvalidInputError, match="larger than an adapter may be"):
        fetched(url, tmp_path, FetchLimits(bytes=100))


@pytest.mark.parametrize(
    ("path", "kind", "says"),
    [
        ("/nowhere", InvalidInputError, f"there is no {CONFIG_FILE}"),
        ("/private", InvalidInputError, "does not give"),
        ("/circle", InvalidInputError, "in a circle"),
        ("/ill", UnavailableError, "answers 500"),
    ],
)
def test_what_is_not_given_is_said(
    shelf: str, path: str, kind: type[SluiceError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=says):
        fetched(f"{shelf}{path}", tmp_path)


@pytest.mark.parametrize("path", ["/adapter", "/lies"])
def test_too_much_is_refused_whatever_its_length_is_said_to_be(
    shelf: str, path: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match="maximum_adapter_bytes"):
        fetched(f"{shelf}{path}", tmp_path, FetchLimits(bytes=3999))


def test_what_takes_too_long_is_given_up(shelf: str, tmp_path: Path) -> None:
    clock = iter([0.0, 31.0])
    with pytest.raises(UnavailableError, match="within 30 s"):
        fetch_adapter(f"{shelf}/adapter", tmp_path, LIMITS, monotonic=lambda: next(clock))


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("http://127.0.0.1:1/adapter", UnavailableError),
        ("https:///adapter", InvalidInputError),
        ("nosuchthing://bucket/adapter", InvalidInputError),
        ("zip://x::https://127.0.0.1:1/a.zip", InvalidInputError),
        (f"memory://{uuid.uuid4().hex}", InvalidInputError),
    ],
)
def test_a_url_that_leads_nowhere_is_said(
    url: str, kind: type[SluiceError], tmp_path: Path
) -> None:
    with pytest.raises(kind) as refused:
        fetched(url, tmp_path)
    assert kind is UnavailableError or refused.value.param == "adapter_url"
