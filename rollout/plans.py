"""Plans: the steps by which a candidate comes to all of the traffic, and what each asks for.

A plan as an operator writes it (`PlanSpec`) leaves out what the route's policy says already. One
that a trial follows (`Plan`) says everything, begins in the shadow and ends at 100 %.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Final

# What a step may ask for. The split check is none of them: it always has to hold.
GATES: Final = ("pairs", "schema", "errors", "ttft", "total", "feedback")
# In the shadow the candidate takes no traffic, so nothing else can be judged there.
SHADOW_GATES: Final = ("pairs", "schema")
MAXIMUM_STEPS: Final = 50


@dataclass(frozen=True, slots=True)
class StepSpec:
    """A step as an operator writes it: None takes what the plan says, or else the policy."""

    percent: float
    minimum_units: int | None = None
    soak_seconds: float | None = None
    gates: tuple[str, ...] | None = None
    time_limit_seconds: float | None = None
    approval: bool | None = None


# `[1, 10, 50]` is short for three tables with a percentage each.
Steps = tuple[float | StepSpec, ...]


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """A plan as it comes with a proposal: None takes what the route's policy says."""

    steps: Steps
    automatic: bool | None = None
    minimum_units: int | None = None
    soak_seconds: float | None = None
    gates: tuple[str, ...] | None = None
    time_limit_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What must hold before a step is left for the next one, and whether it may be entered.

    minimum_units: units that the candidate must have got at this percentage; in the shadow,
        compared pairs.
    gates: those that must pass. Any gate that fails ends the trial, whether it stands here or not.
    approval: a person enters it.
    """

    percent: float
    minimum_units: int
    soak_seconds: float
    gates: tuple[str, ...]
    time_limit_seconds: float
    approval: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """The first step is the shadow (0 %), the last one the promotion (100 %); they rise."""

    steps: tuple[Step, ...]

    @property
    def gates(self) -> tuple[str, ...]:
        """All that must pass before the candidate becomes stable."""
        return tuple(g for g in GATES if any(g in step.gates for step in self.steps))

    def place(self, percent: float) -> int:
        """The index of the step that a trial with this share stands at: the last one up to it."""
        return max(i for i, step in enumerate(self.steps) if step.percent <= max(percent, 0.0))

    def behind(self, percent: float) -> Step:
        """The first step above this share; the promotion where there is none."""
        return next((step for step in self.steps if step.percent > percent), self.steps[-1])


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the policy says of every step that says nothing itself."""

    automatic: bool
    minimum_units: int
    soak_seconds: float
    gates: tuple[str, ...]
    time_limit_seconds: float


def make_plan(spec: PlanSpec, policy: Defaults) -> Plan:
    """The whole plan. `spec` must have no `plan_problems`."""
    known = _known(spec, policy)
    steps = [_whole(step, known) for step in map(_table, spec.steps)]
    if not steps or steps[0].percent > 0:
        steps.insert(0, _whole(StepSpec(0.0), known))
    if steps[-1].percent < 100:
        steps.append(_whole(StepSpec(100.0), known))
    return Plan(tuple(steps))


def plan_problems(
    spec: PlanSpec, policy: Defaults, servable: Sequence[str] = GATES
) -> Iterator[tuple[str, str]]:
    """Each field that makes no sense, as a path like `steps.1.percent`, and what is wrong with it.

    `servable` are the gates that can judge on this route at all.
    """
    if not 0 < len(spec.steps) <= MAXIMUM_STEPS:
        yield "steps", f"a plan has 1 to {MAXIMUM_STEPS} steps, as in [1, 10, 50]"
        return
    yield from _field_problems(spec, GATES, servable)
    steps = [_table(step) for step in spec.steps]
    for number, step in enumerate(steps):
        for field, problem in _step_problems(step, servable):
            yield f"steps.{number}.{field}" if field else f"steps.{number}", problem
    for number, (before, after) in enumerate(pairwise(steps), start=1):
        if not before.percent < after.percent:
            yield (
                f"steps.{number}",
                f"{after.percent:g} % comes behind {before.percent:g} %: the percentages of a plan "
                "rise, as in [1, 10, 50]",
            )
    yield from _whole_problems(spec, _known(spec, policy))


