"""The trainer: takes runs from the queue and carries each from labels to a proposed version.

python -m trainer.worker --config sluice.toml
"""

import argparse
import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, start_http_server

from rollout.artifacts import ArtifactStore
from rollout.datasets import Manifest
from rollout.engines import Engine
from rollout.errors import (
    ConfigError,
    InvalidInputError,
    LeaseLostError,
    RefusedError,
    SluiceError,
    StaleRevisionError,
    StoreUnavailableError,
    UnservableError,
)
from rollout.evidence import Report
from rollout.policy import plan_of
from rollout.runs import RunEvent, RunKind, RunState, TrainingRun
from rollout.serving import wait_resident
from rollout.settings import Settings, check_section, load_settings
from rollout.state import Proposed
from rollout.stores import Stores, open_stores
from rollout.versions import Prompt, Version
from trainer import publish
from trainer.base import BaseModel
from trainer.build import Builder, Recipe
from trainer.config import TrainingConfig
from trainer.dataset import Dataset
from trainer.dataset import load as load_dataset
from trainer.evaluator import Evaluator, Voice, Wish
from trainer.external import check_command
from trainer.job import Job
from trainer.process import run_job
from trainer.settings import (
    TrainerSettings,
    model_path,
)
from trainer.sinks import TrainerMetrics, Watcher, open_sinks
from trainer.suites import Suite, heldout_suite, sample_suite

log = logging.getLogger(__name__)
T = TypeVar("T")
CHECKPOINT_FILE = "checkpoint.pt"

# Fewer rows cannot show a difference: six of them gained and none lost is the least that does.
_FEWEST_EVALUATION_ROWS = 10
_NO_ADAPTER = (
    "weights = 'full' makes a model of its own, which engine {engine!r} cannot load as an adapter"
)
_NOTE_SECONDS = 1.0
# What of a step's progress is told as numbers.
_VALUES = (
    "loss",
    "learning_rate",
    "gradient_norm",
    "tokens",
    "tokens_per_second",
    "validation_loss",
)
# Beside a checkpoint: the digest of the shared one that it is, or goes on from.
_SHARED = "shared"
_WANT_SECONDS = 600.0
_STORE_PATIENCE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Task:
    """What a run works with, looked up and checked before anything is done."""

    config: TrainingConfig
    parent: Version
    engine: Engine
    base: BaseModel
    prompt: Prompt | None
    schema: str | None
    suite: Suite | None


class RunInHand:
    """The run that this trainer holds. All that is written about it goes through here."""

    def __init__(self, stores: Stores, run: TrainingRun, watchers: Sequence[Watcher] = ()) -> None:
        self.run = run
        self.wanted: tuple[str, ...] = ()
        self._watchers = watchers
        self._stores = stores
        self._noted = 0.0

    async def advance(self, state: RunState, message: str, **changes: Any) -> None:
        """Store the run in its new state. Raises LeaseLostError where another trainer has it."""
        after = replace(self.run, state=state, **changes)
        await patiently(lambda: self._stores.runs.update(after))
        self.run = after
        log.info("run %s: %s: %s", self.run.id, state, message)
        for watcher in self._watchers:
            watcher.advanced(after)
        await self.note(message)

    async def note(
        self,
        message: str,
        *,
        done: int = 0,
        total: int = 0,
        eta: float | None = None,
        values: Mapping[str, float] | None = None,
    ) -> None:
        """Tell whoever watches. A line that cannot be stored is lost, and nothing else is."""
        event = RunEvent(self.run.state, message, datetime.now(UTC), done, total, eta, values or {})
        for watcher in self._watchers:
            watcher.noted(self.run, event)
        with contextlib.suppress(StoreUnavailableError):
            await self._stores.runs.note(self.run.id, event)
        self._noted = time.monotonic()

    async def note_progress(
        self,
        message: str,
        *,
        done: int,
        total: int,
        eta: float | None = None,
        values: Mapping[str, float] | None = None,
    ) -> None:
        """As `note`, but at most one line a second, the last one always."""
        if done == total or time.monotonic() - self._noted >= _NOTE_SECONDS:
            await self.note(message, done=done, total=total, eta=eta, values=values)


