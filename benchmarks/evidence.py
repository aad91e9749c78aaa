"""What the gates reach, simulated: false alarms, false passes, and units needed beside other rules.

Every rollout is looked at after every unit. Run by `make bench-evidence`; seeded, so that a figure
can be had again.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.goals import Goal, goals_text
from benchmarks.rules import Effect, Streams, first_alarms, rules
from benchmarks.trials import AT_ONCE, PLAN, POLICY, Floats, Looks, Trial, World
from rollout.gates import RATES, SPLIT, judge, thresholds
from rollout.plans import GATES

ALPHA = POLICY.alpha
RATE_EFFECTS = (Effect("2 % → 5 %", 0.02, 0.05), Effect("2 % → 3 %", 0.02, 0.03))
PAIR_EFFECTS = (
    Effect("70:30 losses", 0.5, 0.7, paired=True),
    Effect("60:40 losses", 0.5, 0.6, paired=True),
)
EQUAL = {
    False: Effect("2 % → 2 %", 0.02, 0.02),
    True: Effect("50:50", 0.5, 0.5, paired=True),
}
EQUAL_LOOKS = 10_000
# The two with a goal on the mean, and that goal over the oracle's.
WITH_GOAL = ("2 % → 5 %", "70:30 losses")
NEAR_ORACLE = 1.4
OURS = "Sluice"
PEERS = ("AsympCS", "mSPRT")


@dataclass(frozen=True, slots=True)
class Alarms:
    """Shares of rollouts. `alone` at the whole alpha, by gate; `together` at divided alpha."""

    rollouts: int
    alone: Mapping[str, float]
    together: float
    held: float


@dataclass(frozen=True, slots=True)
class Speed:
    """How many units an arm (or pairs) a rule takes until its first alarm.

    Streams without one by the end count as if they had it there.
    """

    effect: str
    rule: str
    oracle: float
    mean: float
    median: float
    p90: float
    caught: float
    false_alarms: float


def simulate_alarms(rollouts: int, seed: int) -> Alarms:
    """A candidate that is stable's equal, through the whole plan."""
    dice = np.random.default_rng(seed)
    limits = thresholds(POLICY)
    alone: dict[str, list[float]] = {gate: [] for gate in GATES}
    together: list[float] = []
    held: list[float] = []
    for size in _batches(rollouts):
        trial = Trial.start(World(), size, dice)
        one = {gate: Looks.start(size) for gate in GATES}
        every, split_looks = Looks.start(size), Looks.start(size)
        last: dict[str, Floats] = {}
        for worse, within, split in trial.run():
            for gate in GATES:
                one[gate].note(worse[gate] >= math.log(1.0 / ALPHA))
            every.note(
                np.any([worse[gate] >= math.log(limits[gate].fail) for gate in GATES], axis=0)
            )
            split_looks.note(split >= math.log(limits[SPLIT].fail))
            last = {
                **{f"{gate} worse": worse[gate][:, -1] for gate in GATES},
                **{f"{gate} not_worse": within[gate][:, -1] for gate in GATES},
                f"{SPLIT} {SPLIT}": split[:, -1],
            }
        _check_against_judge(trial, last)
        for gate in GATES:
            alone[gate].append(one[gate].share * size)
        together.append(every.share * size)
        held.append(split_looks.share * size)
    return Alarms(
        rollouts,
        {gate: sum(shares) / rollouts for gate, shares in alone.items()},
        sum(together) / rollouts,
        sum(held) / rollouts,
    )


def simulate_passes(rollouts: int, seed: int) -> Alarms:
    """A candidate that is worse by exactly the margin in everything: how often each gate passes it.

    `together` is that all gates pass it at some moment, each for itself.
    """
    dice = np.random.default_rng(seed)
    worse_by = {gate: rule.margin(POLICY) for gate, rule in RATES.items()}
    worse_by["schema"] = POLICY.schema_margin
    world = replace(World(), worse=worse_by, won=0.5 - POLICY.margin)
    alone: dict[str, float] = dict.fromkeys(GATES, 0.0)
    together = 0.0
    for size in _batches(rollouts):
        passed = {gate: Looks.start(size) for gate in GATES}
        for _, within, _ in Trial.start(world, size, dice).run():
            for gate in GATES:
                passed[gate].note(within[gate] >= math.log(1.0 / ALPHA))
        for gate in GATES:
            alone[gate] += passed[gate].share * size / rollouts
        together += np.all([looks.at > 0 for looks in passed.values()], axis=0).sum() / rollouts
    return Alarms(rollouts, alone, together, 0.0)


def simulate_speed(effect: Effect, rollouts: int, seed: int) -> list[Speed]:
    """How soon each rule finds a worse candidate, and how often it finds an equal one worse."""
    gates = len(GATES)
    most = int(effect.oracle(ALPHA) * effect.looks_by_unit * 12)
    looks = first_alarms(
        rules(effect, effect, rollouts, ALPHA, gates),
        Streams(effect, rollouts, np.random.default_rng(seed)),
        rollouts,
        most,
    )
    equal = EQUAL[effect.paired]
    false = first_alarms(
        rules(equal, effect, rollouts, ALPHA, gates),
        Streams(equal, rollouts, np.random.default_rng(seed + 1)),
        rollouts,
        EQUAL_LOOKS,
    )
    found = []
    for rule, at in looks.items():
        units = np.minimum(at, most) / effect.looks_by_unit
        found.append(
            Speed(
                effect=effect.name,
                rule=rule,
                oracle=effect.oracle(ALPHA),
                mean=float(units.mean()),
                median=float(np.median(units)),
                p90=float(np.quantile(units, 0.9)),
                caught=float(np.isfinite(at).mean()),
                false_alarms=float(np.isfinite(false[rule]).mean()),
            )
        )
    return found


