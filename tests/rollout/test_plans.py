"""Plans: how they are written, what is refused and where, and what a trial then follows."""

import tomllib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.lines import line_of
from rollout.plans import GATES, PlanSpec, Step, Steps, StepSpec
from rollout.policy import (
    Policy,
    Slo,
    given_plan_problems,
    plan_of,
    policy_problems,
    servable_gates,
)

DAY = 86400.0


def problems(*steps: float | StepSpec, **policy: Any) -> list[tuple[str, str]]:
    return list(policy_problems(Policy(steps=steps, **policy)))


def test_the_short_form_begins_in_the_shadow_and_ends_with_promotion() -> None:
    plan = plan_of(Policy(steps=(5.0, 25.0), soak_seconds=60.0))
    assert [step.percent for step in plan.steps] == [0, 5, 25, 100]
    shadow, first, _, promotion = plan.steps
    assert shadow == Step(0.0, 0, 60.0, ("pairs",), 7 * DAY, approval=False)
    assert first == Step(5.0, 20, 60.0, ("pairs", "errors"), 7 * DAY, approval=True)
    assert promotion == Step(100.0, 0, 0.0, (), 7 * DAY, approval=True)


def test_a_step_says_itself_what_the_policy_says_of_all() -> None:
    step = StepSpec(5.0, 200, 30.0, ("pairs", "total"), 3600.0, approval=True)
    plan = plan_of(Policy(automatic=True, steps=(step, 50.0)))
    assert plan.steps[1] == Step(5.0, 200, 30.0, ("pairs", "total"), 3600.0, approval=True)
    assert [step.approval for step in plan.steps] == [False, True, False, False]
    assert plan.gates == ("pairs", "errors", "total")


def test_a_plan_of_a_proposal_is_completed_by_the_policy() -> None:
    policy = Policy(automatic=True, soak_seconds=5.0, gates=("pairs",))
    plan = plan_of(policy, PlanSpec((StepSpec(0.0, minimum_units=7), 20.0), minimum_units=3))
    assert plan.steps[0].minimum_units == 7
    assert plan.steps[1] == Step(20.0, 3, 5.0, ("pairs",), 7 * DAY, approval=False)


def test_only_the_promotion_may_wait_for_a_person() -> None:
    plan = plan_of(Policy(automatic=True, steps=(10.0, StepSpec(100.0, approval=True))))
    assert [step.approval for step in plan.steps] == [False, False, True]


@pytest.mark.parametrize(
    ("steps", "path", "says"),
    [
        ((), "steps", "1 to 50 steps"),
        ((50.0, 10.0), "steps.1", "10 % comes behind 50 %"),
        ((10.0, 10.0), "steps.1", "10 % comes behind 10 %"),
        ((-1.0,), "steps.0.percent", "no percentage"),
        ((101.0,), "steps.0.percent", "no percentage"),
        ((float("nan"),), "steps.0.percent", "no percentage"),
        ((StepSpec(5.0, minimum_units=-1),), "steps.0.minimum_units", "not negative"),
        ((StepSpec(5.0, soak_seconds=float("nan")),), "steps.0.soak_seconds", "not negative"),
        ((StepSpec(5.0, gates=("speed",)),), "steps.0.gates", "no gate 'speed'"),
        ((StepSpec(5.0, gates=("split",)),), "steps.0.gates", "leave it out"),
        ((StepSpec(0.0, gates=("errors",)),), "steps.0.gates", "takes no traffic"),
        ((StepSpec(0.0, approval=True), 5.0), "steps.0.approval", "nobody enters the shadow"),
        ((5.0, StepSpec(100.0, minimum_units=3)), "steps.1", "only `approval`"),
        ((StepSpec(5.0, soak_seconds=9 * DAY),), "steps.0", "time limit"),
        ((StepSpec(5.0, time_limit_seconds=1.0),), "steps.0", "time limit"),
        (tuple(float(n) for n in range(1, 60)), "steps", "1 to 50"),
        ((StepSpec(0.0, gates=()), StepSpec(9.0, gates=())), "steps", "no step asks for a gate"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_place(steps: Steps, path: str, says: str) -> None:
    found = problems(*steps)
    assert [(where, says in what) for where, what in found][:1] == [(path, True)], found


def test_a_gate_that_could_never_pass_is_refused() -> None:
    servable = servable_gates(Slo(total_seconds=2.0), None)
    assert servable == ("pairs", "errors", "total", "feedback")
    spec = PlanSpec((StepSpec(5.0, gates=("total", "ttft")),))
    assert [*given_plan_problems(spec, Policy(), servable)] == [
        ("steps.0.gates", "`ttft` could never pass: the route has no slo.ttft_seconds")
    ]
    assert servable_gates(Slo(1.0, 1.0), "{}") == GATES


@given(percents=st.lists(st.floats(0, 100), min_size=1, max_size=8, unique=True).map(sorted))
def test_every_sound_plan_rises_from_the_shadow_to_promotion(percents: Sequence[float]) -> None:
    policy = Policy(steps=tuple(percents))
    plan = plan_of(policy)
    steps = [step.percent for step in plan.steps]
    assert (steps[0], steps[-1]) == (0, 100)
    assert steps == sorted(set(steps))
    assert set(percents) <= set(steps)
    for weight in (*percents, 0.0, 33.3, 100.0):
        place = plan.place(weight)
        assert plan.steps[place].percent <= weight
        behind = plan.behind(weight)
        assert behind.percent > weight or behind is plan.steps[-1]


TOML = """
data_dir = "./data"
[[routes]]
name = "a"
slo = { ttft_seconds = 5.0 }

[[routes]]
name = "b"  # [not.a.table]
[routes.policy]
alpha = 0.1
steps = [
  1,
  10,
]
[[routes]]
name = "c"
policy.automatic = true
[[routes.policy.steps]]
percent = 5
[[routes.policy.steps]]
"percent" = 3
gates = ["pairs"]
"""


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (("data_dir",), 'data_dir = "./data"'),
        (("routes", 0, "slo", "ttft_seconds"), "slo = { ttft_seconds = 5.0 }"),
        (("routes", 1, "policy", "steps", 1), "steps = ["),
        (("routes", 1, "policy", "margin"), "[routes.policy]"),
        (("routes", 2, "policy", "automatic"), "policy.automatic = true"),
        (("routes", 2, "policy", "steps", 1, "percent"), '"percent" = 3'),
        (("routes", 2, "policy", "steps", 1, "gates", 0), 'gates = ["pairs"]'),
        (("routes", 2, "policy", "steps", 0, "approval"), "[[routes.policy.steps]]"),
        (("nowhere",), None),
    ],
)
def test_the_line_of_a_key_is_found(path: tuple[str | int, ...], says: str | None) -> None:
    assert tomllib.loads(TOML)
    line = line_of(TOML, path)
    assert (None if line is None else TOML.splitlines()[line - 1]) == says
