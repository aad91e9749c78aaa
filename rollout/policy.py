"""The numbers that an operator may tune for a route."""

from collections.abc import Iterator
from dataclasses import dataclass


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
    minimum_pairs: decided pairs before a gate may pass.
    steps: percentages that an automatic rollout takes after the shadow; the last promotes.
    automatic: advance by itself when the gate passes. Rolling back by itself needs no leave.
    time_limit_seconds: an inconclusive trial older than this is held for a person.
    soak_seconds: the least time at each step of an automatic rollout.
    disagreement_sample, agreement_sample: chance that a pair becomes a case.
    maximum_cases: open cases kept for the route; beyond it new ones are dropped and counted.
    """

    alpha: float = 0.05
    margin: float = 0.1
    minimum_pairs: int = 20
    steps: tuple[float, ...] = (1.0, 10.0, 50.0)
    automatic: bool = False
    time_limit_seconds: float = 7 * 86400.0
    soak_seconds: float = 600.0
    disagreement_sample: float = 1.0
    agreement_sample: float = 0.05
    maximum_cases: int = 10_000


def policy_problems(policy: Policy) -> Iterator[tuple[str, str]]:
    """Each field that makes no sense, and what is wrong with it."""
    if not 0 < policy.alpha < 1:
        yield "alpha", f"alpha is {policy.alpha:g}: it must lie between 0 and 1"
    if not 0 < policy.margin < 0.5:
        yield "margin", f"margin is {policy.margin:g}: it must lie between 0 and 0.5"
    steps = policy.steps
    if not steps or any(not 0 < step <= 100 for step in steps) or list(steps) != sorted(set(steps)):
        yield "steps", "steps must be rising percentages, as in [1, 10, 50]"
    for name in ("disagreement_sample", "agreement_sample"):
        if not 0 <= getattr(policy, name) <= 1:
            yield name, f"{name} is a chance: it must lie in [0, 1]"
    for name in ("minimum_pairs", "maximum_cases", "soak_seconds", "time_limit_seconds"):
        if getattr(policy, name) < 0:
            yield name, f"{name} must not be negative"
