"""The steps that two answers go through, from the cheap and certain to the costly, until one settles.

Did one fail, are they the same, does only one keep the schema; then tool calls, JSON by field, text.
What is left to say about texts (nearness in meaning, a judge) takes an engine, and is asked for by
the shadow. `agreement` is symmetric in the two answers; only `outcome` knows which of them is the
candidate's.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from rollout.agreement.fields import NoJson, Rules, json_score, parse
from rollout.agreement.schemas import valid
from rollout.agreement.tools import calls, tools_score
from rollout.cases import normalise, same_text
from rollout.exchanges import Answer, Comparison, Exchange, Kind, Outcome, Step
from rollout.routes import Comparator, JsonRules, Route

# Two texts may share every word and pair of words and still differ; only equal ones reach 1.
MOST_FOR_DIFFERENT_TEXTS: Final = 0.99
_TOKEN: Final = re.compile(r"\w+|[^\w\s]")

# Seconds of some clock that goes forward; what a step cost is the shell's to measure.
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Agreement:
    """`score` lies in [0, 1]. `outcome` is the candidate's where no person is needed to tell.

    `steps` are those that were tried, in order; the last one settled it.
    """

    score: float
    kind: Kind
    outcome: Outcome | None = None
    steps: tuple[Step, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class _Pair:
    stable: Answer
    candidate: Answer
    comparator: Comparator
    schema: str | None
    rules: Rules


def _still() -> float:
    return 0.0


def compare(
    stable: Answer,
    candidate: Answer,
    comparator: Comparator = "text",
    schema: str | None = None,
    rules: JsonRules | None = None,
    clock: Clock = _still,
) -> Agreement:
    """Compare two answers to the same request.

    `schema` is the text of a JSON schema, or None. It is not asked of answers that call tools, and
    a text that is no JSON is checked as a string, unless the comparator is "json".
    """
    pair = _Pair(stable, candidate, comparator, schema, Rules.of(rules or JsonRules()))
    steps: list[Step] = []
    for name, step in _CASCADE:
        began = clock()
        found = step(pair)
        score = None if found is None else found.score
        steps.append(Step(name, score, clock() - began))
        if found is not None:
            return Agreement(found.score, found.kind, found.outcome, tuple(steps))
    raise AssertionError("the last step settles every pair")


def compare_exchange(
    exchange: Exchange,
    other: Answer,
    *,
    trial: str,
    candidate: int,
    route: Route,
    clock: Clock = _still,
) -> Comparison:
    """The pair of what a client was answered and what the other version answers.

    Whichever of the two answers is by the version `candidate` is the candidate's.
    """
    mine = exchange.answer
    stable, tried = (other, mine) if mine.version == candidate else (mine, other)
    found = compare(stable, tried, route.comparator, route.schema, route.json_rules, clock)
    return Comparison(
        request_id=exchange.request_id,
        route=exchange.route,
        trial=trial,
        stable=stable,
        candidate=tried,
        agreement=found.score,
        kind=found.kind,
        outcome=found.outcome,
        steps=found.steps,
    )


def compare_twice(
    exchange: Exchange, again: Answer, *, trial: str, route: Route, clock: Clock = _still
) -> Comparison:
    """The pair of what a version answered a client and what the same version answers again."""
    mine = exchange.answer
    found = compare(mine, again, route.comparator, route.schema, route.json_rules, clock)
    return Comparison(
        request_id=exchange.request_id,
        route=exchange.route,
        trial=trial,
        stable=mine,
        candidate=again,
        agreement=found.score,
        kind=found.kind,
        outcome=found.outcome,
        steps=found.steps,
    )


# The steps. Each settles the pair or has nothing to say.


def _failure(pair: _Pair) -> Agreement | None:
    if pair.stable.ok and pair.candidate.ok:
        return None
    return Agreement(0.0, "failure", _only_one(pair.stable.ok, pair.candidate.ok) or "tie")


def _exact(pair: _Pair) -> Agreement | None:
    same = pair.stable.text == pair.candidate.text and calls(pair.stable) == calls(pair.candidate)
    return Agreement(1.0, "exact") if same else None


def _tools(pair: _Pair) -> Agreement | None:
    if not (pair.stable.tool_calls or pair.candidate.tool_calls):
        return None
    score = tools_score(calls(pair.stable), calls(pair.candidate), pair.rules)
    return Agreement(score, "tools")


def _schema(pair: _Pair) -> Agreement | None:
    decided = _only_one(
        valid(pair.stable.text, pair.comparator, pair.schema),
        valid(pair.candidate.text, pair.comparator, pair.schema),
    )
    return Agreement(0.0, "schema", decided) if decided else None


def _normalised(pair: _Pair) -> Agreement | None:
    same = same_text(pair.stable.text, pair.candidate.text)
    return Agreement(1.0, "normalised") if same else None


def _json(pair: _Pair) -> Agreement | None:
    if pair.comparator != "json":
        return None
    one, other = parse(pair.stable.text), parse(pair.candidate.text)
    if isinstance(one, NoJson) or isinstance(other, NoJson):
        return None
    return Agreement(json_score(one, other, pair.rules), "json")


def _text(pair: _Pair) -> Agreement:
    return Agreement(_text_score(pair.stable.text, pair.candidate.text), "text")


_CASCADE: Final[Sequence[tuple[Kind, Callable[[_Pair], Agreement | None]]]] = (
    ("failure", _failure),
    ("exact", _exact),
    ("tools", _tools),
    ("schema", _schema),
    ("normalised", _normalised),
    ("json", _json),
    ("text", _text),
)


def _only_one(stable: bool, candidate: bool) -> Outcome | None:
    """The candidate's outcome where one side alone is in order."""
    if stable == candidate:
        return None
    return "win" if candidate else "loss"


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
