"""When a route is trained anew by itself: what it may ask for, and whether it is time."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from rollout.cases import LabelledCase, stratum_of, value_of
from rollout.runs import ENDED, TrainingRun
from rollout.tallies import Stratum, pair_counts_of, win_rate

Trigger = Literal["labels", "agreement", "schedule"]

# As many rows as a run needs by its own default.
_FEWEST_LABELS: Final = 20
# Fewer cases say nothing about a share that a tenth more or less would change.
_FEWEST_IN_WINDOW: Final = 30
# After so many failures in a row the pause grows no more.
_MOST_DOUBLINGS: Final = 5


@dataclass(frozen=True, slots=True)
class Retrain:
    """What starts a run of the route without a person; 0 leaves a rule out.

    new_labels: decided cases since the last run that learnt from them.
    agreement_below: of the pairs that the newest labels stand for, the share in which people found
        stable's answer right is surely below this; in [0, 1).
    window: how many of the newest decided cases that share is taken from.
    every_days: so long after the last run, if there is any new label.
    cooldown_hours: no run begins sooner after another one has ended; doubled with each failure.
    propose: put a version that won on trial. Else its run ends as ready.
    config: settings of the run, as in `sluice train --set`.
    enabled: whether all this holds.
    """

    new_labels: int = 0
    agreement_below: float = 0.0
    window: int = 200
    every_days: float = 0.0
    cooldown_hours: float = 24.0
    propose: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    enabled: bool = True


def retrain_problems(retrain: Retrain) -> Iterator[tuple[str, str]]:
    """Each field that makes no sense, and what is wrong with it."""
    for name in ("new_labels", "every_days", "cooldown_hours"):
        if getattr(retrain, name) < 0:
            yield name, f"{name} must not be negative"
    if not 0 <= retrain.agreement_below < 1:
        yield "agreement_below", "agreement_below is a share: it must lie in [0, 1)"
    if not _FEWEST_IN_WINDOW <= retrain.window <= 10_000:
        yield "window", f"window must lie between {_FEWEST_IN_WINDOW} and 10000"
    if retrain.enabled and not (
        retrain.new_labels or retrain.agreement_below or retrain.every_days
    ):
        yield (
            "new_labels",
            "nothing ever starts a run: set new_labels, agreement_below or every_days",
        )


@dataclass(frozen=True, slots=True)
class Accord:
    """How often people find stable's answer right, of all pairs and not of the cases alone.

    It lies between `low` and `high` (at 95 %), whatever is true of the pairs that are like no
    decided case: `covered` is the share of the others. `cases` stand behind it.
    """

    rate: float
    low: float
    high: float
    cases: int
    covered: float

    def __str__(self) -> str:
        return f"{self.rate:.2f} ({self.low:.2f} to {self.high:.2f}, {self.cases} cases)"


def accord(rows: Sequence[LabelledCase], stable: int, tallies: Mapping[str, int]) -> Accord | None:
    """From the newest decided cases, those to which this stable version answered.

    Cases are mostly disagreements, so each counts for the pairs that it stands for: 1/π of them,
    and as many more as its stratum has cases that nobody decided. None where there are too few.
    """
    asked = [row for row in rows if row.case.trial and row.case.stable.version == stable]
    if len(asked) < _FEWEST_IN_WINDOW:
        return None
    seen: dict[tuple[str, str], Counter[bool]] = {}
    for row in asked:
        right = value_of(row.case, row.label) in ("stable", "both")
        seen.setdefault((row.case.trial, stratum_of(row.case)), Counter())[right] += 1
    counted = pair_counts_of(tallies)
    found = win_rate(_strata(seen, counted))
    if found is None:
        return None
    # Of pairs that are like no decided case anything may be true.
    unknown = 1.0 - found.covered
    return Accord(
        rate=found.rate,
        low=found.low * found.covered,
        high=min(1.0, found.high * found.covered + unknown),
        cases=len(asked),
        covered=found.covered,
    )


def _strata(
    seen: Mapping[tuple[str, str], Counter[bool]],
    counted: Mapping[tuple[str, str], tuple[int, int]],
) -> Iterator[Stratum]:
    """What is right counts as a win. Of a trial's cases the window holds a share; what was offered
    and never decided counts by the same share."""
    trials = {trial for trial, _ in seen}
    for trial in trials:
        strata = {name for each, name in (*seen, *counted) if each == trial}
        decided = sum(counted.get((trial, name), (0, 0))[1] for name in strata)
        held = sum(sum(each.values()) for (name, _), each in seen.items() if name == trial)
        share = min(1.0, held / decided) if decided else 1.0
        for name in strata:
            rights = seen.get((trial, name), Counter())
            offered, done = counted.get((trial, name), (0, 0))
            here = sum(rights.values())
            expected = offered * here / done if done and here else offered * share
            yield Stratum(
                inclusion=float(name.partition("|")[0]),
                offered=max(here, round(expected)),
                wins=rights[True],
                losses=rights[False],
            )


@dataclass(frozen=True, slots=True)
class Known:
    """`runs` are the route's trainings, the newest first. `labels` are the decided cases of the
    route, `new_labels` those since `learnt_from(runs)`. `trial` is the version on trial, if any."""

    runs: Sequence[TrainingRun] = ()
    labels: int = 0
    new_labels: int = 0
    accord: Accord | None = None
    trial: str | None = None


@dataclass(frozen=True, slots=True)
class Outlook:
    """Whether a run is due, and what a person is told: what it waits for, or why it starts.

    "blocked": it would be due but for a trial, a pause after the last run, or failures.
    """

    state: Literal["off", "waiting", "blocked", "under way", "due"]
    reason: str
    trigger: Trigger | None = None
    new_labels: int = 0
    accord: Accord | None = None
    failures: int = 0
    not_before: datetime | None = None


def learnt_from(runs: Sequence[TrainingRun]) -> TrainingRun | None:
    """The newest run that learnt from the labels of its time, or is about to."""
    return next((run for run in runs if run.state not in ENDED or run.adapter is not None), None)


def outlook(retrain: Retrain | None, known: Known, now: datetime) -> Outlook:
    """Whether the route is to be trained now. The same values give the same answer."""
    if retrain is None or not retrain.enabled:
        return Outlook("off", "nothing is trained without a person", new_labels=known.new_labels)
    failures = failures_in_a_row(known.runs)

    def said(
        state: Literal["waiting", "blocked", "under way", "due"],
        reason: str,
        trigger: Trigger | None = None,
        not_before: datetime | None = None,
    ) -> Outlook:
        return Outlook(state, reason, trigger, known.new_labels, known.accord, failures, not_before)

    under_way = next((run for run in known.runs if run.state not in ENDED), None)
    if under_way is not None:
        return said("under way", f"{under_way.id} is {under_way.state}{_because(under_way)}")
    least = retrain.config.get("minimum_rows", _FEWEST_LABELS)
    if isinstance(least, int) and known.labels < least:
        return said("waiting", f"{known.labels} cases are decided, and a run needs {least}")
    if known.new_labels == 0:
        return said("waiting", "no case was decided since the last run")
    trigger, why = _trigger(retrain, known, now)
    if trigger is None:
        return said("waiting", why)
    if known.trial is not None:
        return said(
            "blocked", f"{why}; it waits for the end of the trial of {known.trial}", trigger
        )
    last = known.runs[0] if known.runs else None
    if last is not None:
        pause = timedelta(hours=retrain.cooldown_hours) * 2 ** min(failures, _MOST_DOUBLINGS)
        not_before = (last.updated_at or last.created_at) + pause
        if now < not_before:
            return said(
                "blocked",
                f"{why}; not before {not_before:%Y-%m-%d %H:%M} UTC: {_last(last, failures)}",
                trigger,
                not_before,
            )
    return said("due", why, trigger)


def failures_in_a_row(runs: Sequence[TrainingRun]) -> int:
    """How many of the newest runs ended without an adapter. Those that were cancelled don't count."""
    ended = [run for run in runs if run.state in ENDED and run.state != "cancelled"]
    return next((n for n, run in enumerate(ended) if run.adapter is not None), len(ended))


