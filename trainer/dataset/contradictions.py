"""Contradicting labels become cases that ask a person again."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime

from rollout.cases import Case, LabelledCase
from rollout.datasets import Contradiction
from rollout.exchanges import Answer
from trainer.dataset.voices import CONTRADICTION

# As the interest of a pair that is as far apart and as unsure as can be.
_INTEREST = math.log2(1 + 1 / 64)
_SECONDS_PER_HALVING = 86400.0


def cases_for(
    contradictions: Iterable[Contradiction], labelled: Mapping[str, LabelledCase], now: datetime
) -> list[Case]:
    """For each contradiction without a majority a case that shows its two commonest answers.

    Its id is made of the labels that contradict each other, so the same ones ask once only. The
    label of such a case settles the prompt.
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
    counts = Counter(contradiction.golds)
    one, other = sorted(counts, key=lambda gold: (-counts[gold], gold))[:2]
    return Case(
        id=f"contradiction-{name}",
        route=source.route,
        trial="",
        request_id=source.request_id,
        messages=source.messages,
        stable=Answer(version=source.stable.version, status=200, text=one),
        candidate=Answer(version=source.candidate.version, status=200, text=other),
        agreement=0.0,
        kind=CONTRADICTION,
        inclusion=1.0,
        priority=_INTEREST + now.timestamp() / _SECONDS_PER_HALVING,
        created_at=now,
        unit=source.unit,
    )


def _both(contradiction: Contradiction) -> Iterable[tuple[str, str]]:
    return zip(contradiction.cases, contradiction.golds, strict=True)