def goals(alarms: Alarms, passes: Alarms, speeds: Sequence[Speed]) -> list[Goal]:
    found = [
        Goal(
            "equal: rolled back, the worst gate alone at α",
            100 * max(alarms.alone.values()),
            100 * ALPHA,
            unit="%",
        ),
        Goal(
            "equal: rolled back by all gates together, α divided",
            100 * alarms.together,
            100 * ALPHA,
            unit="%",
        ),
        Goal(
            "worse by the margin: passed, the worst gate",
            100 * max(passes.alone.values()),
            100 * ALPHA,
            unit="%",
        ),
    ]
    by_rule = {(speed.effect, speed.rule): speed for speed in speeds}
    for effect in dict.fromkeys(speed.effect for speed in speeds):
        ours = by_rule[effect, OURS]
        if effect in WITH_GOAL:
            shown = f"{ours.mean:.0f} of {ours.oracle:.0f}"
            text = f"{effect}: mean over the oracle's"
            found.append(Goal(text, ours.mean / ours.oracle, NEAR_ORACLE, shown=shown))
        for peer in PEERS:
            theirs = by_rule[effect, peer]
            for what in ("mean", "median"):
                mine, other = getattr(ours, what), getattr(theirs, what)
                text = f"{effect}: {what} over that of {peer}"
                found.append(Goal(text, mine / other, 1.0, shown=f"{mine:.0f} of {other:.0f}"))
    return found


def report(alarms: Alarms, passes: Alarms, speeds: Sequence[Speed]) -> str:
    """The tables, as text."""
    plan = ", ".join(f"{units:,} units at {percent:g} %" for percent, units in PLAN)
    lines = [
        f"α = {ALPHA:g}, a look after every unit; {plan}; rates swing by half with the hours",
        "",
        f"{'gate':<22}{'equal: rolled back':>20}{'worse by the margin: passed':>30}",
        *(
            f"{gate:<22}{_percent(alarms.alone[gate]):>20}{_percent(passes.alone[gate]):>30}"
            for gate in GATES
        ),
        f"{'together, α divided':<22}{_percent(alarms.together):>20}"
        f"{_percent(passes.together):>30}",
        f"{'held by split check':<22}{_percent(alarms.held):>20}",
        "",
    ]
    for effect in dict.fromkeys(speed.effect for speed in speeds):
        own = [speed for speed in speeds if speed.effect == effect]
        what = "pairs" if effect in {each.name for each in PAIR_EFFECTS} else "units an arm"
        lines.append(
            f"{effect + ': ' + what:<32}{'mean':>8}{'median':>8}{'p90':>8}{'caught':>9}"
            f"{'mean/oracle':>13}{'false alarms':>14}"
        )
        lines.append(f"{'oracle, ln(1/α)/KL':<32}{own[0].oracle:>8,.0f}")
        lines += [
            f"{speed.rule:<32}{speed.mean:>8,.0f}{speed.median:>8,.0f}{speed.p90:>8,.0f}"
            f"{_percent(speed.caught):>9}{speed.mean / speed.oracle:>13.2f}"
            f"{_percent(speed.false_alarms):>14}"
            for speed in own
        ]
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.evidence", description=__doc__)
    parser.add_argument("--rollouts", type=int, default=2_000, help="of each kind (2000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every figure here")
    chosen = parser.parse_args(arguments)
    began = time.monotonic()
    alarms = simulate_alarms(chosen.rollouts, chosen.seed)
    passes = simulate_passes(chosen.rollouts, chosen.seed + 1)
    speeds = [
        speed
        for number, effect in enumerate((*RATE_EFFECTS, *PAIR_EFFECTS))
        for speed in simulate_speed(effect, chosen.rollouts, chosen.seed + 10 + 2 * number)
    ]
    found = goals(alarms, passes, speeds)
    took = (time.monotonic() - began) / 60
    print(f"{chosen.rollouts:,} rollouts of each kind, seed {chosen.seed}, {took:.1f} minutes")
    print(report(alarms, passes, speeds))
    print(goals_text(found))
    if chosen.json is not None:
        record = {
            "alarms": asdict(alarms),
            "passes": asdict(passes),
            "speeds": [asdict(speed) for speed in speeds],
        }
        chosen.json.write_text(json.dumps(record, indent=1))
    return 0 if all(goal.state == "met" for goal in found) else 1


def _batches(rollouts: int) -> list[int]:
    return [min(AT_ONCE, rollouts - begin) for begin in range(0, rollouts, AT_ONCE)]


def _check_against_judge(trial: Trial, last: Mapping[str, Floats], rollouts: int = 5) -> None:
    """What is simulated here in bulk is what `judge` says of the counts that would be stored."""
    for index in range(min(rollouts, trial.rollouts)):
        for verdict in judge(trial.evidence(index), POLICY):
            for side, value in verdict.values.items():
                simulated = float(last[f"{verdict.gate} {side}"][index])
                if not math.isclose(math.log(value), simulated, rel_tol=1e-6, abs_tol=1e-6):
                    raise RuntimeError(
                        f"gate {verdict.gate}, {side}: judge says {math.log(value)}, and the "
                        f"simulation {simulated}"
                    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


if __name__ == "__main__":
    sys.exit(main())
