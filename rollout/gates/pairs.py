"""The gate on pairs: who was right where the two versions answered the same request otherwise."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from rollout.evidence import Evidence, PairCounts, Verdict
from rollout.gates.sides import HEADLINES, Sides, Thresholds
from rollout.gates.wording import forecast, percent, points
from rollout.policy import Policy
from rollout.statistics import (
    evidence_above,
    evidence_below,
    pairs_needed_above,
    pairs_needed_below,
    share_bounds,
    win_bounds,
)

# Round numbers of pairs, for a forecast that is no more exact than they are.
_FORECASTS: Final = (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000)


def judge_pairs(evidence: Evidence, policy: Policy, limits: Thresholds) -> Verdict:
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
    found = Verdict(
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
    bounds = f"it wins {percent(low)} to {percent(high)} of those that are not tied"
    said = f"{_tally(pairs)}; {bounds}, more than {percent(lowest)} is needed; {sides.said}"
    verdict = _explained(found, pairs, policy, limits, said)
    return replace(verdict, reason=f"{verdict.reason}{_above_floor(verdict.details)}")


def _explained(
    verdict: Verdict, pairs: PairCounts, policy: Policy, limits: Thresholds, said: str
) -> Verdict:
    if verdict.outcome == "inconclusive" and _answers_alike(pairs, policy):
        return replace(verdict, outcome="pass", reason=_alike(pairs, policy))
    if verdict.units == 0:
        more = _alike_forecast(pairs, policy)
        return replace(verdict, reason=f"nothing to judge by yet: {_undecided(pairs)}{more}")
    headline = HEADLINES[verdict.outcome]
    if verdict.outcome != "inconclusive":
        return replace(verdict, reason=f"{headline}: {said}")
    needed = _pairs_needed(pairs, policy, limits)
    reason = f"{headline}: {said}; {_pairs_forecast(needed, verdict.units, policy)}"
    return replace(verdict, needed=needed, reason=reason)


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
        f"; it disagrees with stable in {percent(details['disagreement'])} of the pairs, stable "
        f"with itself in {percent(details['floor'])}: {points(details['excess'])} points more "
        f"({points(details['excess_low'])} to {points(details['excess_high'])})"
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
    most = percent(_most_otherwise(pairs, policy))
    return (
        f"it answers as stable does: {pairs.agree:,} of {pairs.total:,} pairs agree, so surely fewer "
        f"than {most} differ, and {percent(policy.disagreement_margin)} may; {_tally(pairs)}"
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
    return forecast(needed, "decided pairs")
