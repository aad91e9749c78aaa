"""The gate before a proposal: a report and a route's rules in, a verdict on each demand out."""

from collections.abc import Sequence
from typing import Final, Literal

from rollout.evaluation import EvaluationRules
from rollout.evidence import Report, Score, Slice, Verdict
from rollout.intervals import rows_to_be_better, rows_to_be_not_worse

Outcome = Literal["pass", "fail", "inconclusive"]

_WORST_FIRST: Final[Sequence[Outcome]] = ("fail", "inconclusive", "pass")


def accept(report: Report, rules: EvaluationRules) -> tuple[Verdict, ...]:
    """A verdict on every demand that the rules make. `overall` says what they come to."""
    ours, parents = report.scores[0], report.scores[1]
    verdicts = [_better(report, ours, parents, rules)]
    slices = {each.tag: each for each in report.slices}
    guarded = tuple(slices) if "*" in rules.guarded else rules.guarded
    verdicts += [_not_worse(tag, slices.get(tag), rules) for tag in guarded]
    if rules.latency_ratio is not None:
        verdicts.append(_latency(ours, parents, rules.latency_ratio))
    if rules.p99_seconds is not None:
        verdicts.append(_p99(ours, rules.p99_seconds))
    if rules.cost_ratio is not None:
        verdicts.append(_cost(ours, parents, rules.cost_ratio))
    return tuple(verdicts)


def overall(verdicts: Sequence[Verdict]) -> Outcome:
    """All must pass; one that fails decides, whatever is still open."""
    outcomes = {verdict.outcome for verdict in verdicts}
    return next((each for each in _WORST_FIRST if each in outcomes), "inconclusive")


def because(verdicts: Sequence[Verdict]) -> str:
    """Why it came out as it did, for people: the demands that decided."""
    outcome = overall(verdicts)
    if outcome == "pass":
        # What passed is a long list, and stands in the report.
        others = ", ".join(verdict.gate for verdict in verdicts[1:])
        return verdicts[0].reason + (f"; also passed: {others}" if others else "")
    return "; ".join(verdict.reason for verdict in verdicts if verdict.outcome == outcome)


def _better(report: Report, ours: Score, parents: Score, rules: EvaluationRules) -> Verdict:
    gain = ours.mean - parents.mean
    outcome: Outcome = "inconclusive"
    if report.p_value < rules.alpha:
        outcome = "pass" if gain > 0 else "fail" if gain < 0 else "inconclusive"
    said = {
        "pass": f"{ours.version} is better than {parents.version}",
        "fail": f"{ours.version} is worse than {parents.version}",
        "inconclusive": f"no difference from {parents.version} is shown",
    }[outcome]
    needed = None
    if outcome == "inconclusive":
        needed = rows_to_be_better(report.gained, report.lost, ours.total, rules.alpha)
        if gain <= 0:
            needed = None
    reason = (
        f"{said}: {ours.mean:.1%} against {parents.mean:.1%} on {ours.total} rows, "
        f"{report.gained} gained, {report.lost} lost, p = {report.p_value:.2g} "
        f"(below {rules.alpha:g} decides)"
    )
    if outcome == "inconclusive":
        reason += (
            f"; at these rates it takes about {needed:,} rows"
            if needed
            else "; more rows would not help, it is not ahead"
        )
    return Verdict(
        gate="better",
        outcome=outcome,
        value=report.p_value,
        threshold=rules.alpha,
        units=ours.total,
        reason=reason,
        needed=None if needed is None else needed - ours.total,
        counted="rows",
        estimate=gain,
        low=report.low,
        high=report.high,
        limit=0.0,
    )


def _not_worse(tag: str, found: Slice | None, rules: EvaluationRules) -> Verdict:
    gate, limit = f"slice {tag}", -rules.margin
    if found is None:
        reason = f"no row of the suite has the tag {tag!r}, which the route guards: add some"
        return Verdict(
            gate, "inconclusive", 1.0, rules.alpha, 0, reason, counted="rows", limit=limit
        )
    difference = found.score - found.parent_score
    needed = None
    outcome: Outcome = "inconclusive"
    if difference < limit and found.adjusted_p < rules.alpha:
        outcome = "fail"
    elif found.low > limit:
        outcome = "pass"
    else:
        needed = rows_to_be_not_worse(
            difference, found.variance, found.rows, rules.margin, rules.alpha
        )
    said = {
        "pass": f"not worse than the margin on {tag}",
        "fail": f"worse than the margin on {tag}",
        "inconclusive": f"it is open whether {tag} is worse than the margin",
    }[outcome]
    reason = (
        f"{said}: {found.score:.1%} against {found.parent_score:.1%} on {found.rows} rows, "
        f"difference {difference:+.1%} ({found.low:+.1%} to {found.high:+.1%}, must stay above "
        f"{limit:+.1%})"
    )
    if outcome == "inconclusive":
        reason += f"; it takes about {needed:,} rows" if needed else "; more rows would not help"
    return Verdict(
        gate=gate,
        outcome=outcome,
        value=found.adjusted_p,
        threshold=rules.alpha,
        units=found.rows,
        reason=reason,
        needed=None if needed is None else needed - found.rows,
        counted="rows",
        estimate=difference,
        low=found.low,
        high=found.high,
        limit=limit,
    )


def _latency(ours: Score, parents: Score, limit: float) -> Verdict:
    if not ours.p50_seconds or not parents.p50_seconds:
        return _unknown("latency", limit, ours.total, "no times were taken")
    ratio = ours.p50_seconds / parents.p50_seconds
    reason = (
        f"half of the answers took {ours.p50_seconds:.3g} s, the parent's "
        f"{parents.p50_seconds:.3g} s: {ratio:.2f} times as long, at most {limit:g} times is allowed"
    )
    return _within("latency", ratio, limit, ours.total, reason)


def _p99(ours: Score, limit: float) -> Verdict:
    if not ours.p99_seconds:
        return _unknown("p99", limit, ours.total, "no times were taken")
    reason = f"99 % of the answers took at most {ours.p99_seconds:.3g} s, {limit:g} s is allowed"
    return _within("p99", ours.p99_seconds, limit, ours.total, reason)


def _cost(ours: Score, parents: Score, limit: float) -> Verdict:
    mine, theirs = ours.cost_per_success, parents.cost_per_success
    if not mine or not theirs or ours.cost_unit != parents.cost_unit:
        return _unknown("cost", limit, ours.total, "no right answer, or no usage, to count by")
    reason = (
        f"a right answer costs {mine:.4g} {ours.cost_unit}, the parent's {theirs:.4g}: "
        f"{mine / theirs:.2f} times as much, at most {limit:g} times is allowed"
    )
    return _within("cost", mine / theirs, limit, ours.total, reason)


def _within(gate: str, value: float, limit: float, rows: int, reason: str) -> Verdict:
    outcome: Outcome = "pass" if value <= limit else "fail"
    return Verdict(
        gate, outcome, value, limit, rows, reason, counted="rows", estimate=value, limit=limit
    )


def _unknown(gate: str, limit: float, rows: int, why: str) -> Verdict:
    return Verdict(
        gate, "inconclusive", 0.0, limit, rows, f"{gate}: {why}", counted="rows", limit=limit
    )
