"""What the base makes of the answers, worked out once and kept: the reference of the preferences."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.methods.likelihood import of_answers
from trainer.methods.step import Packer
from trainer.packing import Item, plan_epoch


def with_reference(
    model: Any,
    items: Sequence[Item],
    pack: Packer,
    *,
    row_tokens: int,
    cache: Path | None = None,
    pins: str = "",
) -> list[Item]:
    """The items, each with the log-probabilities of its answers under the base.

    The adapter is switched off for it; a model without one must not be trained yet. `cache` is the
    file to keep them in; it is taken where its digest says that it is of the same items and `pins`
    (which name the base, its precision and the rest of what decides).
    """
    digest = _digest(items, pins)
    if cache is not None and (known := _read(cache, digest)) is not None:
        found = known
    else:
        found = _work_out(model, items, pack, row_tokens)
        if cache is not None:
            _write(cache, digest, found)
    return [replace(item, reference=tuple(each)) for item, each in zip(items, found, strict=True)]


@torch.no_grad()
def _work_out(
    model: Any, items: Sequence[Item], pack: Packer, row_tokens: int
) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in items]
    plan = plan_epoch(
        [len(item) for item in items],
        row_tokens=row_tokens,
        batch_tokens=row_tokens,
        seed=0,
        epoch=0,
    )
    was_training = model.training
    model.eval()
    with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
        for places in (row for step in plan for row in step):
            of_row = of_answers(model, pack([items[place] for place in places])).tolist()
            for place in places:
                count = len(items[place].examples)
                found[place], of_row = of_row[:count], of_row[count:]
    model.train(was_training)
    return found


def _digest(items: Sequence[Item], pins: str) -> str:
    total = hashlib.sha256(pins.encode())
    for item in items:
        for each in item.examples:
            total.update(json.dumps([each.ids, each.answer_start, each.weights]).encode())
    return total.hexdigest()


def _read(path: Path, digest: str) -> list[list[float]] | None:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return held["log_probabilities"] if held["digest"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, digest: str, found: list[list[float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    # Python writes floats such that they are read back as they were.
    draft.write_text(json.dumps({"digest": digest, "log_probabilities": found}), encoding="utf-8")
    draft.replace(path)
