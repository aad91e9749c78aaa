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

__all__ = [
    "NOWHERE",
    "Compiled",
    "Contradiction",
    "Dataset",
    "Dropped",
    "Example",
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