class Worker:
    """One trainer. `serve` until `stopping` is set; what it had in hand then waits anew."""

    def __init__(
        self,
        stores: Stores,
        settings: Settings,
        own: TrainerSettings,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self._stores = stores
        self._watchers = watchers
        self._settings = settings
        self._own = own
        self._artifacts = ArtifactStore(
            settings.artifacts_url, cache=settings.data_path / "adapters"
        )
        self._engines = {engine.name: engine for engine in settings.engine_list()}
        self._builder = Builder(stores, self._artifacts, settings)
        self._evaluator = Evaluator(stores, self._artifacts, settings, own)
        self._name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"

    async def serve(self, stopping: asyncio.Event) -> None:
        """Take one run after the other; a dataset does not wait for a training to end."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._serve("train", stopping))
            group.create_task(self._serve("dataset", stopping))
            group.create_task(self._serve("evaluation", stopping))

    async def _serve(self, kind: RunKind, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            try:
                run = await self._stores.runs.take(self._name, self._own.lease_seconds, kind)
                if run is not None:
                    await self.carry_out(run, stopping)
                    continue
            except LeaseLostError as exc:
                log.warning("%s", exc.message)
            except StoreUnavailableError as exc:
                log.warning("%s; trying again", exc.message)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), self._own.poll_seconds)

    async def carry_out(self, run: TrainingRun, stopping: asyncio.Event) -> None:
        """Bring a run that was just taken to its end, or back to the queue when stopping.

        Raises LeaseLostError where another trainer has taken it over.
        """
        hand = RunInHand(self._stores, run, self._watchers)
        work = asyncio.create_task(self._work(hand))
        lease = asyncio.create_task(self._keep_lease(hand))
        stop = asyncio.create_task(stopping.wait())
        tasks: set[asyncio.Task[Any]] = {work, lease, stop}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # A job that is cancelled saves its state first.
            work.cancel()
            await asyncio.wait({work})
            lease.cancel()
            stop.cancel()
            await asyncio.wait(tasks)
        await self._conclude(hand, work, lease)

    async def _conclude(
        self, hand: RunInHand, work: asyncio.Task[None], lease: asyncio.Task[RunState]
    ) -> None:
        failure = None if work.cancelled() else work.exception()
        if not work.cancelled() and failure is None:
            return
        if not lease.cancelled() and (lost := lease.exception()) is not None:
            if not isinstance(lost, StoreUnavailableError):
                raise lost
            failure = failure or lost
        match failure:
            case None if not lease.cancelled() and lease.result() == "paused":
                changes = await self._share_checkpoint(hand)
                await hand.advance(
                    "paused", "paused; `sluice runs resume` lets it go on", **changes
                )
            case None if not lease.cancelled():
                await hand.advance("cancelled", "cancelled", reason="cancelled on request")
            case None:
                changes = await self._share_checkpoint(hand)
                said = "the trainer stops; the run waits for the next one"
                await hand.advance("queued", said, **changes)
                return
            case LeaseLostError():
                raise failure
            case StoreUnavailableError():
                await hand.advance("queued", f"{failure.message}; the run waits for it")
                return
            case UnservableError() | InvalidInputError() | RefusedError():
                await hand.advance("refused", failure.message, reason=failure.message)
            case SluiceError():
                await hand.advance("failed", failure.message, reason=failure.message)
            case OSError():
                reason = f"{failure}: make room or mend the permissions, then start the run again"
                await hand.advance("failed", reason, reason=reason)
            case _:
                log.error("run %s failed", hand.run.id, exc_info=failure)
                reason = f"{type(failure).__name__}: {failure}; the trainer's log has more"
                await hand.advance("failed", reason, reason=reason)
        await self._let_go(hand)
        if hand.run.state != "paused":
            await asyncio.to_thread(self._clear, hand.run)

    async def _keep_lease(self, hand: RunInHand) -> RunState:
        """Renew until somebody asks the run to be "cancelled" or "paused", which is returned.

        Raises LeaseLostError where another trainer has it, and StoreUnavailableError while there is
        still time to stop before one might.
        """
        pause = self._own.lease_seconds / 6
        give_up = time.monotonic() + self._own.lease_seconds / 2
        while True:
            asked = time.monotonic()
            try:
                # A store that hangs must not be waited for until the lease is over.
                async with asyncio.timeout(min(2 * pause, give_up - asked)):
                    seen = await self._stores.runs.renew(hand.run, self._own.lease_seconds)
                    give_up = asked + self._own.lease_seconds / 2
                    for name in hand.wanted:
                        await self._stores.catalog.want(name, _WANT_SECONDS)
                if seen.cancel_requested:
                    return "cancelled"
                if seen.pause_requested:
                    return "paused"
            except (StoreUnavailableError, TimeoutError) as exc:
                log.warning("cannot renew the lease on run %s: %s", hand.run.id, exc)
                if time.monotonic() >= give_up:
                    raise StoreUnavailableError(
                        "the lease cannot be renewed, for the store does not answer"
                    ) from exc
            await asyncio.sleep(max(0.0, min(pause, give_up - time.monotonic())))

    async def _work(self, hand: RunInHand) -> None:
        """The run from its beginning; what an earlier trainer finished is not done again."""
        if hand.run.kind == "evaluation":
            await self._evaluate_alone(hand)
            return
        await hand.advance("dataset", f"{hand.run.route}: making a dataset from the labels")
        if hand.run.kind == "dataset":
            await self._build(hand)
            return
        task = await self._look_up(hand.run)
        dataset = await self._dataset(hand, task)
        suite = task.suite or heldout_suite(hand.run.route, dataset, task.schema)
        suite = sample_suite(suite, task.config.evaluation_rows)
        _check_rows(dataset, suite, task.config)

        await hand.advance("training", f"training on {len(dataset.split('train'))} rows")
        if task.config.weights == "full":
            await hand.note(_NO_ADAPTER.format(engine=task.engine.name))
        published = await self._train(hand, task, dataset)
        if task.config.weights == "full":
            reason = (
                f"not proposed: {_NO_ADAPTER.format(engine=task.engine.name)}; the model is the "
                f"artifact {published.digest}: start an engine with that folder as its base, and "
                "give it a route"
            )
            await hand.advance("refused", reason, adapter=published.digest, reason=reason)
            await asyncio.to_thread(self._clear, hand.run)
            return

        await hand.advance(
            "publishing", f"published as {published.digest[:20]}", adapter=published.digest
        )
        version = await publish.register(
            self._stores, hand.run, task.parent, published, task.prompt, datetime.now(UTC)
        )
        await hand.advance("publishing", f"registered as {version.name}", version=version.name)
        await self._prove(hand, task, version, published)

        await hand.advance("evaluating", f"{version.name} against {task.parent.name}")
        report = await self._evaluate(hand, task, version, suite, dataset)
        await self._propose(hand, version, report)
        await self._let_go(hand)
        await asyncio.to_thread(self._clear, hand.run)

    async def _look_up(self, run: TrainingRun) -> Task:
        parent = await self._stores.rollouts.version(run.parent)
        route = await self._stores.rollouts.route(run.route)
        engine = self._engines.get(parent.engine)
        if engine is None:
            raise ConfigError(
                f"{parent.name} is served by engine {parent.engine!r}, which the trainer's "
                "configuration does not have: add it under [[engines]]",
                param="engines",
            )
        if engine.kind != "vllm":
            raise UnservableError(
                f"engine {engine.name!r} loads no adapters: it is of kind {engine.kind!r}"
            )
        config = TrainingConfig.from_mapping(run.config, max_rank=engine.max_rank)
        if config.backend == "external":
            check_command(self._own.external.command)
        if config.teacher:
            await self._stores.rollouts.route(config.teacher)
        base = BaseModel.open(parent.base, model_path(self._settings, self._own, parent.base))
        return Task(
            config=config,
            parent=parent,
            engine=engine,
            base=base,
            prompt=await self._prompt(config, parent),
            schema=route.schema,
            suite=await self._evaluator.suite(run.route),
        )

    async def _prompt(self, config: TrainingConfig, parent: Version) -> Prompt | None:
        """What the new version puts before the client's messages."""
        if config.prompt == "none":
            return None
        if config.prompt == "parent":
            return parent.prompt
        return (await self._stores.rollouts.version(config.prompt)).prompt

    async def _dataset(self, hand: RunInHand, task: Task) -> Dataset:
        if hand.run.dataset is not None:
            dataset = load_dataset(self._artifacts.document(hand.run.dataset))
            await self._builder.check(hand.run.route, dataset, task.suite, datetime.now(UTC))
            return dataset
        recipe = Recipe(
            heldout=0.0 if task.suite else task.config.heldout,
            validation=task.config.validation,
            teacher=task.config.teacher,
        )
        dataset, manifest = await self._builder.build(
            hand.run, recipe, task.suite, hand.note, datetime.now(UTC)
        )
        await hand.advance("dataset", _describe(manifest), dataset=dataset.digest)
        return dataset

    async def _build(self, hand: RunInHand) -> None:
        """A run that ends in a dataset."""
        suite = await self._evaluator.suite(hand.run.route)
        recipe = Recipe.from_mapping(hand.run.config, has_suite=suite is not None)
        _, manifest = await self._builder.build(
            hand.run, recipe, suite, hand.note, datetime.now(UTC)
        )
        said = _describe(manifest)
        await hand.advance("built", said, dataset=manifest.digest, reason=said)

    async def _train(self, hand: RunInHand, task: Task, dataset: Dataset) -> publish.Published:
        if hand.run.adapter is not None:
            return publish.open_bundle(self._artifacts, hand.run.adapter)
        folder = self._folder(hand.run)
        await asyncio.to_thread(self._fetch_checkpoint, hand.run)
        own = self._own.external
        job = Job(
            base=task.base.name,
            base_revision=task.parent.base_revision,
            base_path=str(task.base.path),
            folder=str(folder),
            config=asdict(task.config),
            prompt=None if task.prompt is None else asdict(task.prompt),
            max_rank=task.engine.max_rank,
            engine_url=task.engine.urls[0] if task.engine.urls else None,
            external={"template": own.command, **own.model_dump(exclude={"command"})},
            gpus=self._own.gpus,
            threads=self._own.threads,
            nice=self._own.nice,
            checkpoint_seconds=self._own.checkpoint_seconds,
        )
        _write_dataset(job.dataset, dataset)

        async def on_line(line: Mapping[str, Any]) -> None:
            await _note_line(hand, line)

        await run_job(job, on_line, engine_key=task.engine.api_key)
        return await asyncio.to_thread(publish.publish_bundle, self._artifacts, job.bundle)

    def _folder(self, run: TrainingRun) -> Path:
        return self._settings.data_path / "runs" / run.id

    async def _share_checkpoint(self, hand: RunInHand) -> Mapping[str, str]:
        """Leave the run's state where other trainers find it; what of the run that changes.

        It is there to save time: without it a trainer on another machine begins anew.
        """
        file = self._folder(hand.run) / "checkpoint" / CHECKPOINT_FILE
        if not file.is_file():
            return {}
        try:
            digest = await asyncio.to_thread(self._artifacts.put_file, file)
            file.with_name(_SHARED).write_text(digest, encoding="utf-8")
            if hand.run.checkpoint not in (None, digest):
                await asyncio.to_thread(self._artifacts.forget, hand.run.checkpoint)
        except (SluiceError, OSError) as exc:
            log.warning("run %s: its state stays on this machine: %s", hand.run.id, exc)
            return {}
        return {"checkpoint": digest}

    def _fetch_checkpoint(self, run: TrainingRun) -> None:
        """Take up the state that another trainer left, unless what is here goes on from it."""
        file = self._folder(run) / "checkpoint" / CHECKPOINT_FILE
        shared = file.with_name(_SHARED)
        if run.checkpoint is None:
            return
        if file.is_file() and shared.is_file() and shared.read_text("utf-8") == run.checkpoint:
            return
        try:
            self._artifacts.fetch_file(run.checkpoint, file)
            shared.write_text(run.checkpoint, encoding="utf-8")
        except SluiceError as exc:
            log.warning("run %s begins anew: %s", run.id, exc.message)

    def _clear(self, run: TrainingRun) -> None:
        """Remove what an ended run left; of one that failed its log is kept."""
        folder = self._folder(run)
        if run.checkpoint is not None:
            with contextlib.suppress(SluiceError):
                self._artifacts.forget(run.checkpoint)
        if run.state != "failed":
            shutil.rmtree(folder, ignore_errors=True)
            return
        for each in folder.iterdir() if folder.is_dir() else ():
            if each.is_dir():
                shutil.rmtree(each, ignore_errors=True)
            elif each.suffix != ".log":
                each.unlink(missing_ok=True)

    async def _prove(
        self, hand: RunInHand, task: Task, version: Version, published: publish.Published
    ) -> None:
        hand.wanted = (version.name, task.parent.name)
        for name in hand.wanted:
            await self._stores.catalog.want(name, _WANT_SECONDS)
        await hand.note(f"waiting until the engine has loaded {version.served_name}")
        proofs = await publish.prove_everywhere(
            self._stores,
            task.engine,
            version,
            published,
            load_seconds=self._own.load_seconds,
            tolerance=self._own.tolerance,
        )
        for proof in proofs:
            values = {"adapter": proof.adapter, "base": proof.base, "effect": proof.effect}
            await hand.note(f"proved: {proof}", values=values)

    async def _evaluate(
        self, hand: RunInHand, task: Task, version: Version, suite: Suite, dataset: Dataset
    ) -> Report:
        wish = Wish(
            route=await patiently(lambda: self._stores.rollouts.route(hand.run.route)),
            version=version,
            parent=task.parent,
            suite=suite,
            run=hand.run.id,
            by=hand.run.created_by,
            purpose="training",
            dataset=dataset,
        )
        report = await self._evaluator.evaluate(wish, _voice(hand))
        await hand.advance("evaluating", report.reason, report=report.id)
        return report

    async def _evaluate_alone(self, hand: RunInHand) -> None:
        """A run that ends in a report."""
        run = hand.run
        wish = await self._evaluator.wish(run.config, run.route, run.id, run.created_by)
        await hand.advance(
            "evaluating",
            f"{wish.version.name} against {wish.parent.name} on {wish.suite.name}",
            version=wish.version.name,
        )
        hand.wanted = (wish.version.name, wish.parent.name)
        for name in hand.wanted:
            await self._stores.catalog.want(name, _WANT_SECONDS)
        for version in (wish.version, wish.parent):
            await wait_resident(self._stores, version, self._own.load_seconds)
        report = await self._evaluator.evaluate(wish, _voice(hand))
        await hand.advance("evaluated", report.reason, report=report.id, reason=report.reason)
        await self._let_go(hand)

    async def _propose(self, hand: RunInHand, version: Version, report: Report) -> None:
        if report.outcome != "pass":
            await hand.advance("refused", f"not proposed: {report.reason}", reason=report.reason)
            return
        if not hand.run.propose:
            said = f"{version.name} won; proposing it is left to a person"
            await hand.advance("ready", said, reason=report.reason)
            return
        route = await patiently(lambda: self._stores.rollouts.route(hand.run.route))
        event = Proposed(
            version=version.number,
            at=datetime.now(UTC),
            by=hand.run.created_by,
            reason=f"run {hand.run.id}, report {report.id[:12]}: {report.reason}",
            plan=plan_of(route.policy),
        )
        try:
            before = await patiently(lambda: self._stores.rollouts.get(hand.run.route))
            # A trainer that died after the commit left the run to say so.
            if before.trial is None or before.trial.candidate != version.number:
                await self._stores.rollouts.commit(before, event)
        except StaleRevisionError as exc:
            reason = f"{report.reason}; not proposed: {exc.message}; propose {version.name} by hand"
            await hand.advance("refused", reason, reason=reason)
        except RefusedError as exc:
            reason = f"{report.reason}; not proposed: {exc.message}"
            await hand.advance("refused", reason, reason=reason)
        else:
            await hand.advance("proposed", f"{version.name} is proposed", reason=report.reason)

    async def _let_go(self, hand: RunInHand) -> None:
        """What was wanted for the evaluation alone may leave the engines."""
        with contextlib.suppress(StoreUnavailableError):
            for name in hand.wanted:
                await self._stores.catalog.want(name, 0)


async def patiently(write: Callable[[], Awaitable[T]]) -> T:
    """Try again while the store is away, for minutes: what was trained is worth the wait."""
    give_up = time.monotonic() + _STORE_PATIENCE_SECONDS
    while True:
        try:
            return await write()
        except StoreUnavailableError as exc:
            if time.monotonic() > give_up:
                raise
            log.warning("%s; trying again", exc.message)
            await asyncio.sleep(1.0)


def _voice(hand: RunInHand) -> Voice:
    async def progress(what: str, done: int, total: int, eta: float) -> None:
        await hand.note_progress(what, done=done, total=total, eta=eta)

    return Voice(hand.note, progress)


async def _note_line(hand: RunInHand, line: Mapping[str, Any]) -> None:
    """A line of the job as progress of the run."""
    progress = line.get("progress")
    if progress is None:
        await hand.note(_message(line))
        return
    values = {name: progress[name] for name in _VALUES if progress.get(name) is not None}
    await hand.note_progress(
        f"loss {progress['loss']:.3f}, {progress['tokens_per_second']:.0f} tokens/s",
        done=progress["done"],
        total=progress["total"],
        eta=progress["eta"],
        values=values,
    )


def _message(line: Mapping[str, Any]) -> str:
    left_out = line.get("dropped", 0)
    why = f"; {left_out} longer than max_length left out" if left_out else ""
    return str(line.get("message", "")) + why


def _check_rows(dataset: Dataset, suite: Suite, config: TrainingConfig) -> None:
    train = len(dataset.split("train"))
    if train < config.minimum_rows:
        why = ", ".join(f"{count} {reason}" for reason, count in dataset.stats["dropped"].items())
        raise InvalidInputError(
            f"there are {train} rows to train on, and at least {config.minimum_rows} are needed: "
            "label more cases" + (f" (dropped: {why})" if why else ""),
            param="minimum_rows",
        )
    if len(suite.rows) < _FEWEST_EVALUATION_ROWS:
        raise InvalidInputError(
            f"there are {len(suite.rows)} rows to evaluate on, and at least "
            f"{_FEWEST_EVALUATION_ROWS} are needed to show a difference: label more cases, raise "
            "heldout, or give the route a suite",
            param="heldout",
        )


def _describe(manifest: Manifest) -> str:
    splits = ", ".join(f"{count} {name}" for name, count in sorted(manifest.splits.items()))
    dropped = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.items())
    return (
        f"{manifest.labels} labels, {manifest.rows} rows ({splits or 'none'})"
        + (f"; dropped: {dropped}" if dropped else "")
        + f"; dataset {manifest.digest[:20]}"
    )