def _whole_problems(spec: PlanSpec, known: Defaults) -> Iterator[tuple[str, str]]:
    """What no field is wrong about by itself."""
    whole = [_whole(_table(step), known) for step in spec.steps]
    for number, step in enumerate(whole):
        if step.soak_seconds > step.time_limit_seconds:
            yield (
                f"steps.{number}",
                f"its time limit of {step.time_limit_seconds:g} s is over before its soak of "
                f"{step.soak_seconds:g} s: the trial would always be held",
            )
    if not any(step.gates for step in whole):
        yield "steps", 'no step asks for a gate: name one at least, as in gates = ["pairs"]'


def _step_problems(step: StepSpec, servable: Sequence[str]) -> Iterator[tuple[str, str]]:
    if not 0 <= step.percent <= 100:
        yield "percent", f"{step.percent:g} is no percentage: give a number from 0 to 100"
        return
    if step.percent == 0 and step.approval is not None:
        yield "approval", "nobody enters the shadow: the trial begins there when it is proposed"
    if step.percent == 100 and replace(step, approval=None) != StepSpec(step.percent):
        yield "", "100 % is the promotion and ends the plan: only `approval` can be said of it"
    yield from _field_problems(step, SHADOW_GATES if step.percent == 0 else GATES, servable)


def _field_problems(
    spec: StepSpec | PlanSpec, allowed: Sequence[str], servable: Sequence[str]
) -> Iterator[tuple[str, str]]:
    for name in ("minimum_units", "soak_seconds", "time_limit_seconds"):
        value = getattr(spec, name)
        # Not less than nothing is also what NaN is, and that would never be over.
        if value is not None and not 0 <= value < float("inf"):
            yield name, f"{name} is {value:g}: it must be a number that is not negative"
    for gate in spec.gates or ():
        if gate == "split":
            yield "gates", "the split check always has to hold: leave it out"
        elif gate not in GATES:
            yield "gates", f"there is no gate {gate!r}: there are {', '.join(GATES)}"
        elif gate not in allowed:
            yield (
                "gates",
                f"`{gate}` could never pass in the shadow, where the candidate takes no traffic: "
                f"there are {', '.join(allowed)}",
            )
        elif gate not in servable:
            yield "gates", f"`{gate}` could never pass: {_NEEDS[gate]}"


# What a route must say so that a gate can judge at all.
_NEEDS: Final = {
    "schema": "the route has no schema",
    "ttft": "the route has no slo.ttft_seconds",
    "total": "the route has no slo.total_seconds",
}


def _known(spec: PlanSpec, policy: Defaults) -> Defaults:
    """What the plan says of all its steps, and where it says nothing, the policy."""
    said = {field.name: getattr(spec, field.name) for field in fields(Defaults)}
    return replace(policy, **{name: value for name, value in said.items() if value is not None})


def _table(step: float | StepSpec) -> StepSpec:
    return step if isinstance(step, StepSpec) else StepSpec(step)


def _whole(step: StepSpec, known: Defaults) -> Step:
    if step.percent >= 100:
        return Step(100.0, 0, 0.0, (), known.time_limit_seconds, _approval(step, known))
    shadow = step.percent == 0
    gates = known.gates if step.gates is None else step.gates
    if shadow and step.gates is None:
        # The rest has nothing to judge by yet.
        gates = tuple(gate for gate in gates if gate in SHADOW_GATES)
    # In the shadow the gate's own minimum of pairs is the floor.
    units = 0 if shadow else known.minimum_units
    soak, limit = step.soak_seconds, step.time_limit_seconds
    return Step(
        percent=float(step.percent),
        minimum_units=units if step.minimum_units is None else step.minimum_units,
        soak_seconds=known.soak_seconds if soak is None else soak,
        gates=gates,
        time_limit_seconds=known.time_limit_seconds if limit is None else limit,
        approval=not shadow and _approval(step, known),
    )


def _approval(step: StepSpec, known: Defaults) -> bool:
    return not known.automatic if step.approval is None else step.approval


def plain_path(loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """The place of a problem as its author knows it, without how a step was tried to be read."""
    return tuple(part for part in loc if part not in ("float", StepSpec.__name__))


def clearest(problems: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of pydantic's problems, the one to tell: of the first place, the one that says most about it.

    A step that is neither a percentage nor a table is told as two problems.
    """
    first = plain_path(problems[0]["loc"])
    here = [each for each in problems if plain_path(each["loc"])[: len(first)] == first]
    return max(here, key=lambda each: len(plain_path(each["loc"])))
