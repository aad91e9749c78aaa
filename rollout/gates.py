"""Gates: rules on evidence that pass, fail, or are inconclusive, with a reason a person can read.

How alpha is spent. Each gate runs an e-process for each of its two sides, so looking often costs
nothing. A rollout is rolled back where *any* gate fails: a false alarm of one is a false alarm of
all, and so each gate fails only at E >= gates/alpha (the union bound). It passes only where *all*
gates pass: a candidate that is worse in some respect must deceive that very gate, so each gate
passes at E >= 1/alpha, without division (an intersection-union test: Berger 1982). Both the chance
of a false alarm and that of a false pass are then at most alpha, at whatever moment one looks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rollout.evidence import Evidence, PairCounts, Report, Verdict
from rollout.policy import Policy
from rollout.statistics import (
    evidence_above,
    evidence_below,
    pairs_needed_above,
    pairs_needed_below,
)

GateOutcome = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The e-values at which a gate fails and passes."""

    fail: float
    passing: float

    def of(self, side: str) -> float:
        """The one that the e-value of this side has to reach."""
        return self.fail if side == "worse" else self.passing


def judge(evidence: Evidence, report: Report | None, policy: Policy) -> tuple[Verdict, ...]:
    """What each gate says of the trial, in the order of `GATES`."""
    limits = thresholds(policy)
    return tuple(gate(evidence, report, policy, limits) for gate in GATES)


def thresholds(policy: Policy) -> Thresholds:
    return Thresholds(fail=len(GATES) / policy.alpha, passing=1.0 / policy.alpha)


def combine(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict for all gates: any fail fails, all passing pass, else inconclusive.

    It carries the numbers of the first gate that decided, and the reasons of all that did.
    """
    if not verdicts:
        raise ValueError("there is no verdict to combine: a trial is judged by at least one gate")
    outcomes = {verdict.outcome for verdict in verdicts}
    outcome: GateOutcome = "fail" if "fail" in outcomes else "inconclusive"
    if outcomes == {"pass"}:
        outcome = "pass"
    deciding = [verdict for verdict in verdicts if verdict.outcome == outcome]
    if len(deciding) == 1:
        return deciding[0]
    needed = [verdict.needed for verdict in deciding if verdict.needed is not None]
    return replace(
        deciding[0],
        gate=" and ".join(verdict.gate for verdict in deciding),
        reason="; ".join(verdict.reason for verdict in deciding),
        needed=max(needed) if len(needed) == len(deciding) else None,
    )


def judge_pairs(
    evidence: Evidence,
    _report: Report | None,
    policy: Policy,
    limits: Thresholds,
) -> Verdict:
    """Did the candidate win fewer of the decided pairs than stable, or at least enough of them?

    Only pairs that one side won count: ties say nothing about who is better. It fails on evidence
    against "wins at least half", and passes on evidence against "wins at most half less the
    margin", once `minimum_pairs` are decided. Where both hold, it fails.
    """
    pairs = evidence.pairs
    lowest = 0.5 - policy.margin
    worse = evidence_below(pairs.wins, pairs.losses, 0.5)
    not_worse = evidence_above(pairs.wins, pairs.losses, lowest)
    decided = pairs.wins + pairs.losses + pairs.ties

    def verdict(outcome: GateOutcome, side: str, reason: str, needed: int | None = None) -> Verdict:
        return Verdict(
            gate="pairs",
            outcome=outcome,
            value=worse if side == "worse" else not_worse,
            threshold=limits.of(side),
            units=decided,
            reason=reason,
            needed=needed,
            values={"worse": worse, "not_worse": not_worse},
        )

    if worse >= limits.fail:
        return verdict(
            "fail",
            "worse",
            f"worse than stable: {_tally(pairs)}; the e-value for “worse” is {_number(worse)}, and "
            f"{_number(limits.fail)} is enough",
        )
    if not_worse >= limits.passing and decided >= policy.minimum_pairs:
        return verdict(
            "pass",
            "not_worse",
            f"not worse than stable: {_tally(pairs)}; the e-value for “wins more than "
            f"{lowest:.0%}” is {_number(not_worse)}, and {_number(limits.passing)} is enough",
        )
    nearer = "worse" if worse / limits.fail > not_worse / limits.passing else "not_worse"
    if decided == 0:
        return verdict("inconclusive", nearer, f"nothing to judge by yet: {_undecided(pairs)}")
    needed = _needed(pairs, policy, limits)
    return verdict(
        "inconclusive",
        nearer,
        f"too early to tell: {_tally(pairs)}; the e-value for “worse” is {_number(worse)} of "
        f"{_number(limits.fail)}, for “wins more than {lowest:.0%}” {_number(not_worse)} of "
        f"{_number(limits.passing)}; {_forecast(needed, decided, policy)}",
        needed,
    )


Gate = Callable[[Evidence, Report | None, Policy, Thresholds], Verdict]
GATES: tuple[Gate, ...] = (judge_pairs,)


def _needed(pairs: PairCounts, policy: Policy, limits: Thresholds) -> int | None:
    """How many more decided pairs, ties included, a decision takes at the present rates."""
    discordant = pairs.wins + pairs.losses
    decided = discordant + pairs.ties
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


def _tally(pairs: PairCounts) -> str:
    decided = pairs.wins + pairs.losses + pairs.ties
    return (
        f"it won {pairs.wins} and lost {pairs.losses} of {decided} decided pairs "
        f"({pairs.ties} tied, {pairs.total} compared)"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e9 else f"{value:.3g}"


def _undecided(pairs: PairCounts) -> str:
    if pairs.total == 0:
        return "no pair was compared"
    return (
        f"{pairs.total} pairs were compared ({pairs.agree} agree, {pairs.disagree} disagree, "
        f"{pairs.failed} failed) and none is decided; cases wait for labels"
    )


def _forecast(needed: int | None, decided: int, policy: Policy) -> str:
    if needed is not None:
        return f"about {needed} more decided pairs at the present rate"
    if decided < policy.minimum_pairs:
        return f"{policy.minimum_pairs - decided} more decided pairs at least"
    return "at the present rate it does not get there"
