"""The artifact store: bundles of files and documents, each named by the sha256 of what it holds.

    bundles/<digest>/…              an adapter with all that pins it
    bundles/<digest>/manifest.json  written last: without it the bundle does not exist
    documents/<digest>              a dataset or a report

It lives in a directory or behind any fsspec URL.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rollout.errors import InvalidInputError, NotFoundError, UnavailableError

MANIFEST = "manifest.json"
_DIGEST_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Bundle:
    """`files` maps each file's name to its sha256. `digest` names all of them together."""

    digest: str
    files: Mapping[str, str]
    bytes: int


class ArtifactStore:
    """What is published never changes, so publishing the same again does nothing.

    `cache` is where bundles of a remote store are put for engines on this machine to read; a
    store in a directory needs none. Every method raises UnavailableError where the store cannot
    be read or written, a full disk included.
    """

    def __init__(self, url: str, *, cache: Path | None = None) -> None:
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as exc:
            raise InvalidInputError(
                f"the artifact store {url!r} cannot be opened: {exc}", param="artifacts.url"
            ) from exc
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)
        self._cache = cache

    def publish(self, folder: Path) -> Bundle:
        """Store every file directly in `folder`; half of it is never seen under its digest."""
        bundle = describe(folder)
        if not bundle.files:
            raise InvalidInputError(f"there is nothing to publish in {folder}")
        with _explained(self._root):
            if self._has(bundle.digest):
                return bundle
            if self._local:
                self._move_in(folder, bundle)
            else:
                self._upload(folder, bundle)
        return bundle

    def bundle(self, digest: str) -> Bundle:
        """Raises NotFoundError where no such bundle was published whole."""
        _check_digest(digest)
        with _explained(self._root):
            try:
                manifest = json.loads(self._fs.cat_file(self._at("bundles", digest, MANIFEST)))
            except FileNotFoundError as exc:
                raise NotFoundError(f"there is no artifact {digest}") from exc
        return Bundle(digest, manifest["files"], manifest["bytes"])

    def bundles(self) -> list[str]:
        """The digests of all whole bundles, sorted."""
        with _explained(self._root):
            found = self._fs.glob(self._at("bundles", "*", MANIFEST))
        names = (path.rsplit("/", 2)[-2] for path in found)
        return sorted(name for name in names if len(name) == _DIGEST_LENGTH)

    def read(self, digest: str, name: str) -> bytes:
        """One file of a bundle, checked against its hash."""
        expected = self.bundle(digest).files.get(name)
        if expected is None:
            raise NotFoundError(f"the artifact {digest} has no file {name!r}")
        with _explained(self._root):
            content: bytes = self._fs.cat_file(self._at("bundles", digest, name))
        if hashlib.sha256(content).hexdigest() != expected:
            raise UnavailableError(
                f"{name} of the artifact {digest} is not what was published: the store is damaged; "
                "bring the file back from a backup"
            )
        return content

    def local_path(self, digest: str) -> Path:
        """The directory to hand to an engine; fetched into the cache where the store is remote."""
        bundle = self.bundle(digest)
        if self._local:
            return Path(self._at("bundles", digest))
        if self._cache is None:
            raise InvalidInputError(
                "engines read adapters from a directory: give a file:// URL under [artifacts], or a "
                "cache directory",
                param="artifacts.url",
            )
        target = self._cache / digest
        if not (target / MANIFEST).is_file():
            with _explained(str(self._cache)):
                self._fetch(bundle, target)
        return target

    def put_document(self, content: bytes) -> str:
        """Store it; its sha256 is its name."""
        digest = hashlib.sha256(content).hexdigest()
        target = self._at("documents", digest)
        with _explained(self._root):
            if self._fs.exists(target):
                return digest
            if self._local:
                _write_whole(Path(target), content)
            else:
                self._fs.pipe_file(target, content)
        return digest

    def put_file(self, path: Path) -> str:
        """As `put_document`, for a file that may be larger than memory."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        target = self._at("documents", digest)
        with _explained(self._root):
            if self._fs.exists(target):
                return digest
            if self._local:
                _copy_whole(path, Path(target))
            else:
                self._fs.put_file(str(path), target)
        return digest

    def fetch_file(self, digest: str, path: Path) -> None:
        """Put a document into a file, whole or not at all."""
        _check_digest(digest)
        draft = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _explained(self._root):
                try:
                    self._fs.get_file(self._at("documents", digest), str(draft))
                except FileNotFoundError as exc:
                    raise NotFoundError(f"there is no document {digest}") from exc
            with draft.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise UnavailableError(f"the document {digest} is not what was stored")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def forget(self, digest: str) -> None:
        """Remove a document that nothing refers to any more, if it is there."""
        _check_digest(digest)
        with _explained(self._root), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at("documents", digest))

    def document(self, digest: str) -> bytes:
        _check_digest(digest)
        with _explained(self._root):
            try:
                content: bytes = self._fs.cat_file(self._at("documents", digest))
            except FileNotFoundError as exc:
                raise NotFoundError(f"there is no document {digest}") from exc
        if hashlib.sha256(content).hexdigest() != digest:
            raise UnavailableError(
                f"the document {digest} is not what was stored: the store is damaged; bring it back "
                "from a backup"
            )
        return content

    def documents(self) -> list[str]:
        with _explained(self._root):
            found = self._fs.glob(self._at("documents", "*"))
        names = (path.rsplit("/", 1)[-1] for path in found)
        return sorted(name for name in names if len(name) == _DIGEST_LENGTH)

    def _at(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    def _has(self, digest: str) -> bool:
        return bool(self._fs.exists(self._at("bundles", digest, MANIFEST)))

    def _move_in(self, folder: Path, bundle: Bundle) -> None:
        target = Path(self._at("bundles", bundle.digest))
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.parent / f".draft-{uuid.uuid4().hex}"
        try:
            draft.mkdir()
            for name in bundle.files:
                shutil.copyfile(folder / name, draft / name)
                _sync(draft / name)
            if describe(draft) != bundle:
                raise InvalidInputError(
                    f"{folder} was changed while it was read: try again once nobody writes to it"
                )
            _write_whole(draft / MANIFEST, _manifest(bundle))
            try:
                draft.rename(target)
            except OSError:
                # Another process published the same meanwhile, or a rename was cut short.
                if not self._has(bundle.digest):
                    shutil.rmtree(target, ignore_errors=True)
                    draft.rename(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _upload(self, folder: Path, bundle: Bundle) -> None:
        for name in bundle.files:
            self._fs.put_file(str(folder / name), self._at("bundles", bundle.digest, name))
        self._fs.pipe_file(self._at("bundles", bundle.digest, MANIFEST), _manifest(bundle))

    def _fetch(self, bundle: Bundle, target: Path) -> None:
        draft = target.with_name(f".draft-{uuid.uuid4().hex}")
        draft.mkdir(parents=True)
        try:
            for name in bundle.files:
                (draft / name).write_bytes(self.read(bundle.digest, name))
            (draft / MANIFEST).write_bytes(_manifest(bundle))
            with contextlib.suppress(FileExistsError):
                draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def describe(folder: Path) -> Bundle:
    """What `folder` would be published as: the digest covers the files' names and their bytes."""
    files: dict[str, str] = {}
    size = 0
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            size += path.stat().st_size
    listing = "".join(f"{name}\0{digest}\n" for name, digest in files.items())
    return Bundle(hashlib.sha256(listing.encode()).hexdigest(), files, size)


def _manifest(bundle: Bundle) -> bytes:
    content: dict[str, Any] = {
        "digest": bundle.digest,
        "files": dict(bundle.files),
        "bytes": bundle.bytes,
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _check_digest(digest: str) -> None:
    # It becomes part of a path.
    if len(digest) != _DIGEST_LENGTH or not set(digest) <= set("0123456789abcdef"):
        raise NotFoundError(f"{digest!r} is no artifact's digest: those have 64 hex digits")


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content)
        _sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _copy_whole(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        shutil.copyfile(source, draft)
        _sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Translate what file systems raise into an error that says what to do."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UnavailableError(
                f"the disk of the artifact store {where} is full: make room, then try again; nothing "
                "was published"
            ) from exc
        raise UnavailableError(
            f"the artifact store {where} cannot be used: {exc.strerror or exc}"
        ) from exc
