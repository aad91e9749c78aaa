"""Labelled cases to a dataset: the rules, the split that never changes, the digest."""

from rollout.datasets import (
    Contradiction,
    Dataset,
    Dropped,
    Example,
    PreferenceRow,
    Split,
    Unanswered,
    UnpairedRow,
    Vote,
    from_rows,
    load,
)
from trainer.dataset.compiler import Compiled, compile_dataset, compile_rows, leaks
from trainer.dataset.contradictions import cases_for
from trainer.dataset.splits import NOWHERE, Places, split_of
from trainer.dataset.voices import AS_GIVEN, Manner

__all__ = [
    "AS_GIVEN",
    "NOWHERE",
    "Compiled",
    "Contradiction",
    "Dataset",
    "Dropped",
    "Example",
    "Manner",
    "Places",
    "PreferenceRow",
    "Split",
    "Unanswered",
    "UnpairedRow",
    "Vote",
    "cases_for",
    "compile_dataset",
    "compile_rows",
    "from_rows",
    "leaks",
    "load",
    "split_of",
]
