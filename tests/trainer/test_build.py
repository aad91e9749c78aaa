"""A route's dataset from what the stores hold: kept, indexed, never trained on what was held out."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from rollout.artifacts import ArtifactStore
from rollout.cases import Choice, LabelledCase
from rollout.datasets import load, prompt_lines, read_ledger
from rollout.errors import InvalidInputError
from rollout.runs import TrainingRun
from rollout.settings import Settings
from rollout.stores import Stores
from tests.trainer.samples import AT, ROUTE, labelled, sentences, training_run, until
from trainer.build import Builder, Recipe
from trainer.settings import TrainerSettings
from trainer.suites import SuiteRow, make_suite
from trainer.worker import Worker

pytestmark = pytest.mark.anyio

RECIPE = Recipe(heldout=0.3, validation=0.1)


def dataset_run(**config: object) -> TrainingRun:
    return replace(training_run(), config=config, kind="dataset")


@pytest.fixture
def artifacts(settings: Settings) -> ArtifactStore:
    return ArtifactStore(settings.artifacts_url)


@pytest.fixture
def builder(stores: Stores, artifacts: ArtifactStore, settings: Settings) -> Builder:
    return Builder(stores, artifacts, settings)


async def note(message: str) -> None:
    assert message


async def test_a_build_is_indexed_and_says_what_it_left_out(
    stores: Stores, builder: Builder, artifacts: ArtifactStore
) -> None:
    rows = [*sentences(20), labelled(50, sentences(1)[0].case.messages[0]["content"], "warm")]
    await stores.cases.put_labelled(rows)

    dataset, manifest = await builder.build(dataset_run(), RECIPE, None, note, AT)

    assert await stores.datasets.get(dataset.digest[:8]) == manifest
    assert (manifest.rows, manifest.labels) == (20, 21)
    assert manifest.dropped == {"repeats another": 1}
    assert sum(manifest.answers["train"].values()) == manifest.splits["train"]
    assert load(artifacts.document(dataset.digest)).rows == dataset.rows
    assert manifest.ledger is not None
    ((left_out,), _) = read_ledger(artifacts.document(manifest.ledger))
    assert (left_out.case, left_out.kept) == ("c00050", "c00000")
    again, _ = await builder.build(dataset_run(), RECIPE, None, note, AT)
    assert again.digest == dataset.digest


async def test_a_contradiction_goes_back_to_people_once_and_their_answer_settles_it(
    stores: Stores, builder: Builder
) -> None:
    await stores.cases.put_labelled(
        [labelled(1, "is it warm in here?", "yes"), labelled(2, "is it warm in here?", "no")]
    )
    dataset, manifest = await builder.build(dataset_run(), RECIPE, None, note, AT)
    assert (dataset.rows, manifest.asked_again) == ((), 1)
    _, manifest = await builder.build(dataset_run(), RECIPE, None, note, AT)
    assert manifest.asked_again == 0

    (case,) = await stores.cases.claim("grace", route=ROUTE)
    assert case.kind == "contradiction"
    assert {answer.text for answer in case.answers} == {"yes", "no"}
    label = labelled(1, "", "").label
    choice: Choice = "first" if case.answers[0].text == "no" else "second"
    label = replace(label, case=case.id, labeler="grace", choice=choice, labelled_at=AT)
    assert await stores.cases.label(label)

    dataset, _ = await builder.build(dataset_run(), RECIPE, None, note, AT)
    (row,) = dataset.rows
    assert (row.case, row.gold) == ("c00002", "no")
    assert [(vote.labeler, vote.agrees) for vote in row.labels] == [
        ("grace", True),
        ("ada", False),
        ("ada", True),
    ]
    (stats,) = await stores.cases.stats(ROUTE)
    assert stats.win_rates.keys() <= {"triage@2.2"}


async def test_what_was_held_out_stays_held_out_whatever_is_asked_for_later(
    stores: Stores, builder: Builder
) -> None:
    await stores.cases.put_labelled(sentences(40))
    before, _ = await builder.build(dataset_run(), RECIPE, None, note, AT)
    # Labels from before the first ones, as an import brings them.
    old = [moved(row, -10_000) for row in sentences(80)[40:]]
    await stores.cases.put_labelled(old)
    after, _ = await builder.build(dataset_run(), replace(RECIPE, heldout=0.0), None, note, AT)
    held = {row.case for row in before.split("heldout")}
    assert held
    assert not held & {row.case for row in after.split("train")}
    assert held <= {row.case for row in after.split("heldout")}


async def test_no_dataset_trains_on_a_suite_that_was_ever_used_by_any_route(
    stores: Stores, builder: Builder
) -> None:
    rows = sentences(12)
    suite = make_suite("another", [SuiteRow("s1", rows[5].case.messages, "warm")])
    await builder.note_suite("another", suite, AT)
    await stores.cases.put_labelled(rows)
    dataset, manifest = await builder.build(dataset_run(), RECIPE, None, note, AT)
    assert {each.case: each.reason for each in dataset.dropped} == {
        "c00005": "is in an evaluation suite"
    }
    assert manifest.suites == (suite.name,)


async def test_a_suite_that_is_younger_than_a_dataset_refuses_a_training_on_it(
    stores: Stores, builder: Builder
) -> None:
    rows = sentences(12)
    await stores.cases.put_labelled(rows)
    dataset, _ = await builder.build(dataset_run(), RECIPE, None, note, AT)
    learnt = dataset.split("train")[0]
    kept = dataset.split("heldout")[0]
    await builder.check(
        ROUTE, dataset, make_suite(ROUTE, [SuiteRow("s1", kept.messages, "warm")]), AT
    )
    with pytest.raises(InvalidInputError, match=learnt.case):
        await builder.check(
            ROUTE, dataset, make_suite(ROUTE, [SuiteRow("s1", learnt.messages, "warm")]), AT
        )


async def test_addresses_are_taken_out_of_corrections_too(stores: Stores, builder: Builder) -> None:
    await stores.cases.put_labelled(
        [labelled(1, "whom do I write to?", "", correction="write to ada@example.org")]
    )
    dataset, manifest = await builder.build(dataset_run(), RECIPE, None, note, AT)
    assert dataset.rows[0].gold == "write to [email]"
    assert manifest.redacted == {"email": 1}


async def test_json_answers_of_a_route_with_a_schema_are_learnt_without_white_space(
    stores: Stores, builder: Builder, artifacts: ArtifactStore
) -> None:
    await stores.cases.put_labelled([labelled(1, "which queue is it?", '{"queue": "billing"}')])
    before, manifest = await builder.build(dataset_run(), RECIPE, None, note, AT)
    assert (before.rows[0].gold, manifest.compacted) == ('{"queue": "billing"}', 0)

    route = await stores.rollouts.route(ROUTE)
    await stores.rollouts.put_route(
        replace(route, schema='{"type": "object"}'), by="test", at=AT, base="tiny"
    )
    after, manifest = await builder.build(dataset_run(), RECIPE, None, note, AT)
    assert (after.rows[0].gold, manifest.compacted) == ('{"queue":"billing"}', 1)
    # What was built before is as it was.
    assert load(artifacts.document(before.digest)).rows == before.rows


async def test_a_trainer_builds_a_dataset_on_request(stores: Stores, settings: Settings) -> None:
    await stores.cases.put_labelled(sentences(20))
    run = dataset_run(heldout=0.5)
    refused = replace(dataset_run(rank=3), created_at=AT)
    await stores.runs.enqueue(run)
    await stores.runs.enqueue(refused)
    stopping = asyncio.Event()
    worker = Worker(stores, settings, TrainerSettings(poll_seconds=0.05))
    serving = asyncio.create_task(worker.serve(stopping))

    async def ended() -> bool:
        states = {(await stores.runs.get(each.id)).state for each in (run, refused)}
        return states == {"built", "refused"}

    await until(ended)
    stopping.set()
    await serving
    built = await stores.runs.get(run.id)
    assert built.dataset is not None
    manifest = await stores.datasets.get(built.dataset)
    assert (manifest.rows, manifest.heldout) == (20, 0.5)
    assert (await stores.runs.get(refused.id)).reason.startswith("rank: there is no such setting")


async def test_brought_in_rows_pass_the_same_rules(
    stores: Stores, builder: Builder, artifacts: ArtifactStore
) -> None:
    from rollout.datasets import from_rows
    from rollout.formats import read_rows

    lines = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": gold}]}
        for text, gold in (("is it on?", "yes"), ("IS it on?", "Yes"), ("is it off now?", "no"))
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    rows = read_rows(content, ROUTE, by="ada")
    source = artifacts.put_document(from_rows(rows.rows).content)
    recipe = replace(RECIPE, source=source, file="file.jsonl")
    dataset, manifest = await builder.build(dataset_run(), recipe, None, note, AT)
    assert sorted(row.gold for row in dataset.rows) in (["Yes", "no"], ["no", "yes"])
    assert manifest.dropped == {"repeats another": 1}
    assert manifest.source == "file.jsonl"


def test_settings_of_a_dataset_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="heldout"):
        Recipe.from_mapping({"heldout": 2}, has_suite=False)
    assert Recipe.from_mapping({}, has_suite=True).heldout == 0.0


def test_the_lines_of_a_suite_are_the_same_in_any_order(tmp_path: Path) -> None:
    prompts = [row.case.messages for row in sentences(5)]
    assert prompt_lines(prompts) == prompt_lines(prompts[::-1])


def moved(row: LabelledCase, seconds: float) -> LabelledCase:
    from datetime import timedelta

    at = row.label.labelled_at + timedelta(seconds=seconds)
    return replace(row, label=replace(row.label, labelled_at=at))
