"""What an answer is worth beside the right one: the scorers that need nothing but the two texts."""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rapidfuzz.distance import Indel

from rollout.agreement.fields import NoJson, Rules, parse
from rollout.agreement.schemas import valid
from rollout.agreement.tools import calls, tools_score
from rollout.cases import normalise, same_text
from rollout.exchanges import Answer
from rollout.suites import Scorer, ScorerKind, SuiteRow

_RULES: Final = Rules(tolerance=1e-6)


@dataclass(frozen=True, slots=True)
class Mark:
    """In [0, 1]; with an `error` it is 0 because nobody could mark the answer."""

    value: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """What a version answered: a text, and tool calls as the engine wrote them."""

    text: str
    calls: tuple[Mapping[str, Any], ...] = ()


def mark(scorer: Scorer, row: SuiteRow, given: Given) -> Mark:
    """Raises KeyError for a scorer that takes a process or an engine."""
    return Mark(_MARKERS[scorer.kind](scorer, row, given))


def names(scorers: tuple[Scorer, ...]) -> tuple[str, ...]:
    """A name for each: its kind, with a number where a kind comes again."""
    seen: Counter[str] = Counter()
    found: list[str] = []
    for scorer in scorers:
        seen[scorer.kind] += 1
        count = seen[scorer.kind]
        found.append(scorer.kind if count == 1 else f"{scorer.kind}-{count}")
    return tuple(found)


def grade(row: SuiteRow, answer: str) -> bool:
    """By the row's kind: JSON that satisfies the schema and equals the gold, or the same text."""
    if row.schema is not None:
        return valid(answer, "json", row.schema) and _same_json(answer, row.gold)
    return same_text(answer, row.gold)


def _auto(_scorer: Scorer, row: SuiteRow, given: Given) -> float:
    return _tool_call(_scorer, row, given) if row.calls else float(grade(row, given.text))


def _exact(_scorer: Scorer, row: SuiteRow, given: Given) -> float:
    return float(given.text == row.gold)


def _normalised(_scorer: Scorer, row: SuiteRow, given: Given) -> float:
    return float(_words(given.text) == _words(row.gold))


def _words(text: str) -> str:
    """Letters and digits alone: case, punctuation and white space make no two texts different."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = (each if unicodedata.category(each)[0] in "LNMS" else " " for each in folded)
    return " ".join("".join(kept).split())


def _json_valid(scorer: Scorer, row: SuiteRow, given: Given) -> float:
    return float(valid(given.text, "json", scorer.schema or row.schema))


def _similarity(_scorer: Scorer, row: SuiteRow, given: Given) -> float:
    return Indel.normalized_similarity(normalise(given.text), normalise(row.gold))


def _tool_call(_scorer: Scorer, row: SuiteRow, given: Given) -> float:
    wanted = calls(Answer(0, 200, tool_calls=row.calls))
    found = calls(Answer(0, 200, tool_calls=given.calls))
    if not wanted or not found:
        return float(not wanted and not found)
    return tools_score(wanted, found, _RULES)


def _field_precision(_scorer: Scorer, row: SuiteRow, given: Given) -> float:
    return _fields(row, given)[0]


def _field_recall(_scorer: Scorer, row: SuiteRow, given: Given) -> float:
    return _fields(row, given)[1]


def _field_f1(_scorer: Scorer, row: SuiteRow, given: Given) -> float:
    precision, recall = _fields(row, given)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _fields(row: SuiteRow, given: Given) -> tuple[float, float]:
    """Precision and recall of the leaves; those of a list count without their place in it."""
    wanted, found = parse(row.gold), parse(given.text)
    if isinstance(found, NoJson) or isinstance(wanted, NoJson):
        return 0.0, 0.0
    mine, theirs = Counter(_leaves(found)), Counter(_leaves(wanted))
    shared = (mine & theirs).total()
    precision = shared / mine.total() if mine else float(not theirs)
    recall = shared / theirs.total() if theirs else float(not mine)
    return precision, recall


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, f"{path}/{key}")
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each, f"{path}/*")
    elif value is not None:
        # A field that is null is one that is not there; so is one with nothing in it.
        yield path, json.dumps(_plain(value), sort_keys=True)


def _same_json(answer: str, gold: str) -> bool:
    given, wanted = parse(answer), parse(gold)
    if isinstance(given, NoJson) or isinstance(wanted, NoJson):
        return False
    return bool(_plain(given) == _plain(wanted))


def _plain(value: Any) -> Any:
    """Numbers that are equal are the same, and texts that differ only in case or spaces."""
    match value:
        case dict():
            return {key: _plain(each) for key, each in value.items()}
        case list():
            return [_plain(each) for each in value]
        case str():
            return normalise(value)
        case bool() | None:
            return (type(value).__name__, value)
        case int() | float():
            return float(value) if abs(value) < 2**53 else value
        case _:
            return value


_MARKERS: Final[Mapping[ScorerKind, Callable[[Scorer, SuiteRow, Given], float]]] = {
    "auto": _auto,
    "exact": _exact,
    "normalised": _normalised,
    "json_valid": _json_valid,
    "field_f1": _field_f1,
    "field_precision": _field_precision,
    "field_recall": _field_recall,
    "tool_call": _tool_call,
    "similarity": _similarity,
}
