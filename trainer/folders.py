"""The folder of a run on this machine, and the state of it that trainers leave to each other."""

import asyncio
import contextlib
import fcntl
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TextIO

from rollout.artifacts import ArtifactStore
from rollout.errors import ConflictError, SluiceError
from rollout.runs import TrainingRun

log = logging.getLogger(__name__)

CHECKPOINTS: Final = "checkpoint"
CHECKPOINT_FILE: Final = "checkpoint.pt"
# Beside a checkpoint: the digest of the shared one that it is, or goes on from.
_SHARED: Final = "shared"
# A step, and then the checkpoint.
_LOCK_SECONDS: Final = 120.0


class RunFolders:
    """Those of all runs, below `root`. Shared states are documents of the artifact store."""

    def __init__(self, root: Path, artifacts: ArtifactStore) -> None:
        self._root = root
        self._artifacts = artifacts

    def of(self, run: TrainingRun) -> Path:
        return self._root / run.id

    async def share(self, run: TrainingRun) -> Mapping[str, str]:
        """Leave the run's state where other trainers find it; what of the run that changes.

        It is there to save time: without it a trainer on another machine begins anew.
        """
        file = self._checkpoint(run)
        if not file.is_file():
            return {}
        try:
            digest = await asyncio.to_thread(self._artifacts.put_file, file)
            file.with_name(_SHARED).write_text(digest, encoding="utf-8")
            if run.checkpoint not in (None, digest):
                await asyncio.to_thread(self._artifacts.forget, run.checkpoint)
        except (SluiceError, OSError) as exc:
            log.warning("run %s: its state stays on this machine: %s", run.id, exc)
            return {}
        return {"checkpoint": digest}

    def fetch(self, run: TrainingRun) -> None:
        """Take up the state that another trainer left, unless what is here goes on from it."""
        if run.checkpoint is None:
            return
        file = self._checkpoint(run)
        shared = file.with_name(_SHARED)
        if file.is_file() and shared.is_file() and shared.read_text("utf-8") == run.checkpoint:
            return
        try:
            self._artifacts.fetch_file(run.checkpoint, file)
            shared.write_text(run.checkpoint, encoding="utf-8")
        except SluiceError as exc:
            log.warning("run %s begins anew: %s", run.id, exc.message)

    def clear(self, run: TrainingRun) -> None:
        """Remove what an ended run left; of one that failed its log is kept."""
        folder = self.of(run)
        if run.checkpoint is not None:
            with contextlib.suppress(SluiceError):
                self._artifacts.forget(run.checkpoint)
        if run.state != "failed":
            shutil.rmtree(folder, ignore_errors=True)
            return
        for each in folder.iterdir() if folder.is_dir() else ():
            if each.is_dir():
                shutil.rmtree(each, ignore_errors=True)
            elif each.suffix != ".log":
                each.unlink(missing_ok=True)

    def _checkpoint(self, run: TrainingRun) -> Path:
        return self.of(run) / CHECKPOINTS / CHECKPOINT_FILE


def hold(folder: Path) -> TextIO:
    """Wait until no other job works in the folder: one whose trainer was killed may still be saving
    its state. Raises ConflictError where that takes too long."""
    lock = (folder / "lock").open("w", encoding="utf-8")
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise ConflictError(
                    f"another training process still works in {folder}: end it, then start the run "
                    "again"
                ) from None
            time.sleep(0.2)
        else:
            return lock
