"""A training run's state on disk, whole or not at all, so that a killed run goes on where it was."""

import contextlib
import errno
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollout.errors import UnavailableError
from trainer.folders import CHECKPOINT_FILE


@dataclass(frozen=True, slots=True)
class Best:
    """The lowest validation loss yet, after `step`, with the weights that gave it where they are to
    be kept; `last` is the newest, and `worse` how many there were since the lowest."""

    loss: float = math.inf
    last: float | None = None
    step: int = 0
    worse: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`step` optimizer steps are done. `job` names what is trained; another job's is not taken."""

    job: str
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    tokens: int
    best: Best = Best()


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write it beside the last one, then put it in its place. Raises UnavailableError."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{CHECKPOINT_FILE}.{os.getpid()}"
    state = {
        "job": checkpoint.job,
        "step": checkpoint.step,
        "weights": checkpoint.weights,
        "optimizer": checkpoint.optimizer,
        "tokens": checkpoint.tokens,
        "best": {name: getattr(checkpoint.best, name) for name in Best.__slots__},
    }
    try:
        with draft.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(folder / CHECKPOINT_FILE)
    except (OSError, RuntimeError) as exc:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        full = isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)
        free = shutil.disk_usage(folder).free // 1_000_000
        raise UnavailableError(
            f"cannot write the checkpoint to {folder} ({free} MB free): "
            + ("make room, then start the run again" if full or free < 100 else str(exc))
        ) from exc


def load(folder: Path, job: str) -> Checkpoint | None:
    """The last checkpoint of that job, or None where there is none that can be read."""
    try:
        state = torch.load(folder / CHECKPOINT_FILE, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, ValueError):
        return None
    if state.get("job") != job:
        return None
    return Checkpoint(**{**state, "best": Best(**state.get("best", {}))})
