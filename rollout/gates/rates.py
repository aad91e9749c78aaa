"""Gates on rates: errors, limits, ratings and the schema, in one arm beside the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from rollout.evidence import Evidence, UnitCounts, Verdict
from rollout.gates.sides import HEADLINES, Sides, Thresholds
from rollout.gates.wording import forecast, points, share
from rollout.policy import Policy
from rollout.statistics import (
    Tally,
    difference,
    difference_bounds,
    evidence_of,
    log_evidence_not_worse,
    log_evidence_split,
    log_evidence_worse,
    not_worse_needed,
    worse_needed,
)


@dataclass(frozen=True, slots=True)
class RateGate:
    """A gate on the share of units that turned out bad.

    `counted` and `bad` read them off an arm; `became` is what happened to a bad one. `centre` is
    about the share to be expected (see `rollout.statistics`): with 0 the gate needs to know of bad
    units alone.
    """

    counted: str
    became: str
    units: Callable[[UnitCounts], int]
    bad: Callable[[UnitCounts], int]
    margin: Callable[[Policy], float]
    centre: float


def _of_all_units(
    became: str,
    bad: Callable[[UnitCounts], int],
    margin: Callable[[Policy], float],
    centre: float,
) -> RateGate:
    return RateGate("units", became, lambda arm: arm.units, bad, margin, centre)


RATES: Final[Mapping[str, RateGate]] = {
    "errors": _of_all_units(
        "failed", lambda arm: arm.errors, lambda policy: policy.error_margin, centre=0.02
    ),
    "ttft": _of_all_units(
        "waited too long for the first token",
        lambda arm: arm.slow_first_token,
        lambda policy: policy.slo_margin,
        centre=0.05,
    ),
    "total": _of_all_units(
        "took too long", lambda arm: arm.slow_total, lambda policy: policy.slo_margin, centre=0.05
    ),
    # At centre 0 "worse" compares bad ratings by unit, and it does not matter how many of an arm's
    # units rate at all. "Not worse" compares shares of the rated: see `_rated_alike`.
    "feedback": RateGate(
        counted="rated units",
        became="were rated bad",
        units=lambda arm: arm.rated,
        bad=lambda arm: arm.bad,
        margin=lambda policy: policy.feedback_margin,
        centre=0.0,
    ),
}


def judge_rate(gate: str, evidence: Evidence, policy: Policy, limits: Thresholds) -> Verdict:
    """Is the share of the candidate's units that turned out bad larger than stable's?

    Each stratum's units were assigned with its own chance, which is known. Units that came while
    one arm had everything compare with nothing and are left out.
    """
    rule = RATES[gate]
    tallies = tuple(
        Tally(
            stratum.weight / 100.0,
            rule.units(stratum.candidate),
            rule.bad(stratum.candidate),
            rule.units(stratum.stable),
            rule.bad(stratum.stable),
        )
        for stratum in evidence.strata
        if 0.0 < stratum.weight < 100.0
    )
    units, bad = sum(t.candidate for t in tallies), sum(t.candidate_bad for t in tallies)
    others, others_bad = sum(t.stable for t in tallies), sum(t.stable_bad for t in tallies)
    details = {}
    if units and others:
        details = {"candidate": bad / units, "stable": others_bad / others}
    verdict = _rate_verdict(
        gate,
        tallies,
        margin=rule.margin(policy),
        limits=limits,
        said=(
            f"{bad:,.0f} of the candidate's {units:,.0f} {rule.counted} {rule.became} "
            f"({share(bad, units)}), and {others_bad:,.0f} of stable's {others:,.0f} "
            f"({share(others_bad, others)})"
        ),
        units=round(units + others),
        counted=rule.counted,
        scale=1.0,
        details=details,
        centre=rule.centre,
    )
    return _rated_alike(verdict, tallies, policy) if gate == "feedback" else verdict


def judge_schema(evidence: Evidence, policy: Policy, limits: Thresholds) -> Verdict:
    """Does the candidate break the schema more often than stable, on the same requests?

    A pair of which one side alone is valid is a coin; the others tell only how rare such pairs are.
    """
    pairs = evidence.pairs
    bad, stable_bad = pairs.only_stable_valid, pairs.only_candidate_valid
    compared = max(pairs.agree + pairs.disagree, bad + stable_bad)
    # Coins that fall either way with the chance 1/2 are units of two even arms. A pair stands in
    # both arms at once, so the difference by unit is twice that by pair.
    alike = compared - bad - stable_bad
    tallies = (Tally(0.5, bad + alike / 2, bad, stable_bad + alike / 2, stable_bad),)
    return _rate_verdict(
        "schema",
        tallies,
        margin=policy.schema_margin,
        limits=limits,
        said=(
            f"of {compared:,} pairs {bad:,} satisfy the schema with stable's answer alone, and "
            f"{stable_bad:,} with the candidate's alone"
        ),
        units=compared,
        counted="pairs",
        scale=0.5,
        details={},
    )


def _rate_verdict(
    gate: str,
    tallies: tuple[Tally, ...],
    *,
    margin: float,
    limits: Thresholds,
    said: str,
    units: int,
    counted: str,
    scale: float,
    details: Mapping[str, float],
    centre: float = 0.0,
) -> Verdict:
    """`scale` is what one unit's difference counts for in what is said."""
    sides = Sides(
        worse=evidence_of(log_evidence_worse(tallies, centre)),
        not_worse=evidence_of(log_evidence_not_worse(tallies, centre, margin / scale)),
        limits=limits,
    )
    seen = difference(tallies)
    low, high = difference_bounds(tallies, centre, limits.fail, limits.passing)
    low, high = max(-1.0, low * scale), min(1.0, high * scale)
    nothing = "no pair was compared" if counted == "pairs" else f"no {counted} in the canary"
    verdict = Verdict(
        gate=gate,
        outcome=sides.outcome(),
        value=sides.value,
        threshold=sides.threshold,
        units=units,
        reason=f"nothing to judge by yet: {nothing}",
        values=sides.values,
        counted=counted,
        estimate=None if seen is None else seen * scale,
        low=low,
        high=high,
        limit=margin,
        details=details,
    )
    if units == 0:
        return verdict
    said = (
        f"{said}; {points(low)} to {points(high)} points more, less than {points(margin)} is "
        f"needed; {sides.said}"
    )
    headline = HEADLINES[verdict.outcome]
    if verdict.outcome != "inconclusive":
        return replace(verdict, reason=f"{headline}: {said}")
    needed = _rate_needed(tallies, centre, margin / scale, limits)
    reason = f"{headline}: {said}; {forecast(needed, counted)}"
    return replace(verdict, needed=needed, reason=reason)


