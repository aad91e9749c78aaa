"""Who else is told how a run goes: metrics for Prometheus, and experiment trackers where installed."""

import contextlib
import importlib
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge

from rollout.errors import ConfigError
from rollout.runs import ENDED, RunEvent, TrainingRun

log = logging.getLogger(__name__)

SinkName = Literal["tensorboard", "wandb", "mlflow"]
# What to install for each, and what is imported to see whether it is.
_PACKAGES: Mapping[SinkName, str] = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
}
# A tracker that fails so often in a row is not asked again for this run.
_FAILURES = 5
# Lines that wait for a tracker: a quarter of an hour of them.
_WAITING = 1000
_CLOSE_SECONDS = 5.0


class Watcher(Protocol):
    """Is told of each run what is told to people. It must neither wait long nor raise."""

    def advanced(self, run: TrainingRun) -> None:
        """The run is in another state now, or has ended."""

    def noted(self, run: TrainingRun, event: RunEvent) -> None:
        """A line of progress."""


class TrainerMetrics:
    """What the trainer itself shows at `[trainer] metrics_port`, of what it has in hand now."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, help_text: str) -> Gauge:
            return Gauge(f"sluice_training_{name}", help_text, ["route"], registry=registry)

        self._held: dict[str, set[str]] = defaultdict(set)
        self._busy = gauge("busy", "Runs of the route that this trainer has in hand.")
        self._progress = gauge("progress_ratio", "How much of the run's present stage is done.")
        self._eta = gauge("eta_seconds", "How long the present stage will take from now on.")
        self._values = {
            "loss": gauge("job_loss", "Loss at the last step."),
            "validation_loss": gauge(
                "validation_loss", "Loss on the validation rows, last measured."
            ),
            "learning_rate": gauge("learning_rate", "Learning rate at the last step."),
            "gradient_norm": gauge("gradient_norm", "Norm of the gradients at the last step."),
            "tokens_per_second": gauge("tokens_per_second", "Tokens trained on in a second."),
        }
        self._ended = Counter(
            "sluice_training_runs_ended",
            "Runs that this trainer brought to an end, by their state.",
            ["route", "state"],
            registry=registry,
        )
        self.sink_errors = Counter(
            "sluice_training_sink_errors",
            "Lines of progress that a tracker did not take.",
            ["sink"],
            registry=registry,
        )

    def advanced(self, run: TrainingRun) -> None:
        # A dataset and an evaluation may be under way beside a training of the same route.
        held = self._held[run.route]
        if _in_hand(run):
            held.add(run.id)
        else:
            held.discard(run.id)
        self._busy.labels(run.route).set(len(held))
        if run.state in ENDED:
            self._ended.labels(run.route, run.state).inc()
        if not held:
            for gauge in (self._progress, self._eta, *self._values.values()):
                gauge.remove_by_labels({"route": run.route})

    def noted(self, run: TrainingRun, event: RunEvent) -> None:
        if not _in_hand(run):
            return
        if event.total:
            self._progress.labels(run.route).set(event.done / event.total)
        if event.eta is not None:
            self._eta.labels(run.route).set(event.eta)
        for name, gauge in self._values.items():
            if name in event.values:
                gauge.labels(run.route).set(event.values[name])


def _in_hand(run: TrainingRun) -> bool:
    return run.state not in ENDED and run.state not in ("queued", "paused")


class Tracker(Protocol):
    """One run in an experiment tracker."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def end(self, run: TrainingRun) -> None: ...


