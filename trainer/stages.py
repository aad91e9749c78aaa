"""The stages of a run, from labels to a proposed version; what is done is not done again."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from rollout.artifacts import ArtifactStore
from rollout.datasets import Manifest
from rollout.engines import Engine
from rollout.errors import (
    ConfigError,
    InvalidInputError,
    RefusedError,
    StaleRevisionError,
    UnservableError,
)
from rollout.evidence import Report
from rollout.policy import plan_of
from rollout.runs import TrainingRun
from rollout.serving import wait_resident
from rollout.settings import Settings
from rollout.state import Proposed
from rollout.stores import Stores
from rollout.versions import Prompt, Version
from trainer import publish
from trainer.base import BaseModel
from trainer.build import Builder, Recipe
from trainer.config import TrainingConfig
from trainer.dataset import Dataset
from trainer.dataset import load as load_dataset
from trainer.evaluator import Evaluator, Voice, Wish
from trainer.external import check_command
from trainer.folders import RunFolders
from trainer.holding import RunInHand, patiently
from trainer.job import Job
from trainer.process import run_job
from trainer.settings import TrainerSettings, model_path
from trainer.suites import Suite, heldout_suite, sample_suite

# Fewer rows cannot show a difference: six of them gained and none lost is the least that does.
_FEWEST_EVALUATION_ROWS: Final = 10
_NO_ADAPTER: Final = (
    "weights = 'full' makes a model of its own, which engine {engine!r} cannot load as an adapter"
)
# What of a step's progress is told as numbers.
_VALUES: Final = (
    "loss",
    "learning_rate",
    "gradient_norm",
    "tokens",
    "tokens_per_second",
    "validation_loss",
)


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


class Stages:
    """Carries out the runs of one trainer, one stage after the other."""

    def __init__(
        self,
        stores: Stores,
        settings: Settings,
        own: TrainerSettings,
        artifacts: ArtifactStore,
        folders: RunFolders,
    ) -> None:
        self._stores = stores
        self._settings = settings
        self._own = own
        self._artifacts = artifacts
        self._folders = folders
        self._engines = {engine.name: engine for engine in settings.engine_list()}
        self._builder = Builder(stores, artifacts, settings)
        self._evaluator = Evaluator(stores, artifacts, settings, own)

    async def carry_out(self, hand: RunInHand) -> None:
        """The run from its beginning to its end."""
        if hand.run.kind == "evaluation":
            await self._evaluate_alone(hand)
            return
        await hand.advance("dataset", f"{hand.run.route}: making a dataset from the labels")
        if hand.run.kind == "dataset":
            await self._build_alone(hand)
        else:
            await self._train(hand)

    async def _build_alone(self, hand: RunInHand) -> None:
        """A run that ends in a dataset."""
        suite = await self._evaluator.suite(hand.run.route)
        recipe = Recipe.from_mapping(hand.run.config, has_suite=suite is not None)
        _, manifest = await self._builder.build(hand.run, recipe, suite, hand.note, _now())
        said = _describe(manifest)
        await hand.advance("built", said, dataset=manifest.digest, reason=said)

    async def _evaluate_alone(self, hand: RunInHand) -> None:
        """A run that ends in a report."""
        run = hand.run
        wish = await self._evaluator.wish(run.config, run.route, run.id, run.created_by)
        await hand.advance(
            "evaluating",
            f"{wish.version.name} against {wish.parent.name} on {wish.suite.name}",
            version=wish.version.name,
        )
        await hand.want(wish.version.name, wish.parent.name)
        for version in (wish.version, wish.parent):
            await wait_resident(self._stores, version, self._own.load_seconds)
        report = await self._evaluator.evaluate(wish, _voice(hand))
        await hand.advance("evaluated", report.reason, report=report.id, reason=report.reason)
        await hand.let_go()

    async def _train(self, hand: RunInHand) -> None:
        """A run that ends in a version, proposed if it won."""
        task = await self._look_up(hand.run)
        dataset = await self._dataset(hand, task)
        suite = task.suite or heldout_suite(hand.run.route, dataset, task.schema)
        suite = sample_suite(suite, task.config.evaluation_rows)
        _check_rows(dataset, suite, task.config)
        await hand.advance("training", f"training on {len(dataset.split('train'))} rows")
        if task.config.weights == "full":
            await self._train_model(hand, task, dataset)
        else:
            published = await self._train_bundle(hand, task, dataset)
            version = await self._publish(hand, task, published)
            report = await self._evaluate(hand, task, version, suite, dataset)
            await self._propose(hand, version, report)
        await hand.let_go()
        await asyncio.to_thread(self._folders.clear, hand.run)

    async def _look_up(self, run: TrainingRun) -> Task:
        parent = await self._stores.rollouts.version(run.parent)
        route = await self._stores.rollouts.route(run.route)
        engine = self._engine(parent)
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

    def _engine(self, parent: Version) -> Engine:
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
        return engine

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
            await self._builder.check(hand.run.route, dataset, task.suite, _now())
            return dataset
        recipe = Recipe(
            heldout=0.0 if task.suite else task.config.heldout,
            validation=task.config.validation,
            teacher=task.config.teacher,
        )
        dataset, manifest = await self._builder.build(
            hand.run, recipe, task.suite, hand.note, _now()
        )
        await hand.advance("dataset", _describe(manifest), dataset=dataset.digest)
        return dataset

    async def _train_model(self, hand: RunInHand, task: Task, dataset: Dataset) -> None:
        """All weights: what comes out is an artifact, and no version that could be proposed."""
        why = _NO_ADAPTER.format(engine=task.engine.name)
        await hand.note(why)
        published = await self._train_bundle(hand, task, dataset)
        reason = (
            f"not proposed: {why}; the model is the artifact {published.digest}: start an engine "
            "with that folder as its base, and give it a route"
        )
        await hand.advance("refused", reason, adapter=published.digest, reason=reason)

    async def _train_bundle(
        self, hand: RunInHand, task: Task, dataset: Dataset
    ) -> publish.Published:
        if hand.run.adapter is not None:
            return publish.open_bundle(self._artifacts, hand.run.adapter)
        await asyncio.to_thread(self._folders.fetch, hand.run)
        job = self._job(hand.run, task)
        job.dataset.parent.mkdir(parents=True, exist_ok=True)
        job.dataset.write_bytes(dataset.content)

        async def on_line(line: Mapping[str, Any]) -> None:
            await _note_line(hand, line)

        await run_job(job, on_line, engine_key=task.engine.api_key)
        return await asyncio.to_thread(publish.publish_bundle, self._artifacts, job.bundle)

    def _job(self, run: TrainingRun, task: Task) -> Job:
        external = self._own.external
        return Job(
            base=task.base.name,
            base_revision=task.parent.base_revision,
            base_path=str(task.base.path),
            folder=str(self._folders.of(run)),
            config=asdict(task.config),
            prompt=None if task.prompt is None else asdict(task.prompt),
            max_rank=task.engine.max_rank,
            engine_url=task.engine.urls[0] if task.engine.urls else None,
            external={"template": external.command, **external.model_dump(exclude={"command"})},
            gpus=self._own.gpus,
            threads=self._own.threads,
            nice=self._own.nice,
            checkpoint_seconds=self._own.checkpoint_seconds,
        )

    async def _publish(self, hand: RunInHand, task: Task, published: publish.Published) -> Version:
        """Register the version, and prove that every replica serves exactly it."""
        await hand.advance(
            "publishing", f"published as {published.digest[:20]}", adapter=published.digest
        )
        version = await publish.register(
            self._stores, hand.run, task.parent, published, task.prompt, _now()
        )
        await hand.advance("publishing", f"registered as {version.name}", version=version.name)
        await hand.want(version.name, task.parent.name)
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
        return version

    async def _evaluate(
        self, hand: RunInHand, task: Task, version: Version, suite: Suite, dataset: Dataset
    ) -> Report:
        await hand.advance("evaluating", f"{version.name} against {task.parent.name}")
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
            at=_now(),
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


def _now() -> datetime:
    return datetime.now(UTC)
