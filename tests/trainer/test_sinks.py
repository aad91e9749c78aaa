"""Who is told how a run goes: Prometheus, and trackers that may break without breaking a run."""

import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from prometheus_client import CollectorRegistry

from rollout.errors import ConfigError
from rollout.runs import RunEvent, RunState, TrainingRun
from tests.trainer.samples import AT, reserved_port, training_run
from trainer.settings import TrainerSettings
from trainer.sinks import Trackers, TrainerMetrics, open_sinks
from trainer.worker import metrics_at


class Paper:
    """A tracker that keeps what it is told, and fails where it is to."""

    def __init__(self, fails: int = 0) -> None:
        self.lines: list[tuple[int, float]] = []
        self.outcome = ""
        self._fails = fails

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._fails:
            self._fails -= 1
            raise OSError("no paper")
        self.lines.append((step, values["loss"]))

    def end(self, run: TrainingRun) -> None:
        self.outcome = run.state


def in_state(state: RunState) -> TrainingRun:
    return replace(training_run(), id="run-1", state=state)


def step(done: int, loss: float = 0.5) -> RunEvent:
    return RunEvent("training", "", AT, done, 10, 9.0, {"loss": loss, "tokens_per_second": 100.0})


def test_a_tracker_gets_the_steps_of_training_and_the_end() -> None:
    paper = Paper()
    trackers = Trackers("mlflow", lambda _: paper)
    trackers.noted(in_state("dataset"), replace(step(1), values={"rows": 9}))
    trackers.noted(in_state("training"), step(1, 0.9))
    trackers.noted(in_state("training"), step(2, 0.4))
    trackers.advanced(in_state("proposed"))
    trackers.close()
    assert (paper.lines, paper.outcome) == ([(1, 0.9), (2, 0.4)], "proposed")


def test_a_tracker_that_keeps_failing_is_left_alone_and_counted() -> None:
    paper, errors = Paper(fails=99), list[int]()
    trackers = Trackers("wandb", lambda _: paper, lambda: errors.append(1))
    for number in range(20):
        trackers.noted(in_state("training"), step(number))
    trackers.close()
    assert (len(errors), paper.lines) == (5, [])


def test_a_tracker_that_hangs_holds_nobody_up() -> None:
    gate, errors = threading.Event(), list[int]()

    def wait(_: TrainingRun) -> Paper:
        gate.wait(30)
        return Paper()

    trackers = Trackers("wandb", wait, lambda: errors.append(1))
    for number in range(1200):
        trackers.noted(in_state("training"), step(number))
    assert len(errors) >= 199, "what finds the queue full is dropped"
    gate.set()
    trackers.close()


def test_a_tracker_that_is_not_installed_is_named_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb") as refused:
        open_sinks(["wandb"], tmp_path)
    assert refused.value.param == "trainer.sinks"
    assert open_sinks([], tmp_path) == []


def test_metrics_show_what_is_in_hand_and_forget_what_ended() -> None:
    registry = CollectorRegistry()
    metrics = TrainerMetrics(registry)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"sluice_training_{name}", {"route": "triage", **labels})

    metrics.advanced(in_state("training"))
    metrics.noted(in_state("training"), step(4))
    assert (value("busy"), value("progress_ratio"), value("eta_seconds")) == (1, 0.4, 9.0)
    assert (value("job_loss"), value("tokens_per_second")) == (0.5, 100.0)
    metrics.advanced(in_state("failed"))
    metrics.noted(in_state("failed"), step(4))
    assert (value("busy"), value("job_loss"), value("progress_ratio")) == (0, None, None)
    assert value("runs_ended_total", state="failed") == 1


def test_a_dataset_that_is_built_ends_nothing_of_a_training_of_its_route() -> None:
    registry = CollectorRegistry()
    metrics = TrainerMetrics(registry)
    metrics.advanced(in_state("training"))
    metrics.noted(in_state("training"), step(4))
    metrics.advanced(replace(in_state("dataset"), id="run-2"))
    assert registry.get_sample_value("sluice_training_busy", {"route": "triage"}) == 2
    metrics.advanced(replace(in_state("built"), id="run-2"))
    assert registry.get_sample_value("sluice_training_busy", {"route": "triage"}) == 1
    assert registry.get_sample_value("sluice_training_job_loss", {"route": "triage"}) == 0.5


def test_metrics_are_served_where_the_configuration_says_and_a_taken_port_is_named() -> None:
    registry = CollectorRegistry()
    TrainerMetrics(registry).advanced(in_state("training"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"),
            metrics_at(TrainerSettings(metrics_port=port), registry),
        ):
            pass
    with reserved_port() as port, metrics_at(TrainerSettings(metrics_port=port), registry):
        shown = httpx2.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    assert 'sluice_training_busy{route="triage"} 1.0' in shown
    with metrics_at(TrainerSettings(), registry):
        pass