def _write_dataset(path: Path, dataset: Dataset) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(dataset.content)


async def serve(settings: Settings) -> None:
    """Run a trainer until SIGTERM or SIGINT."""
    own = check_section(TrainerSettings, settings.trainer, "trainer")
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    registry = CollectorRegistry()
    metrics = TrainerMetrics(registry)
    sinks = open_sinks(own.sinks, settings.data_path / "tracking", metrics)
    with metrics_at(own, registry):
        async with open_stores(settings.store_url) as stores:
            log.info("waiting for runs")
            await Worker(stores, settings, own, [metrics, *sinks]).serve(stopping)
        for sink in sinks:
            await asyncio.to_thread(sink.close)


@contextlib.contextmanager
def metrics_at(own: TrainerSettings, registry: CollectorRegistry) -> Iterator[None]:
    """Serve `/metrics` at the port of the configuration, if it has one."""
    if not own.metrics_port:
        yield
        return
    try:
        server, thread = start_http_server(own.metrics_port, own.metrics_host, registry)
    except OSError as exc:
        raise ConfigError(
            f"cannot listen on {own.metrics_host}:{own.metrics_port} ({exc.strerror or exc}): set "
            "another metrics_port under [trainer]",
            param="trainer.metrics_port",
        ) from exc
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.worker")
    parser.add_argument("--config", type=Path)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(serve(load_settings(arguments.config)))
    except SluiceError as exc:
        sys.stderr.write(f"trainer: {exc.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
