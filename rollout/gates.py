"""Gates: rules on evidence that pass, fail, or are inconclusive, with a reason a person can read.

How alpha is spent. Each gate runs an e-process for each of its two sides, so looking often costs
nothing. Let N_g be "the candidate is no worse than stable in what gate g looks at", and M_g "it is
worse there by the margin or more".

- A trial is rolled back where *any* gate fails, and gate g fails at E_g >= 1/alpha_g with E_g
  against N_g and the alpha_g summing to alpha, over the gates that the route asks for, in parts that
  the policy may set. By Ville's inequality gate g ever fails with a chance of at most alpha_g if
  N_g is true. So all gates together ever fail a candidate that is nowhere worse with a chance of at
  most alpha (the union bound, whatever the gates have to do with each other); and whatever is
  worse, the gates that see nothing of it raise false alarms with a chance of at most alpha.
- A step is left only where *all* the gates that its plan names pass, and gate g passes at
  E'_g >= 1/alpha with E'_g against M_g, undivided: if some M_g is true, then leaving takes that
  E'_g >= 1/alpha, which ever happens with a chance of at most alpha (an intersection-union test:
  Berger 1982). The evidence is that of the whole trial, so this holds for all steps together.
- Where both sides are reached, a gate fails: it is sure that the candidate is worse, by less than
  the margin.
- The split check has an alpha of its own. It neither fails a trial nor passes it: it says that
  counts of the two arms can't be compared, so all other gates are inconclusive and a person is
  asked.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from rollout.evidence import Evidence, PairCounts, Report, UnitCounts, Verdict
from rollout.plans import GATES
from rollout.policy import Policy
from rollout.statistics import (
    Tally,
    difference,
    difference_bounds,
    evidence_above,
    evidence_below,
    evidence_of,
    log_evidence_not_worse,
    log_evidence_split,
    log_evidence_worse,
    not_worse_needed,
    pairs_needed_above,
    pairs_needed_below,
    share_bounds,
    win_bounds,
    worse_needed,
)

GateOutcome = Literal["pass", "fail", "inconclusive"]
SPLIT: Final = "split"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The e-values at which a gate fails and passes."""

    fail: float
    passing: float

    def of(self, side: str) -> float:
        """The one that the e-value of this side has to reach."""
        return self.passing if side == "not_worse" else self.fail


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


# Round numbers of pairs, for a forecast that is no more exact than they are.
_FORECASTS: Final = (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000)

