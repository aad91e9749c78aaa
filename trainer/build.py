"""Builds a route's dataset: from what the stores hold to a snapshot in the artifact store."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from rollout.artifacts import ArtifactStore
from rollout.cases import LabelledCase
from rollout.datasets import (
    Dataset,
    Manifest,
    Message,
    SuiteUse,
    ledger_lines,
    load,
    prompt_lines,
    read_prompts,
)
from rollout.errors import InvalidInputError
from rollout.redaction import RedactionSection, Redactor
from rollout.runs import TrainingRun
from rollout.settings import Settings, check_section
from rollout.stores import Stores
from trainer.config import TrainingConfig
from trainer.dataset import (
    Compiled,
    Manner,
    Places,
    cases_for,
    compile_dataset,
    compile_rows,
    leaks,
)
from trainer.suites import Suite

Note = Callable[[str], Awaitable[None]]

_MOST_ANSWERS: Final = 50
_SETTINGS: Final = frozenset({"heldout", "validation", "source", "file"})


@dataclass(frozen=True, slots=True)
class Recipe:
    """`source` names the document with rows that were brought in; without it, labels are used:
    those of the route, or of the `teacher` route whose answers are to be learnt."""

    heldout: float
    validation: float
    source: str | None = None
    file: str = "labels"
    teacher: str = ""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, has_suite: bool) -> "Recipe":
        """The settings of a run that builds a dataset alone, checked."""
        unknown = sorted(values.keys() - _SETTINGS)
        if unknown:
            raise InvalidInputError(
                f"{unknown[0]}: there is no such setting of a dataset; there are heldout and "
                "validation",
                param=unknown[0],
            )
        shares = {name: values[name] for name in ("heldout", "validation") if name in values}
        config = TrainingConfig.from_mapping(shares)
        # As a training run would: what the suite evaluates need not be held out.
        heldout = 0.0 if has_suite and "heldout" not in values else config.heldout
        source = values.get("source")
        return cls(
            heldout=heldout,
            validation=config.validation,
            source=None if source is None else str(source),
            file="labels" if source is None else str(values.get("file") or "a file"),
        )


class Builder:
    """Collaborators that every build needs."""

    def __init__(self, stores: Stores, artifacts: ArtifactStore, settings: Settings) -> None:
        self._stores = stores
        self._artifacts = artifacts
        capture = settings.gateway.get("capture") or {}
        section = check_section(
            RedactionSection, capture.get("redaction") or {}, "gateway.capture.redaction"
        )
        # The same rules as for what is captured; people write addresses into corrections too.
        self._redactor = Redactor(**dict(section))

    async def build(
        self, run: TrainingRun, recipe: Recipe, suite: Suite | None, note: Note, now: datetime
    ) -> tuple[Dataset, Manifest]:
        """Build, store and index it. Done again with the same labels it is the same dataset."""
        if suite is not None:
            await self.note_suite(run.route, suite, now)
        uses = await self._stores.datasets.suites()
        prompts = await asyncio.to_thread(self._prompts, uses)
        kept = await self._stores.datasets.places(run.route)
        places = Places(kept.anchors, kept.held)
        labelled: Sequence[LabelledCase] = ()
        if recipe.source is None:
            labelled = await self._stores.cases.labelled(recipe.teacher or run.route)
            await note(f"{len(labelled):,} labelled cases: looking for repeats among them")
        held = (await self._stores.rollouts.route(run.route)).schema is not None
        manner = Manner(redact=self._redactor.value, compact_json=held)
        compiled = await asyncio.to_thread(self._compile, recipe, labelled, prompts, manner, places)
        dataset = compiled.dataset
        ledger = ledger_lines(dataset.dropped, dataset.contradictions)
        ledger_digest = await asyncio.to_thread(self._artifacts.put_document, ledger)
        await asyncio.to_thread(self._artifacts.put_document, dataset.content)
        await self._stores.datasets.keep_places(
            run.route, compiled.places.anchors, compiled.places.held - kept.held
        )
        asked = await self._ask_again(run.route, dataset, labelled, now)
        if asked:
            await note(f"{asked:,} contradictions went back to the queue of cases")
        manifest = await self._stores.datasets.put(
            _manifest(
                dataset,
                run=run,
                recipe=recipe,
                labels=sum(len(each.labels) for each in labelled),
                suites=tuple(use.name for use in uses),
                ledger=ledger_digest,
                asked=asked,
                now=now,
            )
        )
        return dataset, manifest

    async def check(self, route: str, dataset: Dataset, suite: Suite | None, now: datetime) -> None:
        """Raises InvalidInputError where a dataset trains on what a suite evaluates, which may be
        younger than the dataset."""
        if suite is not None:
            await self.note_suite(route, suite, now)
        uses = await self._stores.datasets.suites()
        prompts = await asyncio.to_thread(self._prompts, uses)
        if leaking := await asyncio.to_thread(leaks, dataset, prompts):
            raise InvalidInputError(
                f"{len(leaking)} rows of the dataset {dataset.digest[:12]} ask what an evaluation "
                f"suite asks, case {leaking[0]} for one: build it anew",
                param="dataset",
            )

    async def note_suite(self, route: str, suite: Suite, now: datetime) -> None:
        """Remember what is evaluated on, so that no dataset ever trains on it."""
        content = prompt_lines(row.messages for row in suite.rows)
        digest = await asyncio.to_thread(self._artifacts.put_document, content)
        await self._stores.datasets.note_suite(
            SuiteUse(suite.name, route, digest, len(suite.rows), now)
        )

    def _prompts(self, uses: Sequence[SuiteUse]) -> list[Sequence[Message]]:
        return [
            prompt for use in uses for prompt in read_prompts(self._artifacts.document(use.prompts))
        ]

    def _compile(
        self,
        recipe: Recipe,
        labelled: Sequence[LabelledCase],
        prompts: Sequence[Sequence[Message]],
        manner: Manner,
        places: Places,
    ) -> Compiled:
        if recipe.source is None:
            return compile_dataset(
                labelled,
                heldout=recipe.heldout,
                validation=recipe.validation,
                suite_prompts=prompts,
                manner=manner,
                places=places,
            )
        rows = load(self._artifacts.document(recipe.source))
        return compile_rows(
            [*rows.rows, *rows.unanswered],
            heldout=recipe.heldout,
            validation=recipe.validation,
            suite_prompts=prompts,
            manner=manner,
            places=places,
        )

    async def _ask_again(
        self, route: str, dataset: Dataset, labelled: Sequence[LabelledCase], now: datetime
    ) -> int:
        by_id = {each.case.id: each for each in labelled}
        cases = cases_for(dataset.contradictions, by_id, now)
        if not cases:
            return 0
        maximum = (await self._stores.rollouts.route(route)).policy.maximum_cases
        return sum([await self._stores.cases.offer(case, maximum) for case in cases])


def _manifest(
    dataset: Dataset,
    *,
    run: TrainingRun,
    recipe: Recipe,
    labels: int,
    suites: tuple[str, ...],
    ledger: str,
    asked: int,
    now: datetime,
) -> Manifest:
    answers: dict[str, Counter[str]] = {}
    for row in dataset.rows:
        answers.setdefault(row.split, Counter())[row.gold] += 1
    together = sum(answers.values(), Counter[str]())
    return Manifest(
        digest=dataset.digest,
        route=run.route,
        created_at=now,
        created_by=run.created_by,
        run=run.id,
        source=recipe.file,
        labels=labels,
        rows=len(dataset.rows),
        unanswered=len(dataset.unanswered),
        preferences=sum(len(row.rejected) for row in dataset.rows if row.gold and not row.calls),
        heldout=recipe.heldout,
        validation=recipe.validation,
        splits=dict(Counter(row.split for row in dataset.rows)),
        answers={
            split: {
                _short(gold): count
                for gold, count in counts.most_common(_MOST_ANSWERS)
                # What one row says is its text, and no class.
                if together[gold] > 1
            }
            for split, counts in answers.items()
        },
        distinct_answers=len({row.gold for row in dataset.rows}),
        dropped=dict(Counter(each.reason for each in dataset.dropped)),
        contradictions=len(dataset.contradictions),
        asked_again=asked,
        redacted=dict(dataset.redacted),
        suites=suites,
        ledger=ledger,
        compacted=dataset.compacted,
    )


def _short(gold: str) -> str:
    return gold if len(gold) <= 80 else f"{gold[:79]}…"