class Trackers:
    """Passes the numbers of training on to a tracker, in a thread: what it takes or breaks holds up
    no run. Lines that find too many before them are dropped and counted.
    """

    def __init__(
        self,
        name: SinkName,
        open_tracker: Callable[[TrainingRun], Tracker],
        count_error: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._open = open_tracker
        self._count_error = count_error
        self._tracked: dict[str, Tracker] = {}
        self._failed: dict[str, int] = {}
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def advanced(self, run: TrainingRun) -> None:
        if not _in_hand(run):
            self._put(lambda: self._end(run))

    def noted(self, run: TrainingRun, event: RunEvent) -> None:
        if run.state == "training" and event.values:
            self._put(lambda: self._log(run, event))

    def close(self) -> None:
        """Wait for what was passed on, but not long."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=_CLOSE_SECONDS)
            self._thread.join(_CLOSE_SECONDS)

    def _put(self, step: Callable[[], None]) -> None:
        try:
            self._waiting.put_nowait(step)
        except queue.Full:
            self._count_error()

    def _work(self) -> None:
        while (step := self._waiting.get()) is not None:
            try:
                step()
            except Exception:  # a tracker may raise anything, and the run goes on
                self._count_error()
                log.warning("%s did not take a line of progress", self._name, exc_info=True)

    def _log(self, run: TrainingRun, event: RunEvent) -> None:
        if self._failed.get(run.id, 0) >= _FAILURES:
            return
        self._failed[run.id] = self._failed.get(run.id, 0) + 1
        if run.id not in self._tracked:
            self._tracked[run.id] = self._open(run)
        self._tracked[run.id].log(event.done, event.values)
        self._failed[run.id] = 0

    def _end(self, run: TrainingRun) -> None:
        self._failed.pop(run.id, None)
        if (tracker := self._tracked.pop(run.id, None)) is not None:
            tracker.end(run)


def open_sinks(
    names: Sequence[SinkName], folder: Path, metrics: TrainerMetrics | None = None
) -> list[Trackers]:
    """Raises ConfigError where a package is not installed, before any run is taken."""
    made: list[Trackers] = []
    for name in names:
        try:
            importlib.import_module(_PACKAGES[name])
        except ImportError as exc:
            raise ConfigError(
                f"trainer.sinks names {name!r}, and its package is not installed here: "
                f"`pip install {_PACKAGES[name]}`, or leave it out",
                param="trainer.sinks",
            ) from exc
        count = metrics.sink_errors.labels(name).inc if metrics else lambda: None
        made.append(Trackers(name, _opener(name, folder), count))
    return made


def _opener(name: SinkName, folder: Path) -> Callable[[TrainingRun], Tracker]:
    match name:
        case "tensorboard":
            return lambda run: _TensorBoard(folder / "tensorboard" / run.route / run.id)
        case "wandb":
            return lambda run: _Wandb(run, folder)
        case "mlflow":
            return _Mlflow


class _TensorBoard:
    """Event files that `tensorboard --logdir` reads."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"training/{name}", value, step)

    def end(self, run: TrainingRun) -> None:
        self._writer.add_text("outcome", f"{run.state}: {run.reason}")
        self._writer.close()


class _Wandb:
    """A run of the same id, so that one that is resumed goes on in its curve."""

    def __init__(self, run: TrainingRun, folder: Path) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            project=f"sluice-{run.route}",
            id=run.id,
            resume="allow",
            config=dict(run.config),
            dir=str(folder),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def end(self, run: TrainingRun) -> None:
        self._run.summary["outcome"] = f"{run.state}: {run.reason}"
        self._run.finish(exit_code=1 if run.state == "failed" else 0)


class _Mlflow:
    """A run in the experiment of the route, at the tracking server of MLFLOW_TRACKING_URI."""

    def __init__(self, run: TrainingRun) -> None:
        tracking: Any = importlib.import_module("mlflow.tracking")
        self._client = tracking.MlflowClient()
        name = f"sluice-{run.route}"
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        found = self._client.search_runs([experiment], f"tags.`sluice.run` = '{run.id}'")
        made = (
            found[0] if found else self._client.create_run(experiment, tags={"sluice.run": run.id})
        )
        self._id = made.info.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def end(self, run: TrainingRun) -> None:
        self._client.set_tag(self._id, "outcome", f"{run.state}: {run.reason}")
        self._client.set_terminated(self._id, "FAILED" if run.state == "failed" else "FINISHED")