RATES: Final[Mapping[str, RateGate]] = {
    "errors": RateGate(
        counted="units",
        became="failed",
        units=lambda arm: arm.units,
        bad=lambda arm: arm.errors,
        margin=lambda policy: policy.error_margin,
        centre=0.02,
    ),
    "ttft": RateGate(
        counted="units",
        became="waited too long for the first token",
        units=lambda arm: arm.units,
        bad=lambda arm: arm.slow_first_token,
        margin=lambda policy: policy.slo_margin,
        centre=0.05,
    ),
    "total": RateGate(
        counted="units",
        became="took too long",
        units=lambda arm: arm.units,
        bad=lambda arm: arm.slow_total,
        margin=lambda policy: policy.slo_margin,
        centre=0.05,
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


def judge(
    evidence: Evidence, report: Report | None, policy: Policy, asked: Sequence[str] = GATES
) -> tuple[Verdict, ...]:
    """What each of the gates that are asked for says of the trial, and the split check.

    Ask for what can judge on the route (`policy.servable_gates`): a limit that is not configured
    is never broken, and a gate on it would pass.
    """
    limits = thresholds(policy, asked)
    split = judge_split(evidence, policy)
    verdicts = tuple(
        _judge_gate(gate, evidence, report, policy, limits[gate]) for gate in GATES if gate in asked
    )
    if split.outcome == "fail":
        verdicts = tuple(_set_aside(verdict) for verdict in verdicts)
    return (*verdicts, split)


def thresholds(policy: Policy, asked: Sequence[str] = GATES) -> dict[str, Thresholds]:
    """Of each gate that is asked for, alpha divided among them, and of the split check."""
    shares = {gate: policy.alpha_shares.get(gate, 1.0) for gate in GATES if gate in asked}
    whole = sum(shares.values())
    passing = 1.0 / policy.alpha
    limits = {gate: Thresholds(passing * whole / share, passing) for gate, share in shares.items()}
    limits[SPLIT] = Thresholds(1.0 / policy.split_alpha, passing)
    return limits


def combine(verdicts: Sequence[Verdict], required: Sequence[str] | None = None) -> Verdict:
    """One verdict for all gates. `required` are those that must pass; None is all there are.

    Where the split check failed, it is inconclusive and to be held. Else any fail fails, whether it
    is of a required gate or not; all required passing pass; anything else is inconclusive. It
    carries the numbers of the first gate that decided, and the reasons of all that did.
    """
    if not verdicts:
        raise ValueError("there is no verdict to combine: a trial is judged by at least one gate")
    broken = next((v for v in verdicts if v.gate == SPLIT and v.outcome == "fail"), None)
    if broken is not None:
        return replace(broken, outcome="inconclusive", hold=True)
    failed = [verdict for verdict in verdicts if verdict.outcome == "fail"]
    if failed:
        return _joined(failed)
    by_gate = {verdict.gate: verdict for verdict in verdicts}
    if required is None:
        required = [gate for gate in by_gate if gate != SPLIT]
    missing = [gate for gate in required if gate not in by_gate]
    if missing:
        reason = f"{' and '.join(missing)} did not judge: the route does not ask for it"
        return Verdict(" and ".join(missing), "inconclusive", 0.0, 0.0, 0, reason)
    if not required:
        return Verdict("none", "pass", 0.0, 0.0, 0, "no gate has to pass here, and none fails")
    asked = [by_gate[gate] for gate in required]
    return _joined([v for v in asked if v.outcome == "inconclusive"] or asked)


def in_short(verdict: Verdict) -> str:
    """What the gate measures, between which bounds, what it has to be; units; what is to come.

    The reason, where nothing was measured yet.
    """
    if verdict.units == 0 and verdict.threshold > 0.0 and verdict.value <= 1.0:
        return verdict.reason
    more = "" if verdict.needed is None else f", about {verdict.needed:,} more needed"
    return f"{_measured(verdict)}; {verdict.units:,} {verdict.counted}{more}"


def _measured(verdict: Verdict) -> str:
    low, high, limit = verdict.low, verdict.high, verdict.limit
    if verdict.estimate is None or low is None or high is None or limit is None:
        return f"e-value {_number(verdict.value)} of {_number(verdict.threshold)}"
    if verdict.gate == "pairs":
        return (
            f"wins {_percent(verdict.estimate)} ({_percent(low)} to {_percent(high)}); passes "
            f"above {_percent(limit)}, fails below 50 %"
        )
    return (
        f"{100 * verdict.estimate:+.3g} points ({100 * low:+.3g} to {100 * high:+.3g}); passes "
        f"below {100 * limit:+.3g}, fails above 0"
    )


def judge_pairs(
    evidence: Evidence, _report: Report | None, policy: Policy, limits: Thresholds
) -> Verdict:
    """Did the candidate win fewer of the decided pairs than stable, or at least enough of them?

    Only pairs that one side won count: ties say nothing about who is better. It fails on evidence
    against "wins at least half", and passes on evidence against "wins at most half less the
    margin", once `minimum_pairs` are decided. Where both hold, it fails.

    A candidate that answers as stable does has hardly any decided pairs. It passes where it surely
    answers otherwise in fewer than `disagreement_margin` of the pairs: whoever wins those, no more
    answers than that can have become worse. This second way to pass wrongly has a tenth of alpha.
    """
    pairs = evidence.pairs
    lowest = 0.5 - policy.margin
    discordant, decided = pairs.wins + pairs.losses, _decided(pairs)
    low, high = win_bounds(pairs.wins, pairs.losses, limits.fail, limits.passing)
    sides = Sides(
        worse=evidence_below(pairs.wins, pairs.losses, 0.5),
        not_worse=evidence_above(pairs.wins, pairs.losses, lowest),
        limits=limits,
    )
    verdict = Verdict(
        gate="pairs",
        outcome=sides.outcome(enough=decided >= policy.minimum_pairs),
        value=sides.value,
        threshold=sides.threshold,
        units=decided,
        reason="",
        values=sides.values,
        counted="decided pairs",
        estimate=pairs.wins / discordant if discordant else None,
        low=low,
        high=high,
        limit=lowest,
        details=_disagreement(evidence, policy.alpha),
    )
    floor = _above_floor(verdict.details)
    if verdict.outcome == "inconclusive" and _answers_alike(pairs, policy):
        return replace(verdict, outcome="pass", reason=f"{_alike(pairs, policy)}{floor}")
    if decided == 0:
        reason = f"nothing to judge by yet: {_undecided(pairs)}{_alike_forecast(pairs, policy)}"
        return replace(verdict, reason=f"{reason}{floor}")
    bounds = f"it wins {_percent(low)} to {_percent(high)} of those that are not tied"
    said = f"{_tally(pairs)}; {bounds}, more than {_percent(lowest)} is needed; {sides.said}"
    if verdict.outcome != "inconclusive":
        return replace(verdict, reason=f"{_HEADLINES[verdict.outcome]}: {said}{floor}")
    needed = _pairs_needed(pairs, policy, limits)
    forecast = _pairs_forecast(needed, decided, policy)
    reason = f"too early to tell: {said}; {forecast}{floor}"
    return replace(verdict, needed=needed, reason=reason)


def judge_schema(
    evidence: Evidence, _report: Report | None, policy: Policy, limits: Thresholds
) -> Verdict:
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


def judge_rate(
    gate: str, evidence: Evidence, _report: Report | None, policy: Policy, limits: Thresholds
) -> Verdict:
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
            f"({_share(bad, units)}), and {others_bad:,.0f} of stable's {others:,.0f} "
            f"({_share(others_bad, others)})"
        ),
        units=round(units + others),
        counted=rule.counted,
        scale=1.0,
        details=details,
        centre=rule.centre,
    )
    return _rated_alike(verdict, tallies, policy) if gate == "feedback" else verdict


