"""A suite: rows with known answers that versions are evaluated on, and never trained on."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rollout.errors import InvalidInputError
from trainer.dataset import Dataset

# More different answers than this, or longer ones, are no choice but free text.
_MOST_CHOICES = 50
_LONGEST_CHOICE = 64
_ROWS_FOR_EACH_CHOICE = 3


@dataclass(frozen=True, slots=True)
class SuiteRow:
    """`choices`, or the text of a JSON `schema`, constrain what the engine may answer."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    gold: str
    choices: tuple[str, ...] | None = None
    schema: str | None = None


@dataclass(frozen=True, slots=True)
class Suite:
    """`name` says where it comes from and which bytes it is: `review-triage:1f0c…`."""

    name: str
    rows: tuple[SuiteRow, ...]


def read_suite(route: str, path: Path) -> Suite:
    """Read `{"id", "messages", "gold", "choices"? , "schema"?}` lines.

    Raises InvalidInputError with the file and the number of a broken line.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidInputError(f"cannot read the suite {path}: {exc}") from exc
    rows: list[SuiteRow] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            rows.append(_read_row(line, f"{path}, line {number}"))
    ids = Counter(row.id for row in rows)
    if repeated := [each for each, count in ids.items() if count > 1]:
        raise InvalidInputError(f"{path}: the id {repeated[0]!r} occurs more than once")
    if not rows:
        raise InvalidInputError(f"{path} holds no rows")
    return make_suite(route, rows)


def heldout_suite(route: str, dataset: Dataset, schema: str | None) -> Suite:
    """The dataset's held-out rows as a suite.

    Where few different short answers occur, they are the choices that the engine is held to; a
    route's schema holds it likewise.
    """
    choices = None if schema else infer_choices(row.gold for row in dataset.rows)
    return make_suite(
        route,
        [
            SuiteRow(row.case, row.messages, row.gold, choices, schema)
            for row in dataset.split("heldout")
        ],
    )


def make_suite(route: str, rows: Iterable[SuiteRow]) -> Suite:
    ordered = tuple(sorted(rows, key=lambda row: row.id))
    text = json.dumps([asdict(row) for row in ordered], sort_keys=True)
    return Suite(f"{route}:{hashlib.sha256(text.encode()).hexdigest()[:20]}", ordered)


def sample_suite(suite: Suite, rows: int) -> Suite:
    """At most so many of its rows, the same ones each time; 0 is all of them."""
    if not rows or rows >= len(suite.rows):
        return suite
    by_chance = sorted(suite.rows, key=lambda row: hashlib.sha256(row.id.encode()).digest())
    return replace(suite, name=f"{suite.name}/{rows}", rows=_in_order(by_chance[:rows]))


def infer_choices(golds: Iterable[str]) -> tuple[str, ...] | None:
    """The answers that occur, where they are labels; None where they are texts."""
    counts = Counter(golds)
    few = 2 <= len(counts) <= _MOST_CHOICES
    short = all(len(gold) <= _LONGEST_CHOICE and "\n" not in gold for gold in counts)
    repeated = sum(counts.values()) >= _ROWS_FOR_EACH_CHOICE * len(counts)
    return tuple(sorted(counts)) if few and short and repeated else None


def _in_order(rows: Sequence[SuiteRow]) -> tuple[SuiteRow, ...]:
    return tuple(sorted(rows, key=lambda row: row.id))


def _read_row(line: str, where: str) -> SuiteRow:
    try:
        values = json.loads(line)
    except ValueError as exc:
        raise InvalidInputError(f"{where}: no valid JSON: {exc}") from exc
    if not isinstance(values, dict):
        raise InvalidInputError(f"{where}: no JSON object")
    messages, gold, choices = values.get("messages"), values.get("gold"), values.get("choices")
    if not isinstance(values.get("id"), str | int):
        raise InvalidInputError(f"{where}: `id` is missing", param="id")
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise InvalidInputError(f"{where}: `messages` is no list of messages", param="messages")
    if not isinstance(gold, str):
        raise InvalidInputError(f"{where}: `gold` is no text", param="gold")
    if choices is not None and (not isinstance(choices, list) or gold not in choices):
        raise InvalidInputError(f"{where}: `choices` is no list that `gold` is in", param="choices")
    schema = values.get("schema")
    return SuiteRow(
        id=str(values["id"]),
        messages=tuple(messages),
        gold=gold,
        choices=None if choices is None else tuple(str(each) for each in choices),
        schema=schema if schema is None or isinstance(schema, str) else json.dumps(schema),
    )
