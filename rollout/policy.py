"""The numbers that an operator may tune for a route."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rollout.plans import GATES, Defaults, Plan, PlanSpec, Steps, make_plan, plan_problems


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits that an answer should keep, in seconds; None is no limit."""

    ttft_seconds: float | None = None
    total_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """How much evidence a decision takes, and what may happen without a person.

    alpha: chance of a false alarm, and of a false pass, at whatever moment one looks; in (0, 1).
    margin: how far below one half the candidate's share of the decided pairs may lie and still
        be called "not worse"; in (0, 0.5).
    minimum_pairs: decided pairs before the gate on pairs may pass.
    disagreement_margin: a candidate that surely answers otherwise than stable in fewer of the pairs
        than this is not worse either, whoever would win those; in (0, 1).
    error_margin, slo_margin, schema_margin, feedback_margin: how much larger the candidate's share
        of units that failed, broke a limit of the SLO, broke the schema (of pairs), or were rated
        bad (of those rated) may be and still be called "not worse"; in (0, 1).
    alpha_shares: parts of alpha by gate, relative to each other; a gate left out has 1.
    split_alpha: chance that the split check holds a trial whose split is right; in (0, 1).
    steps: the plan that a rollout follows behind the shadow: percentages, or tables that say more.
        What a step leaves out is taken from the five that follow.
    automatic: enter steps without a person. Rolling back by itself needs no leave.
    minimum_units: units that the candidate must have got at a step. No traffic, no next step.
    gates: those that must pass before a step is left; in the shadow, those that judge pairs.
    soak_seconds: the least time at each step.
    time_limit_seconds: a trial that is undecided for so long at one step is held for a person.
    disagreement_sample, agreement_sample: chance that a pair becomes a case.
    self_sample: chance that stable is asked again what it answered, which tells how often two
        answers differ by chance alone (the noise floor).
    maximum_cases: open cases kept for the route; beyond it new ones are dropped and counted.
    labels_per_case: people who label each case; where they differ, one more is asked.
    retention_days: age at which cases, labels, captures and feedback are erased; 0 keeps them.
    """

    alpha: float = 0.05
    margin: float = 0.1
    minimum_pairs: int = 20
    disagreement_margin: float = 0.05
    error_margin: float = 0.05
    slo_margin: float = 0.05
    schema_margin: float = 0.05
    feedback_margin: float = 0.15
    alpha_shares: Mapping[str, float] = field(default_factory=dict)
    split_alpha: float = 0.001
    steps: Steps = (1.0, 10.0, 50.0)
    automatic: bool = False
    minimum_units: int = 20
    gates: tuple[str, ...] = ("pairs", "errors")
    time_limit_seconds: float = 7 * 86400.0
    soak_seconds: float = 600.0
    disagreement_sample: float = 1.0
    agreement_sample: float = 0.05
    self_sample: float = 0.05
    maximum_cases: int = 10_000
    labels_per_case: int = 1
    retention_days: float = 365.0


def plan_of(policy: Policy, given: PlanSpec | None = None) -> Plan:
    """The policy's own plan, or the one given, completed by the policy."""
    return make_plan(_spec(policy) if given is None else given, _defaults(policy))


def given_plan_problems(
    given: PlanSpec, policy: Policy, servable: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """What is wrong with a plan that comes with a proposal."""
    return plan_problems(given, _defaults(policy), servable)


def servable_gates(slo: Slo, schema: str | None) -> tuple[str, ...]:
    """The gates that can judge on a route with these limits and this schema."""
    there = {"ttft": slo.ttft_seconds, "total": slo.total_seconds, "schema": schema}
    return tuple(gate for gate in GATES if there.get(gate, "") is not None)


def _spec(policy: Policy) -> PlanSpec:
    return PlanSpec(policy.steps, **asdict(_defaults(policy)))


def _defaults(policy: Policy) -> Defaults:
    return Defaults(
        automatic=policy.automatic,
        minimum_units=policy.minimum_units,
        soak_seconds=policy.soak_seconds,
        gates=policy.gates,
        time_limit_seconds=policy.time_limit_seconds,
    )


def policy_problems(policy: Policy, servable: Sequence[str] = GATES) -> Iterator[tuple[str, str]]:
    """Each field that makes no sense, and what is wrong with it.

    `servable` are the gates that can judge on the route at all.
    """
    if not 0 < policy.alpha < 1:
        yield "alpha", f"alpha is {policy.alpha:g}: it must lie between 0 and 1"
    if not 0 < policy.margin < 0.5:
        yield "margin", f"margin is {policy.margin:g}: it must lie between 0 and 0.5"
    yield from _gate_problems(policy)
    yield from plan_problems(_spec(policy), _defaults(policy), servable)
    for name in ("disagreement_sample", "agreement_sample", "self_sample"):
        if not 0 <= getattr(policy, name) <= 1:
            yield name, f"{name} is a chance: it must lie in [0, 1]"
    if not 1 <= policy.labels_per_case <= 10:
        yield (
            "labels_per_case",
            f"labels_per_case is {policy.labels_per_case}: it must lie between 1 and 10",
        )
    for name in (
        "minimum_pairs",
        "maximum_cases",
        "soak_seconds",
        "time_limit_seconds",
        "retention_days",
    ):
        if getattr(policy, name) < 0:
            yield name, f"{name} must not be negative"


def _gate_problems(policy: Policy) -> Iterator[tuple[str, str]]:
    for name in (
        "disagreement_margin",
        "error_margin",
        "slo_margin",
        "schema_margin",
        "feedback_margin",
        "split_alpha",
    ):
        if not 0 < getattr(policy, name) < 1:
            yield name, f"{name} is {getattr(policy, name):g}: it must lie between 0 and 1"
    for gate, share in policy.alpha_shares.items():
        if gate not in GATES:
            yield "alpha_shares", f"there is no gate {gate!r}: there are {', '.join(GATES)}"
        elif not 0 < share < float("inf"):
            yield "alpha_shares", f"the share of {gate} is {share:g}: it must be above 0"