def judge_split(evidence: Evidence, policy: Policy) -> Verdict:
    """Have the arms got the units that the weights promise them?"""
    threshold = 1.0 / policy.split_alpha
    strata = [stratum for stratum in evidence.strata if 0.0 < stratum.weight < 100.0]
    candidate = sum(stratum.candidate.units for stratum in strata)
    units = candidate + sum(stratum.stable.units for stratum in strata)
    stray = [s for s in evidence.strata if s.weight <= 0.0 and s.candidate.units]
    value = evidence_of(
        sum(log_evidence_split(s.candidate.units, s.stable.units, s.weight / 100.0) for s in strata)
    )
    promised = sum(s.weight / 100.0 * (s.candidate.units + s.stable.units) for s in strata)
    verdict = Verdict(
        gate=SPLIT,
        outcome="inconclusive",
        value=value,
        threshold=threshold,
        units=units,
        reason="no unit was assigned in a canary yet",
        values={SPLIT: value},
        details={"promised": promised, "candidate": float(candidate)},
    )
    if units == 0 and not stray:
        return verdict
    said = (
        f"the candidate got {candidate:,} of {units:,} units, and the weights promise it "
        f"{promised:,.0f}; the e-value for “another split” is {_number(value)} of "
        f"{_number(threshold)}"
    )
    if value >= threshold:
        return replace(
            verdict,
            outcome="fail",
            hold=True,
            reason=(
                f"the split is broken: {said}. Units are lost or moved on the way, so the arms "
                "can't be compared; find out where before you go on"
            ),
        )
    return replace(verdict, outcome="pass", reason=f"the split is as it should be: {said}")


