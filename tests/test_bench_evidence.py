"""The benchmark of the gates: what it simulates is what the gates say, and its sums are right."""

import numpy as np
import pytest

from benchmarks.evidence import EQUAL, main, simulate_alarms, simulate_passes, simulate_speed
from benchmarks.rules import Effect, Streams, first_alarms, rules
from benchmarks.trials import Looks


def test_the_oracle_takes_what_the_yardstick_says() -> None:
    assert round(Effect("", 0.02, 0.05).oracle(0.05)) == 436
    assert round(Effect("", 0.5, 0.7, paired=True).oracle(0.05)) == 364


def test_the_bulk_says_what_judge_says() -> None:
    # It raises where the two differ.
    alarms = simulate_alarms(6, seed=3)
    assert set(alarms.alone) == {"pairs", "schema", "errors", "ttft", "total", "feedback"}
    assert all(0.0 <= share <= 1.0 for share in alarms.alone.values())
    assert simulate_passes(6, seed=3).together <= min(simulate_passes(6, seed=3).alone.values())


def test_a_look_is_noted_once() -> None:
    looks = Looks.start(3)
    looks.note(np.asarray([[False, True], [False, False], [False, False]]))
    looks.note(np.asarray([[True, True], [False, True], [False, False]]))
    assert looks.at.tolist() == [2, 4, 0]
    assert looks.share == pytest.approx(2 / 3)


@pytest.mark.parametrize("effect", [Effect("e", 0.05, 0.3), Effect("p", 0.5, 0.9, paired=True)])
def test_every_rule_finds_what_is_much_worse(effect: Effect) -> None:
    speeds = {speed.rule: speed for speed in simulate_speed(effect, 60, seed=5)}
    assert {speed.caught for name, speed in speeds.items() if name != "Flagger"} == {1.0}
    alone, among = speeds["Sluice"], speeds["Sluice, 1 of 6 gates"]
    assert alone.mean < among.mean
    assert alone.median <= alone.p90


@pytest.mark.parametrize("paired", [False, True])
def test_who_peeks_with_a_z_test_finds_equal_candidates_worse(paired: bool) -> None:
    effect, tuned_to = EQUAL[paired], Effect("", 0.02, 0.05)
    tuned_to = Effect("", 0.5, 0.7, paired=True) if paired else tuned_to
    streams = Streams(effect, 200, np.random.default_rng(1))
    alarms = first_alarms(rules(effect, tuned_to, 200, 0.05, 6), streams, 200, 4_000)
    shares = {name: float(np.isfinite(at).mean()) for name, at in alarms.items()}
    assert shares["z-test, peeking"] > 0.15
    assert shares["Sluice"] <= 0.06


def test_a_run_prints_the_tables_and_the_goals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rollouts", "8", "--seed", "2"]) in (0, 1)
    printed = capsys.readouterr().out
    assert "equal: rolled back" in printed
    assert "70:30 losses: pairs" in printed
    assert "2 % → 5 %: mean over the oracle's" in printed
