"""Tool calls compared by name and arguments; parallel calls have no order."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from rollout.agreement.fields import NoJson, Rules, json_score, parse
from rollout.exchanges import Answer

# A name and its parsed arguments.
Call = tuple[str, Any]


def calls(answer: Answer) -> list[Call]:
    return [_call(call) for call in answer.tool_calls]


def tools_score(one: list[Call], other: list[Call], rules: Rules) -> float:
    """Half of a call is its name, half its arguments."""
    mine, theirs = _by_key(one), _by_key(other)
    shared = mine & theirs
    score = float(shared.total())
    rest, their_rest = _by_name(mine - shared), _by_name(theirs - shared)
    for name in rest.keys() & their_rest.keys():
        for arguments, their_arguments in zip(rest[name], their_rest[name], strict=False):
            score += 0.5 + 0.5 * json_score(
                json.loads(arguments), json.loads(their_arguments), rules
            )
    return score / max(len(one), len(other))


def _call(call: Mapping[str, Any]) -> Call:
    function = call.get("function")
    named: Mapping[str, Any] = function if isinstance(function, Mapping) else call
    arguments = named.get("arguments") or "{}"
    if isinstance(arguments, str):
        parsed = parse(arguments)
        arguments = arguments if isinstance(parsed, NoJson) else parsed
    return str(named.get("name", "")), arguments


def _by_key(found: list[Call]) -> Counter[tuple[str, str]]:
    return Counter((name, json.dumps(arguments, sort_keys=True)) for name, arguments in found)


def _by_name(found: Counter[tuple[str, str]]) -> dict[str, list[str]]:
    named: dict[str, list[str]] = defaultdict(list)
    for name, arguments in sorted(found.elements()):
        named[name].append(arguments)
    return named