@dataclass(frozen=True, slots=True)
class Sides:
    """The two e-values of a gate, and what they have to reach."""

    worse: float
    not_worse: float
    limits: Thresholds

    def outcome(self, *, enough: bool = True) -> GateOutcome:
        if self.worse >= self.limits.fail:
            return "fail"
        return "pass" if enough and self.not_worse >= self.limits.passing else "inconclusive"

    @property
    def nearer(self) -> str:
        """The side that decided, or stands nearer to its threshold."""
        outcome = self.outcome()
        if outcome != "inconclusive":
            return "worse" if outcome == "fail" else "not_worse"
        fails = self.worse / self.limits.fail > self.not_worse / self.limits.passing
        return "worse" if fails else "not_worse"

    @property
    def value(self) -> float:
        return self.values[self.nearer]

    @property
    def threshold(self) -> float:
        return self.limits.of(self.nearer)

    @property
    def values(self) -> dict[str, float]:
        return {"worse": self.worse, "not_worse": self.not_worse}

    @property
    def said(self) -> str:
        return (
            f"e-value for “worse” {_number(self.worse)} of {_number(self.limits.fail)}, for “not "
            f"worse” {_number(self.not_worse)} of {_number(self.limits.passing)}"
        )


_HEADLINES: Final[Mapping[GateOutcome, str]] = {
    "fail": "worse than stable",
    "pass": "not worse than stable",
    "inconclusive": "too early to tell",
}


def _judge_gate(
    gate: str, evidence: Evidence, report: Report | None, policy: Policy, limits: Thresholds
) -> Verdict:
    if gate in RATES:
        return judge_rate(gate, evidence, report, policy, limits)
    of_pairs = {"pairs": judge_pairs, "schema": judge_schema}
    return of_pairs[gate](evidence, report, policy, limits)


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
    verdict = Verdict(
        gate=gate,
        outcome=sides.outcome(),
        value=sides.value,
        threshold=sides.threshold,
        units=units,
        reason=f"nothing to judge by yet: no {counted} in the canary",
        values=sides.values,
        counted=counted,
        estimate=None if seen is None else seen * scale,
        low=low,
        high=high,
        limit=margin,
        details=details,
    )
    if units == 0:
        reason = "nothing to judge by yet: no pair was compared"
        return replace(verdict, reason=reason) if counted == "pairs" else verdict
    said = (
        f"{said}; {_points(low)} to {_points(high)} points more, less than {_points(margin)} is "
        f"needed; {sides.said}"
    )
    headline = _HEADLINES[verdict.outcome]
    if verdict.outcome != "inconclusive":
        return replace(verdict, reason=f"{headline}: {said}")
    needed = _rate_needed(tallies, centre, margin / scale, limits)
    forecast = _forecast(needed, counted)
    return replace(verdict, needed=needed, reason=f"{headline}: {said}; {forecast}")


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


def _joined(deciding: Sequence[Verdict]) -> Verdict:
    if len(deciding) == 1:
        return deciding[0]
    needed = [verdict.needed for verdict in deciding if verdict.needed is not None]
    return replace(
        deciding[0],
        gate=" and ".join(verdict.gate for verdict in deciding),
        reason="; ".join(f"{verdict.gate}: {verdict.reason}" for verdict in deciding),
        needed=max(needed) if len(needed) == len(deciding) else None,
    )


def _set_aside(verdict: Verdict) -> Verdict:
    return replace(
        verdict,
        outcome="inconclusive",
        needed=None,
        reason=f"set aside while the split is broken: {verdict.reason}",
    )


def _disagreement(evidence: Evidence, alpha: float) -> dict[str, float]:
    """How often the candidate disagrees with stable, less how often stable does with itself.

    Either share has a confidence sequence at alpha/2, so their difference has one at alpha.
    """
    theirs = evidence.pairs.agree + evidence.pairs.disagree
    own = evidence.floor.agree + evidence.floor.disagree
    if theirs == 0:
        return {}
    details = {"disagreement": evidence.pairs.disagree / theirs}
    if own == 0:
        return details
    low, high = share_bounds(evidence.pairs.disagree, theirs, alpha / 2.0)
    floor_low, floor_high = share_bounds(evidence.floor.disagree, own, alpha / 2.0)
    floor = evidence.floor.disagree / own
    return {
        **details,
        "floor": floor,
        "excess": details["disagreement"] - floor,
        "excess_low": low - floor_high,
        "excess_high": high - floor_low,
    }


