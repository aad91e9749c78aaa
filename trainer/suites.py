"""Where the rows come from that versions are evaluated on: a file, or what a dataset held out."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rollout.errors import InvalidInputError
from rollout.suites import Suite, SuiteRow, make_suite, read_rows, sample_suite
from trainer.dataset import Dataset

__all__ = [
    "Suite",
    "SuiteRow",
    "heldout_suite",
    "infer_choices",
    "make_suite",
    "read_suite",
    "sample_suite",
]

# More different answers than this, or longer ones, are no choice but free text.
_MOST_CHOICES = 50
_LONGEST_CHOICE = 64
_ROWS_FOR_EACH_CHOICE = 3


def read_suite(route: str, path: Path) -> Suite:
    """Read a file of rows. Raises InvalidInputError with the file and the number of a broken line."""
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise InvalidInputError(f"cannot read the suite {path}: {exc}") from exc
    return make_suite(route, read_rows(content, str(path)))


def heldout_suite(route: str, dataset: Dataset, schema: str | None) -> Suite:
    """The dataset's held-out rows as a suite.

    Where few different short answers occur, they are the choices that the engine is held to; a
    route's schema holds it likewise.
    """
    # What is said beside a tool call, mostly nothing, is no class.
    choices = None if schema else infer_choices(row.gold for row in dataset.rows if not row.calls)
    return make_suite(
        route,
        [
            SuiteRow(
                row.case,
                row.messages,
                row.gold,
                None if row.calls else choices,
                None if row.calls else schema,
                tools=row.tools,
                calls=row.calls,
            )
            for row in dataset.split("heldout")
        ],
    )


def infer_choices(golds: Iterable[str]) -> tuple[str, ...] | None:
    """The answers that occur, where they are labels; None where they are texts."""
    counts = Counter(golds)
    few = 2 <= len(counts) <= _MOST_CHOICES
    short = all(len(gold) <= _LONGEST_CHOICE and "\n" not in gold for gold in counts)
    repeated = sum(counts.values()) >= _ROWS_FOR_EACH_CHOICE * len(counts)
    return tuple(sorted(counts)) if few and short and repeated else None
