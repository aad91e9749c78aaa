"""The two sides of a gate: its e-values, and what they have to reach."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from rollout.gates.wording import number

GateOutcome = Literal["pass", "fail", "inconclusive"]

HEADLINES: Final[Mapping[GateOutcome, str]] = {
    "fail": "worse than stable",
    "pass": "not worse than stable",
    "inconclusive": "too early to tell",
}


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The e-values at which a gate fails and passes."""

    fail: float
    passing: float

    def of(self, side: str) -> float:
        """The one that the e-value of this side has to reach."""
        return self.passing if side == "not_worse" else self.fail


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
            f"e-value for “worse” {number(self.worse)} of {number(self.limits.fail)}, for “not "
            f"worse” {number(self.not_worse)} of {number(self.limits.passing)}"
        )
