"""All gates of a trial together: what each says, and one verdict for them."""

from collections.abc import Sequence
from dataclasses import replace

from rollout.evidence import Evidence, Verdict
from rollout.gates.pairs import judge_pairs
from rollout.gates.rates import RATES, judge_rate, judge_schema
from rollout.gates.sides import Thresholds
from rollout.gates.split import SPLIT, judge_split
from rollout.plans import GATES
from rollout.policy import Policy


def judge(evidence: Evidence, policy: Policy, asked: Sequence[str] = GATES) -> tuple[Verdict, ...]:
    """What each of the gates that are asked for says of the trial, and the split check.

    Ask for what can judge on the route (`policy.servable_gates`): a limit that is not configured
    is never broken, and a gate on it would pass.
    """
    limits = thresholds(policy, asked)
    split = judge_split(evidence, policy)
    verdicts = tuple(
        _judge_gate(gate, evidence, policy, limits[gate]) for gate in GATES if gate in asked
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


def _judge_gate(gate: str, evidence: Evidence, policy: Policy, limits: Thresholds) -> Verdict:
    if gate in RATES:
        return judge_rate(gate, evidence, policy, limits)
    of_pairs = {"pairs": judge_pairs, "schema": judge_schema}
    return of_pairs[gate](evidence, policy, limits)


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
