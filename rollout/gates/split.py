"""The split check: have the arms got the units that the weights promise them?"""

from dataclasses import replace
from typing import Final

from rollout.evidence import Evidence, Verdict
from rollout.gates.wording import number
from rollout.policy import Policy
from rollout.statistics import evidence_of, log_evidence_split

SPLIT: Final = "split"


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
        f"{promised:,.0f}; the e-value for “another split” is {number(value)} of "
        f"{number(threshold)}"
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
