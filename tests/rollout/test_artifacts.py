"""The artifact store, in a directory and behind another fsspec file system."""

import errno
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest

from rollout.artifacts import MANIFEST, ArtifactStore, describe
from rollout.errors import InvalidInputError, NotFoundError, UnavailableError


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "directory":
        return ArtifactStore((tmp_path / "artifacts").as_uri())
    return ArtifactStore(f"memory://{uuid.uuid4().hex}", cache=tmp_path / "cache")


@pytest.fixture
def local(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore((tmp_path / "artifacts").as_uri())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "weights").write_bytes(b"\0\1\2" * 1000)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_bundle_is_found_under_the_digest_of_its_files(
    store: ArtifactStore, folder: Path
) -> None:
    bundle = store.publish(folder)
    assert store.bundles() == [bundle.digest]
    assert store.bundle(bundle.digest) == bundle == describe(folder)
    assert store.read(bundle.digest, "config.json") == b"{}"


def test_an_engine_reads_it_from_a_directory(store: ArtifactStore, folder: Path) -> None:
    bundle = store.publish(folder)
    for _ in range(2):
        path = store.local_path(bundle.digest)
        assert (path / "weights").read_bytes() == b"\0\1\2" * 1000
        assert (path / MANIFEST).is_file()


def test_publishing_the_same_again_changes_nothing(store: ArtifactStore, folder: Path) -> None:
    assert store.publish(folder) == store.publish(folder)
    assert len(store.bundles()) == 1


def test_other_names_or_other_bytes_have_another_digest(folder: Path) -> None:
    first = describe(folder)
    (folder / "weights").rename(folder / "other")
    second = describe(folder)
    (folder / "other").write_bytes(b"")
    assert len({first.digest, second.digest, describe(folder).digest}) == 3


def test_what_changes_while_it_is_published_is_not_published(
    local: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_late(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes() + b"!")

    monkeypatch.setattr(shutil, "copyfile", copy_late)
    with pytest.raises(InvalidInputError, match="changed while it was read"):
        local.publish(folder)
    assert local.bundles() == []


def test_a_bundle_without_its_manifest_does_not_exist(
    local: ArtifactStore, folder: Path, tmp_path: Path
) -> None:
    bundle = local.publish(folder)
    (tmp_path / "artifacts" / "bundles" / bundle.digest / MANIFEST).unlink()
    assert local.bundles() == []
    with pytest.raises(NotFoundError):
        local.bundle(bundle.digest)
    assert local.publish(folder) == bundle
    assert local.bundles() == [bundle.digest]


def test_damage_is_noticed(local: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    bundle = local.publish(folder)
    (tmp_path / "artifacts" / "bundles" / bundle.digest / "weights").write_bytes(b"other")
    with pytest.raises(UnavailableError, match="damaged"):
        local.read(bundle.digest, "weights")


def test_a_document_is_named_by_its_bytes(store: ArtifactStore) -> None:
    digest = store.put_document(b"a line\n")
    assert store.put_document(b"a line\n") == digest
    assert store.document(digest) == b"a line\n"
    assert store.documents() == [digest]


@pytest.mark.parametrize("digest", ["0" * 64, "../../etc/passwd", ""])
def test_what_is_not_there_is_said_to_be_missing(store: ArtifactStore, digest: str) -> None:
    for ask in (store.bundle, store.document, store.local_path):
        with pytest.raises(NotFoundError):
            ask(digest)


def test_a_full_disk_is_explained_and_leaves_nothing(
    local: ArtifactStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnavailableError, match="full: make room"):
        local.publish(folder)
    with pytest.raises(UnavailableError, match="full: make room"):
        local.put_document(b"a line\n")
    monkeypatch.undo()
    assert local.bundles() == local.documents() == []
    assert [each for each in (tmp_path / "artifacts").rglob("*") if each.is_file()] == []


def test_an_empty_folder_is_not_published(local: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="nothing to publish"):
        local.publish(tmp_path / "empty")


def test_an_unknown_kind_of_store_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="cannot be opened"):
        ArtifactStore("nosuchthing://bucket/path")


def test_a_file_is_kept_fetched_elsewhere_and_forgotten(
    store: ArtifactStore, folder: Path, tmp_path: Path
) -> None:
    digest = store.put_file(folder / "weights")
    assert store.put_file(folder / "weights") == digest
    assert store.document(digest) == (folder / "weights").read_bytes()
    there = tmp_path / "another" / "machine" / "weights"
    store.fetch_file(digest, there)
    assert there.read_bytes() == (folder / "weights").read_bytes()
    store.forget(digest)
    store.forget(digest)
    with pytest.raises(NotFoundError):
        store.fetch_file(digest, there)
    assert [path.name for path in there.parent.iterdir()] == ["weights"], "no half of it is left"


def test_a_damaged_file_is_not_fetched(local: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    digest = local.put_file(folder / "weights")
    (tmp_path / "artifacts" / "documents" / digest).write_bytes(b"something else")
    with pytest.raises(UnavailableError):
        local.fetch_file(digest, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