def _rated_alike(verdict: Verdict, tallies: Sequence[Tally], policy: Policy) -> Verdict:
    """The share of bad ratings is compared only while both arms are rated equally often.

    Else the ratings are those of other people in one arm than in the other. It does not shield a
    candidate that fails: its units give more bad ratings, however many rate.
    """
    uneven = evidence_of(
        sum(log_evidence_split(int(t.candidate), int(t.stable), t.weight) for t in tallies)
    )
    if verdict.outcome != "pass" or uneven < 1.0 / policy.split_alpha:
        return verdict
    return replace(
        verdict,
        outcome="inconclusive",
        reason=f"the two arms are not rated equally often, so ratings can't tell: {verdict.reason}",
    )


def _rate_needed(
    tallies: tuple[Tally, ...], centre: float, margin: float, limits: Thresholds
) -> int | None:
    """How many more units, of both arms, a decision takes at the present rates and split."""
    expected = _expected_unit(tallies)
    failing = worse_needed(tallies, expected, centre, limits.fail)
    passing = not_worse_needed(tallies, expected, centre, margin, limits.passing)
    return min((each for each in (failing, passing) if each is not None), default=None)


def _expected_unit(tallies: Sequence[Tally]) -> Tally:
    """One more unit at the last weight, if both arms go on as so far."""
    candidate, stable = sum(t.candidate for t in tallies), sum(t.stable for t in tallies)
    bad, stable_bad = sum(t.candidate_bad for t in tallies), sum(t.stable_bad for t in tallies)
    # An arm without units is taken to be like the other one.
    rate = (bad / candidate) if candidate else stable_bad / stable
    stable_rate = (stable_bad / stable) if stable else rate
    weight = max(tally.weight for tally in tallies)
    return Tally(weight, weight, weight * rate, 1.0 - weight, (1.0 - weight) * stable_rate)
