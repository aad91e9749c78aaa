"""A route: the public name that an application asks for, and how its answers are compared."""

from dataclasses import dataclass, field
from typing import Literal

from rollout.policy import Policy, Slo

Comparator = Literal["text", "json", "tools", "judge"]


@dataclass(frozen=True, slots=True)
class Route:
    """`schema` is the text of a JSON schema that answers should satisfy, or None.

    `capture` is the chance, in [0, 1], that an exchange is kept for the shadow.
    """

    name: str
    engine: str
    comparator: Comparator = "text"
    schema: str | None = None
    slo: Slo = field(default_factory=Slo)
    capture: float = 0.1
    policy: Policy = field(default_factory=Policy)
