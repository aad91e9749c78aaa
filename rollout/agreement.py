"""How far two answers to one request agree, and which step of the cascade settled it.

The cheap and certain steps come first: did one fail, are they the same, does only one keep the
schema; then tool calls, JSON by field, text. `agreement` is symmetric in the two answers; only
`outcome` knows which of them is the candidate's.
"""

import functools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from jsonschema import SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing.exceptions import Unresolvable
from referencing.jsonschema import EMPTY_REGISTRY

from rollout.cases import normalise, same_text
from rollout.exchanges import Answer, Comparison, Exchange, Outcome
from rollout.routes import Comparator, Route
from rollout.state import Trial

Kind = Literal["exact", "normalised", "json", "tools", "text", "failure", "schema"]

# Two texts may share every word and pair of words and still differ; only equal ones reach 1.
MOST_FOR_DIFFERENT_TEXTS = 0.99
# What printing a number and reading it back may change, and no more.
_RELATIVE_TOLERANCE = 1e-6
_ABSOLUTE_TOLERANCE = 1e-9
# Deeper than any real answer; a spoiled version that prints brackets for ever gets far beyond it.
_DEEPEST_JSON = 64
_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Agreement:
    """`score` lies in [0, 1]. `outcome` is the candidate's where no person is needed to tell."""

    score: float
    kind: Kind
    outcome: Outcome | None = None


def compare(
    stable: Answer,
    candidate: Answer,
    comparator: Comparator = "text",
    schema: str | None = None,
) -> Agreement:
    """Compare two answers to the same request.

    `schema` is the text of a JSON schema, or None. It is not asked of answers that call tools, and
    a text that is no JSON is checked as a string, unless the comparator is "json".
    """
    if not (stable.ok and candidate.ok):
        return Agreement(0.0, "failure", _only_one(stable.ok, candidate.ok) or "tie")
    if stable.text == candidate.text and _calls(stable) == _calls(candidate):
        return Agreement(1.0, "exact")
    if stable.tool_calls or candidate.tool_calls:
        return Agreement(_tools_score(_calls(stable), _calls(candidate)), "tools")
    if decided := _only_one(
        _valid(stable.text, comparator, schema), _valid(candidate.text, comparator, schema)
    ):
        return Agreement(0.0, "schema", decided)
    if same_text(stable.text, candidate.text):
        return Agreement(1.0, "normalised")
    if comparator == "json":
        one, other = _parse(stable.text), _parse(candidate.text)
        if not (isinstance(one, _NoJson) or isinstance(other, _NoJson)):
            return Agreement(_json_score(one, other), "json")
    return Agreement(_text_score(stable.text, candidate.text), "text")


def compare_exchange(exchange: Exchange, other: Answer, trial: Trial, route: Route) -> Comparison:
    """The pair of what a client was answered and what the other version answers.

    Whichever of the two answers is by the trial's candidate is the candidate's.
    """
    mine = exchange.answer
    stable, tried = (other, mine) if mine.version == trial.candidate else (mine, other)
    found = compare(stable, tried, route.comparator, route.schema)
    return Comparison(
        request_id=exchange.request_id,
        route=exchange.route,
        trial=trial.id,
        stable=stable,
        candidate=tried,
        agreement=found.score,
        kind=found.kind,
        outcome=found.outcome,
    )


def _only_one(stable: bool, candidate: bool) -> Outcome | None:
    """The candidate's outcome where one side alone is in order."""
    if stable == candidate:
        return None
    return "win" if candidate else "loss"


# Schemas


def _valid(text: str, comparator: Comparator, schema: str | None) -> bool:
    value = _parse(text)
    if isinstance(value, _NoJson):
        if comparator == "json":
            return False
        value = text
    if schema is None:
        return True
    validator = _validator(schema)
    try:
        return validator is None or validator.is_valid(value)
    except Unresolvable:
        return True


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Validator | None:
    """None for a schema that is none itself: nobody's answer is at fault for that.

    With a registry given, a `$ref` to somewhere else is never fetched.
    """
    try:
        document = json.loads(schema)
        kind = validator_for(document)
        kind.check_schema(document)
    except (ValueError, SchemaError):
        return None
    return kind(document, registry=EMPTY_REGISTRY)