def _above_floor(details: Mapping[str, float]) -> str:
    if "floor" not in details:
        return ""
    return (
        f"; it disagrees with stable in {_percent(details['disagreement'])} of the pairs, stable "
        f"with itself in {_percent(details['floor'])}: {_points(details['excess'])} points more "
        f"({_points(details['excess_low'])} to {_points(details['excess_high'])})"
    )


def _pairs_needed(pairs: PairCounts, policy: Policy, limits: Thresholds) -> int | None:
    """How many more decided pairs, ties included, a decision takes at the present rates."""
    discordant, decided = pairs.wins + pairs.losses, _decided(pairs)
    failing = pairs_needed_below(pairs.wins, pairs.losses, 0.5, limits.fail)
    passing = pairs_needed_above(pairs.wins, pairs.losses, 0.5 - policy.margin, limits.passing)
    forecasts = []
    if failing is not None:
        forecasts.append(_with_ties(failing, decided, discordant))
    if passing is not None:
        more = _with_ties(passing, decided, discordant)
        forecasts.append(max(more, policy.minimum_pairs - decided))
    return min(forecasts, default=None)


def _with_ties(discordant_needed: int, decided: int, discordant: int) -> int:
    if discordant_needed == 0:
        return 0
    return -(-discordant_needed * decided // discordant)


def _decided(pairs: PairCounts) -> int:
    return pairs.wins + pairs.losses + pairs.ties


def _tally(pairs: PairCounts) -> str:
    return (
        f"it won {pairs.wins:,} and lost {pairs.losses:,} of {_decided(pairs):,} decided pairs "
        f"({pairs.ties:,} tied, {pairs.total:,} compared)"
    )


def _answers_alike(pairs: PairCounts, policy: Policy) -> bool:
    return _most_otherwise(pairs, policy) < policy.disagreement_margin


def _most_otherwise(pairs: PairCounts, policy: Policy) -> float:
    """The upper bound on the share of pairs in which the candidate does not answer as stable."""
    return share_bounds(pairs.total - pairs.agree, pairs.total, policy.alpha / 10.0)[1]


def _alike_forecast(pairs: PairCounts, policy: Policy) -> str:
    """How many more pairs show that it answers as stable does, if it goes on like this."""
    otherwise = pairs.total - pairs.agree
    for more in _FORECASTS:
        share = (pairs.total + more) / pairs.total if pairs.total else 0.0
        ahead = PairCounts(disagree=round(otherwise * share))
        ahead = replace(ahead, agree=pairs.total + more - ahead.disagree)
        if share and _answers_alike(ahead, policy):
            return f"; some {more:,} more pairs like these show that it answers as stable does"
    return ""


def _alike(pairs: PairCounts, policy: Policy) -> str:
    most = _percent(_most_otherwise(pairs, policy))
    return (
        f"it answers as stable does: {pairs.agree:,} of {pairs.total:,} pairs agree, so surely fewer "
        f"than {most} differ, and {_percent(policy.disagreement_margin)} may; {_tally(pairs)}"
    )


def _undecided(pairs: PairCounts) -> str:
    if pairs.total == 0:
        return "no pair was compared"
    waits = "cases wait for labels" if pairs.disagree else "where they agree nobody wins"
    return (
        f"{pairs.total:,} pairs were compared ({pairs.agree:,} agree, {pairs.disagree:,} disagree, "
        f"{pairs.failed:,} failed) and none is decided; {waits}"
    )


def _pairs_forecast(needed: int | None, decided: int, policy: Policy) -> str:
    if needed is None and decided < policy.minimum_pairs:
        return f"{policy.minimum_pairs - decided} more decided pairs at least"
    return _forecast(needed, "decided pairs")


def _forecast(needed: int | None, counted: str) -> str:
    if needed is None:
        return "at the present rate it does not get there"
    return f"about {needed:,} more {counted} at the present rate"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e9 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100.0 * share:.3g} %"


def _points(difference: float) -> str:
    return f"{100.0 * difference:.3g}"


def _share(bad: float, units: float) -> str:
    return _percent(bad / units) if units else "none"
