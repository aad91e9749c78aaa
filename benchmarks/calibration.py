"""Whether an evaluation says "better" of a version that is not, and how often of one that is.

    python -m benchmarks.calibration [--evaluations 1000] [--seed 1]

Each evaluation draws rows anew, and for each row two answers of the *same* version, which differ
by chance as a version's answers do (other batches, other kernels, a temperature). They go through
the report and the gate as the trainer's do. Then the version is made better by a known amount, of
which the report said beforehand that four evaluations out of five would show it.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from rollout.binomial import wilson
from rollout.evaluation import EvaluationRules
from rollout.evidence import Report
from rollout.intervals import detectable_difference
from rollout.suites import Scorer, Suite, SuiteRow
from trainer.evaluate import Graded
from trainer.reporting import Answers, Beforehand, Circumstances, make_report

_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_GOAL = 0.05
_SLICES = 4
_PARTS = 5


@dataclass(frozen=True)
class Case:
    """`churn` is the share of rows on which the two differ, `gain` by how much one is better."""

    name: str
    rows: int
    churn: float
    gain: float = 0.0
    graded: bool = False


@dataclass(frozen=True)
class Found:
    case: Case
    evaluations: int
    better: int
    worse: int
    covered: int
    slices: int

    @property
    def share(self) -> float:
        return self.better / self.evaluations


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.calibration", description=__doc__)
    parser.add_argument("--evaluations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    print(
        "| the same version against itself | rows | differ | better | worse | 95 % interval holds | any of 4 slices worse |"
    )
    print("|---|---|---|---|---|---|---|")
    kept = [_line(measure(case, options.evaluations, options.seed)) for case in alike()]
    print()
    print("| a better version | rows | differ | gain | better | said beforehand |")
    print("|---|---|---|---|---|---|")
    for case in better():
        found = measure(case, options.evaluations, options.seed)
        print(
            f"| {case.name} | {case.rows:,} | {case.churn:.0%} | {case.gain:.1%} "
            f"| {found.share:.1%} | {'80 %' if 'smallest' in case.name else '–'} |"
        )
    print(f"\n{options.evaluations:,} evaluations each, {time.monotonic() - began:.0f} s")
    print("the goal is kept" if all(kept) else f"more than {_GOAL:.0%} were called better")
    return 0 if all(kept) else 1


def alike() -> Iterator[Case]:
    for rows, churn in ((100, 0.2), (300, 0.05), (300, 0.2), (300, 0.4), (1000, 0.2)):
        yield Case("right or wrong", rows, churn)
    yield Case("marks (as F1)", 200, 0.3, graded=True)


def better() -> Iterator[Case]:
    for rows in (100, 300, 1000):
        gain = detectable_difference(rows, 0.2)
        if gain is not None:
            yield Case("the smallest gain that shows", rows, max(0.2, gain), gain)
            if rows == 300:
                yield Case("half of it", rows, 0.2, gain / 2)


def measure(case: Case, evaluations: int, seed: int) -> Found:
    """So many evaluations of one kind, each on rows and answers of its own."""
    dice = np.random.default_rng([seed, case.rows, int(case.churn * 100), int(case.graded)])
    suite = _suite(case)
    draw = _marks if case.graded else _rights
    said: Counter[str] = Counter()
    for number in range(evaluations):
        report = _evaluate(suite, draw(dice, case), number)
        (verdict,) = report.verdicts
        said[verdict.outcome] += 1
        said["covered"] += (
            report.low <= case.gain <= report.high
            if report.low is not None and report.high is not None
            else 0
        )
        said["slices"] += any(
            each.adjusted_p < _GOAL and each.score < each.parent_score for each in report.slices
        )
    return Found(case, evaluations, said["pass"], said["fail"], said["covered"], said["slices"])


def _suite(case: Case) -> Suite:
    rows = tuple(
        SuiteRow(f"{place:05d}", (), "", tags=(f"slice {place % _SLICES}",))
        for place in range(case.rows)
    )
    scorer = Scorer("field_f1") if case.graded else Scorer()
    return Suite("calibration", rows, (scorer,), digest="calibration")


Drawn = tuple[list[float], list[float]]


def _rights(dice: np.random.Generator, case: Case) -> Drawn:
    """Rows that both get right or wrong, and `churn` of them on which one is right by a coin."""
    gained, lost = (case.churn + case.gain) / 2, (case.churn - case.gain) / 2
    kind = dice.choice(
        4, case.rows, p=[gained, lost, (1 - case.churn) * 0.7, (1 - case.churn) * 0.3]
    )
    ours = np.isin(kind, (0, 2)).astype(float)
    parents = np.isin(kind, (1, 2)).astype(float)
    return ours.tolist(), parents.tolist()


def _marks(dice: np.random.Generator, case: Case) -> Drawn:
    """Shares of fields that are right: rows are easy or hard, and `churn` of them waver."""
    ease = dice.beta(4, 1.5, case.rows)
    first = dice.binomial(_PARTS, ease) / _PARTS
    again = dice.binomial(_PARTS, ease) / _PARTS
    wavers = dice.random(case.rows) < case.churn
    return first.tolist(), np.where(wavers, again, first).tolist()


def _evaluate(suite: Suite, drawn: Drawn, number: int) -> Report:
    metric = suite.scorers[0].kind
    answers = [
        Answers(
            way,
            f"calibration@{place}",
            tuple(
                Graded(row.id, "", mark >= 1.0, 0.0, marks={metric: mark})
                for row, mark in zip(suite.rows, marks, strict=True)
            ),
            0.0,
            _AT,
        )
        for place, (way, marks) in enumerate(
            zip(("version", "parent"), drawn, strict=True), start=1
        )
    ]
    # Each draws its own resamples, as reports on different suites do.
    seeded = Suite(suite.name, suite.rows, suite.scorers, f"{suite.digest}-{number}")
    rules = EvaluationRules()
    stated = Beforehand(len(suite.rows), 0.2, rules.alpha, None)
    return make_report(seeded, answers, Circumstances("calibration", rules, stated, _AT))


def _line(found: Found) -> bool:
    case = found.case
    high = wilson(found.better, found.evaluations)[1]
    print(
        f"| {case.name} | {case.rows:,} | {case.churn:.0%} | {found.share:.1%} (below {high:.1%}) "
        f"| {found.worse / found.evaluations:.1%} | {found.covered / found.evaluations:.1%} "
        f"| {found.slices / found.evaluations:.1%} |"
    )
    return found.share <= _GOAL


if __name__ == "__main__":
    sys.exit(main())
