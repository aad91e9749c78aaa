"""JSON compared leaf by leaf: numbers with a tolerance, lists in order unless a rule says otherwise."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rollout.cases import same_text
from rollout.routes import JsonRules

# What printing a number and reading it back may change near zero, and no more.
_ABSOLUTE_TOLERANCE: Final = 1e-9
# Deeper than any real answer; a spoiled version that prints brackets for ever gets far beyond it.
_DEEPEST_JSON: Final = 64
# Beyond so many elements, those of an unordered list that have no equal are paired in order.
_MOST_TO_MATCH: Final = 64

_Pattern = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NoJson:
    """A text that does not parse; None would be JSON's null."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules that hold at one place of a document and below it."""

    tolerance: float
    unordered: tuple[_Pattern, ...] = ()
    ignored: tuple[_Pattern, ...] = ()

    @classmethod
    def of(cls, rules: JsonRules) -> "Rules":
        return cls(
            rules.tolerance,
            tuple(_pattern(pointer) for pointer in rules.unordered),
            tuple(_pattern(pointer) for pointer in rules.ignored),
        )

    @property
    def here_ignored(self) -> bool:
        return () in self.ignored

    @property
    def here_unordered(self) -> bool:
        return () in self.unordered

    def below(self, step: str) -> "Rules":
        if not (self.unordered or self.ignored):
            return self
        return Rules(self.tolerance, _tails(self.unordered, step), _tails(self.ignored, step))


def _pattern(pointer: str) -> _Pattern:
    """A JSON pointer in which `*` stands for any name or place."""
    steps = pointer.split("/")[1:]
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in steps)


def _tails(patterns: tuple[_Pattern, ...], step: str) -> tuple[_Pattern, ...]:
    return tuple(each[1:] for each in patterns if each and each[0] in ("*", step))


def parse(text: str) -> Any:
    """The value, or NoJson."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return NoJson()
    return NoJson() if _deeper_than(value, _DEEPEST_JSON) else value


def json_score(one: Any, other: Any, rules: Rules) -> float:
    """The share of leaves that match, of all that either side has."""
    matching, total = _leaves(one, other, rules)
    return matching / total if total else 1.0


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


def _leaves(one: Any, other: Any, rules: Rules) -> tuple[int, int]:
    """How many leaves match, and how many there are; an empty object or list is one leaf."""
    if rules.here_ignored:
        return 0, 0
    if isinstance(one, dict) and isinstance(other, dict) and (one or other):
        pairs = _members(one, other, rules)
    elif isinstance(one, list) and isinstance(other, list) and (one or other):
        pairs = _elements(
            one, _aligned(one, other, rules) if rules.here_unordered else other, rules
        )
    else:
        same = _same_leaf(one, other, rules.tolerance)
        return int(same), 1 if same else max(_count(one, rules), _count(other, rules))
    counted = [_leaves(mine, theirs, below) for mine, theirs, below in pairs]
    return sum(matching for matching, _ in counted), sum(total for _, total in counted)


def _members(
    one: Mapping[str, Any], other: Mapping[str, Any], rules: Rules
) -> Iterator[tuple[Any, Any, Rules]]:
    for key in one.keys() | other.keys():
        yield one.get(key, NoJson()), other.get(key, NoJson()), rules.below(key)


def _elements(one: list[Any], other: list[Any], rules: Rules) -> Iterator[tuple[Any, Any, Rules]]:
    for index in range(max(len(one), len(other))):
        yield _at(one, index), _at(other, index), rules.below(str(index))


def _aligned(one: list[Any], other: list[Any], rules: Rules) -> list[Any]:
    """`other` in the order that suits `one`: equal elements first, then those that are nearest."""
    below = rules.below("*")
    left = list(other)
    places: list[Any] = [NoJson()] * len(one)
    unmatched: list[int] = []
    for index, mine in enumerate(one):
        found = next((at for at, each in enumerate(left) if _same(mine, each, below)), None)
        if found is None:
            unmatched.append(index)
        else:
            places[index] = left.pop(found)
    for index in unmatched:
        if not left:
            break
        nearest = 0
        if len(left) <= _MOST_TO_MATCH:
            scores = [json_score(one[index], each, below) for each in left]
            nearest = scores.index(max(scores))
        places[index] = left.pop(nearest)
    return places + left


def _same(one: Any, other: Any, rules: Rules) -> bool:
    matching, total = _leaves(one, other, rules)
    return matching == total


def _at(items: list[Any], index: int) -> Any:
    return items[index] if index < len(items) else NoJson()


def _count(value: Any, rules: Rules) -> int:
    """The leaves of a value that has nothing to match it."""
    if rules.here_ignored:
        return 0
    if isinstance(value, dict) and value:
        return sum(_count(child, rules.below(key)) for key, child in value.items())
    if isinstance(value, list) and value:
        return sum(_count(child, rules.below(str(at))) for at, child in enumerate(value))
    return 1


def _same_leaf(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, str) and isinstance(other, str):
        return same_text(one, other)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other or _close(one, other, tolerance)
    # Only empty containers, null and "nothing there" are left.
    return type(one) is type(other) and not isinstance(one, NoJson) and one == other


def _close(one: float, other: float, tolerance: float) -> bool:
    try:
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=_ABSOLUTE_TOLERANCE)
    except OverflowError:
        return False
