"""Contradicting labels become cases that ask a person again."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime

from rollout.cases import Case, LabelledCase
from rollout.datasets import Contradiction
from rollout.exchanges import Answer
from trainer.dataset.answers import answer_key
from trainer.dataset.voices import CONTRADICTION

# As the interest of a pair that is as far apart and as unsure as can be.
_INTEREST = math.log2(1 + 1 / 64)
_SECONDS_PER_HALVING = 86400.0


def cases_for(
    contradictions: Iterable[Contradiction], labelled: Mapping[str, LabelledCase], now: datetime
) -> list[Case]:
    """For each contradiction without a majority a case that shows its two commonest answers.

    Its id is made of the labels that contradict each other as people gave them, so the same ones
    ask once only. The label of such a case settles the prompt.
    """
    found: list[Case] = []
    for each in contradictions:
        source = next((labelled[case].case for case in each.cases if case in labelled), None)
        if each.settled is None and source is not None:
            found.append(_case(each, source, now))
    return found


def _case(contradiction: Contradiction, source: Case, now: datetime) -> Case:
    said = "\x1e".join(sorted(f"{case}\x1f{gold}" for case, gold in _both(contradiction)))
    name = hashlib.sha256(f"{source.route}\x1e{said}".encode()).hexdigest()[:24]
    one, other = _commonest(contradiction)
    return Case(
        id=f"contradiction-{name}",
        route=source.route,
        trial="",
        request_id=source.request_id,
        messages=source.messages,
        stable=replace(one, version=source.stable.version),
        candidate=replace(other, version=source.candidate.version),
        agreement=0.0,
        kind=CONTRADICTION,
        inclusion=1.0,
        priority=_INTEREST + now.timestamp() / _SECONDS_PER_HALVING,
        created_at=now,
        unit=source.unit,
    )


def _commonest(contradiction: Contradiction) -> list[Answer]:
    """The two answers that most labels give, each as one of them gave it."""
    calls = contradiction.calls or ((),) * len(contradiction.golds)
    ways: dict[str, list[Answer]] = defaultdict(list)
    for text, known in zip(contradiction.golds, calls, strict=True):
        answer = Answer(version=0, status=200, text=text, tool_calls=known)
        ways[answer_key(text, known)].append(answer)
    first = {key: min(same, key=lambda each: each.text) for key, same in ways.items()}
    commonest = sorted(ways, key=lambda key: (-len(ways[key]), first[key].text, key))
    return [first[key] for key in commonest[:2]]


def _both(contradiction: Contradiction) -> Iterable[tuple[str, str]]:
    return zip(contradiction.cases, contradiction.golds, strict=True)
