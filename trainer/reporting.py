"""From the answers of several versions to the same rows to a report: values in, values out."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Final

from rollout.acceptance import accept, because, overall
from rollout.errors import InvalidInputError
from rollout.evaluation import EvaluationRules
from rollout.evidence import Beside, Report, RowError, Score, Slice
from rollout.intervals import (
    chance_of_a_fluke,
    detectable_difference,
    difference_interval,
    holm,
    mean_interval,
    paired_p,
    quantile,
)
from trainer.evaluate import Graded, Messages
from trainer.graders import names
from trainer.suites import Suite

# The share of rows that two versions differ on, where nothing is known of them yet.
USUAL_CHURN: Final = 0.2
_SHOWN_ERRORS: Final = 20
_MANY_ERRORS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Price:
    """What an engine's answers cost: by the million tokens, and by the second that one takes."""

    prompt: float = 0.0
    completion: float = 0.0
    second: float = 0.0
    unit: str = "USD"


@dataclass(frozen=True, slots=True)
class Answers:
    """One version's answers to all rows. `document` is where they are kept, `asked_at` since when."""

    way: str
    version: str
    graded: tuple[Graded, ...]
    seconds: float
    asked_at: datetime
    price: Price | None = None
    document: str | None = None


@dataclass(frozen=True, slots=True)
class Beforehand:
    """What was said before the first row was asked."""

    rows: int
    churn: float
    alpha: float
    detectable: float | None

    def __str__(self) -> str:
        if self.detectable is None:
            return f"{self.rows} rows cannot show any difference: add more"
        return (
            f"{self.rows} rows show a gain of {self.detectable:.1%} or more four times out of five, "
            f"if the two differ on {self.churn:.0%} of them (alpha {self.alpha:g})"
        )