# Tool calls: (name, parsed arguments) of each


def _calls(answer: Answer) -> list[tuple[str, Any]]:
    return [_call(call) for call in answer.tool_calls]


def _call(call: Mapping[str, Any]) -> tuple[str, Any]:
    function = call.get("function")
    named: Mapping[str, Any] = function if isinstance(function, Mapping) else call
    arguments = named.get("arguments") or "{}"
    if isinstance(arguments, str):
        parsed = _parse(arguments)
        arguments = arguments if isinstance(parsed, _NoJson) else parsed
    return str(named.get("name", "")), arguments


def _tools_score(one: list[tuple[str, Any]], other: list[tuple[str, Any]]) -> float:
    """Half of a call is its name, half its arguments. Parallel calls have no order."""
    mine, theirs = _by_key(one), _by_key(other)
    shared = mine & theirs
    score = float(shared.total())
    rest, their_rest = _by_name(mine - shared), _by_name(theirs - shared)
    for name in rest.keys() & their_rest.keys():
        for arguments, their_arguments in zip(rest[name], their_rest[name], strict=False):
            score += 0.5 + 0.5 * _json_score(json.loads(arguments), json.loads(their_arguments))
    return score / max(len(one), len(other))


def _by_key(calls: list[tuple[str, Any]]) -> Counter[tuple[str, str]]:
    return Counter((name, json.dumps(arguments, sort_keys=True)) for name, arguments in calls)


def _by_name(calls: Counter[tuple[str, str]]) -> dict[str, list[str]]:
    named: dict[str, list[str]] = defaultdict(list)
    for name, arguments in sorted(calls.elements()):
        named[name].append(arguments)
    return named


# JSON


@dataclass(frozen=True, slots=True)
class _NoJson:
    """A text that does not parse; None would be JSON's null."""


def _parse(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NoJson()
    return _NoJson() if _deeper_than(value, _DEEPEST_JSON) else value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [child for item in level for child in _children(item)]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _json_score(one: Any, other: Any) -> float:
    """The share of leaves that match, of all that either side has."""
    matching, total = _leaves(one, other)
    return matching / total


def _leaves(one: Any, other: Any) -> tuple[int, int]:
    """How many leaves match, and how many there are; an empty object or list is one leaf."""
    if isinstance(one, dict) and isinstance(other, dict) and (one or other):
        pairs = [
            (one.get(key, _NoJson()), other.get(key, _NoJson()))
            for key in one.keys() | other.keys()
        ]
    elif isinstance(one, list) and isinstance(other, list) and (one or other):
        longer = max(len(one), len(other))
        pairs = [(_at(one, index), _at(other, index)) for index in range(longer)]
    else:
        same = _same_leaf(one, other)
        return int(same), 1 if same else max(_count(one), _count(other))
    counted = [_leaves(*pair) for pair in pairs]
    return sum(matching for matching, _ in counted), sum(total for _, total in counted)


def _at(items: list[Any], index: int) -> Any:
    return items[index] if index < len(items) else _NoJson()


def _count(value: Any) -> int:
    return sum(map(_count, _children(value))) or 1


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, str) and isinstance(other, str):
        return same_text(one, other)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other or _close(one, other)
    # Only empty containers, null and "nothing there" are left.
    return type(one) is type(other) and not isinstance(one, _NoJson) and one == other


def _close(one: float, other: float) -> bool:
    try:
        return math.isclose(one, other, rel_tol=_RELATIVE_TOLERANCE, abs_tol=_ABSOLUTE_TOLERANCE)
    except OverflowError:
        return False


# Text


def _text_score(one: str, other: str) -> float:
    """Dice's coefficient over words and neighbouring words, so that order counts."""
    mine, theirs = _features(one), _features(other)
    shared = (mine & theirs).total()
    total = mine.total() + theirs.total()
    return min(MOST_FOR_DIFFERENT_TEXTS, 2 * shared / total) if total else 0.0


def _features(text: str) -> Counter[tuple[str, ...]]:
    tokens = _TOKEN.findall(normalise(text))
    neighbours = pairwise(tokens)
    return Counter([*((token,) for token in tokens), *neighbours])