def _trigger(retrain: Retrain, known: Known, now: datetime) -> tuple[Trigger | None, str]:
    """The first rule that holds, with its numbers; else what each of them still lacks."""
    lacking: list[str] = []
    if retrain.new_labels:
        count = f"{known.new_labels} cases were decided since the last run"
        if known.new_labels >= retrain.new_labels:
            return "labels", f"{count}, and {retrain.new_labels} start the next one"
        lacking.append(f"{known.new_labels} of {retrain.new_labels} new labels")
    if retrain.agreement_below:
        if known.accord is None:
            lacking.append("too few labels of the stable version to tell how often it is right")
        else:
            share = f"people find stable right in {known.accord} of the pairs"
            if known.accord.high < retrain.agreement_below:
                return "agreement", f"{share}, surely below {retrain.agreement_below:g}"
            lacking.append(f"{share}, not surely below {retrain.agreement_below:g}")
    if retrain.every_days:
        last = learnt_from(known.runs)
        due_at = None if last is None else last.created_at + timedelta(days=retrain.every_days)
        if due_at is None or now >= due_at:
            since = "there was no run yet" if last is None else f"the last run was {last.id}"
            return "schedule", f"every {retrain.every_days:g} days, and {since}"
        lacking.append(f"the next by the calendar on {due_at:%Y-%m-%d %H:%M} UTC")
    return None, "; ".join(lacking) or "nothing starts a run"


def _last(run: TrainingRun, failures: int) -> str:
    if failures:
        many = "the last run" if failures == 1 else f"{failures} runs in a row"
        return f"{many} came to nothing, {run.id} because {run.reason or 'of nothing it said'}"
    return f"{run.id} has just ended ({run.state})"


def _because(run: TrainingRun) -> str:
    return f", started because {run.why}" if run.why else f", asked for by {run.created_by}"