def beforehand(suite: Suite, rules: EvaluationRules, churn: float | None) -> Beforehand:
    """`churn` is what the last report on this suite saw, or None."""
    expected = USUAL_CHURN if churn is None else churn
    rows = len(suite.rows)
    return Beforehand(
        rows, expected, rules.alpha, detectable_difference(rows, expected, rules.alpha)
    )


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a report says beside its numbers. `answers` begin with the version's and its parent's."""

    route: str
    rules: EvaluationRules
    stated: Beforehand
    now: datetime
    looks: int = 1
    by: str = ""
    run: str = ""
    prompt: Messages = ()
    decoding: str = ""
    notes: tuple[str, ...] = ()


def make_report(suite: Suite, answers: Sequence[Answers], about: Circumstances) -> Report:
    """The report with its verdicts. The same answers always give the same report."""
    ours, parents = answers[0], answers[1]
    _check_rows(suite, answers)
    metric = names(suite.scorers)[0]
    differences = _differences(ours, parents, metric)
    low, high = difference_interval(differences, seed=suite.digest)
    report = Report(
        id="",
        route=about.route,
        version=ours.version,
        parent=parents.version,
        suite=suite.name,
        scores=tuple(_score(each, suite, metric) for each in answers),
        gained=sum(each > 0 for each in differences),
        lost=sum(each < 0 for each in differences),
        p_value=paired_p(differences, suite.digest),
        outcome="inconclusive",
        reason="",
        created_at=about.now,
        created_by=about.by,
        run=about.run,
        suite_digest=suite.digest,
        vault=suite.vault,
        metric=metric,
        low=low,
        high=high,
        detectable=about.stated.detectable,
        churn=about.stated.churn,
        looks=about.looks,
        slices=_slices(suite, ours, parents, metric, about.rules.alpha),
        beside=tuple(_beside(ours, each, metric, suite.digest) for each in answers[2:]),
        prompt=about.prompt,
        errors=_errors(answers),
        decoding=about.decoding,
    )
    verdicts = accept(report, about.rules)
    report = replace(
        report,
        verdicts=verdicts,
        outcome=overall(verdicts),
        reason=because(verdicts),
        notes=(*about.notes, *_notes(report, about)),
    )
    return replace(report, id=_digest(report))


def _check_rows(suite: Suite, answers: Sequence[Answers]) -> None:
    rows = [row.id for row in suite.rows]
    if any([each.row for each in given.graded] != rows for given in answers):
        raise InvalidInputError("the versions were not asked the same rows")


def _differences(ours: Answers, others: Answers, metric: str) -> list[float]:
    return [
        mine.main(metric) - theirs.main(metric)
        for mine, theirs in zip(ours.graded, others.graded, strict=True)
    ]


def _score(answers: Answers, suite: Suite, metric: str) -> Score:
    graded = answers.graded
    marks = [each.main(metric) for each in graded]
    low, high = mean_interval(marks, seed=suite.digest)
    cost, unit = cost_per_success(graded, answers.price)
    seconds = [each.seconds for each in graded if each.seconds > 0]
    return Score(
        version=answers.version,
        correct=sum(each.right for each in graded),
        total=len(graded),
        low=low,
        high=high,
        seconds=answers.seconds,
        way=answers.way,
        score=_mean(marks),
        metrics={
            name: _mean([each.marks.get(name, 0.0) for each in graded])
            for name in names(suite.scorers)
        },
        p50_seconds=quantile(seconds, 0.5),
        p99_seconds=quantile(seconds, 0.99),
        prompt_tokens=sum(each.prompt_tokens for each in graded),
        completion_tokens=sum(each.completion_tokens for each in graded),
        cost_per_success=cost,
        cost_unit=unit,
        errors=sum(each.error is not None for each in graded),
        answers=answers.document,
        asked_at=answers.asked_at,
    )


def cost_per_success(graded: Sequence[Graded], price: Price | None) -> tuple[float | None, str]:
    """What all answers cost for each right one: in tokens, where no price is known.

    None where nothing was right, or the engine told no usage and seconds have no price.
    """
    right = sum(each.right for each in graded)
    prompt = sum(each.prompt_tokens for each in graded)
    completion = sum(each.completion_tokens for each in graded)
    if price is None:
        return ((prompt + completion) / right if right and prompt else None), "tokens"
    cost = (prompt * price.prompt + completion * price.completion) / 1e6
    cost += price.second * sum(each.seconds for each in graded)
    return (cost / right if right and cost else None), price.unit


def _slices(
    suite: Suite, ours: Answers, parents: Answers, metric: str, alpha: float
) -> tuple[Slice, ...]:
    pairs = {
        row.id: (mine.main(metric), theirs.main(metric))
        for row, mine, theirs in zip(suite.rows, ours.graded, parents.graded, strict=True)
    }
    found: list[Slice] = []
    for tag in suite.tags:
        marks = [pairs[row.id] for row in suite.rows if tag in row.tags]
        differences = [mine - theirs for mine, theirs in marks]
        mean = _mean(differences)
        # Each end at confidence 1 - alpha: "not worse" is asked of one end alone.
        low, high = difference_interval(differences, 1 - 2 * alpha, f"{suite.digest}:{tag}")
        found.append(
            Slice(
                tag=tag,
                rows=len(marks),
                score=_mean([mine for mine, _ in marks]),
                parent_score=_mean([theirs for _, theirs in marks]),
                gained=sum(each > 0 for each in differences),
                lost=sum(each < 0 for each in differences),
                low=low,
                high=high,
                p_value=paired_p(differences, f"{suite.digest}:{tag}"),
                adjusted_p=1.0,
                variance=_mean([(each - mean) ** 2 for each in differences]),
            )
        )
    adjusted = holm({each.tag: each.p_value for each in found})
    return tuple(replace(each, adjusted_p=adjusted[each.tag]) for each in found)


def _beside(ours: Answers, other: Answers, metric: str, seed: str) -> Beside:
    differences = _differences(ours, other, metric)
    low, high = difference_interval(differences, seed=seed)
    return Beside(
        way=other.way,
        version=other.version,
        difference=_mean(differences),
        low=low,
        high=high,
        gained=sum(each > 0 for each in differences),
        lost=sum(each < 0 for each in differences),
        p_value=paired_p(differences, seed),
    )


def _errors(answers: Sequence[Answers]) -> tuple[RowError, ...]:
    found = [
        RowError(each.row, given.version, each.error)
        for given in answers
        for each in given.graded
        if each.error is not None
    ]
    return tuple(found[:_SHOWN_ERRORS])


def _notes(report: Report, about: Circumstances) -> list[str]:
    """What a reader should know before believing the numbers."""
    found: list[str] = []
    if report.version == report.parent:
        found.append(
            "a version beside itself: what differs is noise, and better or worse is chance"
        )
    if report.looks > about.rules.maximum_looks:
        fluke = chance_of_a_fluke(report.looks, about.rules.alpha)
        found.append(
            f"this suite has judged {report.looks} versions, more than the {about.rules.maximum_looks} "
            f"that the route allows: were none of them better, one would have been called better with "
            f"a chance of {fluke:.0%}. Register a new suite"
        )
    for score in report.scores[:2]:
        if score.total and score.errors / score.total > _MANY_ERRORS:
            said = (
                f"{score.errors} of {score.total} rows of {score.version} have no answer or no mark"
            )
            found.append(f"{said}, and count as wrong: look at the errors before the score")
    for each in report.beside:
        if each.way == "prompt" and each.difference <= 0:
            found.append(
                "the base under the best prompt that was found is as good: an instruction with "
                "examples may do what the adapter does"
            )
        if each.way == "larger" and each.low > 0:
            found.append(f"it is better than the larger {each.version}")
    ours, parents = report.scores[0], report.scores[1]
    if (
        ours.asked_at
        and parents.asked_at
        and (ours.asked_at - parents.asked_at).total_seconds() > 3600
    ):
        found.append(
            f"{parents.version} was not asked again: its answers, and their times, are of "
            f"{parents.asked_at:%Y-%m-%d %H:%M}"
        )
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _digest(report: Report) -> str:
    content = json.dumps(asdict(report), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def fingerprint(values: Mapping[str, Any]) -> str:
    """A name for what decides a version's answers."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
