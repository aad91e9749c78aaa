"""Reports on versions that are asked through a gateway, on a real store."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from rollout.artifacts import ArtifactStore
from rollout.datasets import from_rows, prompt_lines
from rollout.errors import (
    InvalidInputError,
    NotFoundError,
    RefusedError,
)
from rollout.evaluation import EvaluationRules
from rollout.routes import Route
from rollout.settings import Settings, check_section
from rollout.stores import Stores
from rollout.suites import Look, Scorer, Suite, SuiteManifest, make_suite, suite_lines
from rollout.versions import Version
from tests.trainer.answering import Answering, answering
from tests.trainer.colours import by_version, dataset, right, rows
from tests.trainer.samples import AT, ROUTE, settings_for
from trainer.evaluate import Graded
from trainer.evaluator import Evaluator, Voice, Wish
from trainer.prompting import best, candidates
from trainer.reporting import Price, beforehand, cost_per_success
from trainer.settings import TrainerSettings

pytestmark = pytest.mark.anyio


@dataclass
class Heard:
    lines: list[str] = field(default_factory=list)

    def voice(self) -> Voice:
        async def say(line: str) -> None:
            self.lines.append(line)

        async def progress(what: str, done: int, total: int, eta: float) -> None:
            assert 0 < done <= total
            assert eta >= 0

        return Voice(say, progress)


@dataclass
class House:
    stores: Stores
    settings: Settings
    engine: Answering
    heard: Heard = field(default_factory=Heard)
    prices: dict[str, Any] = field(default_factory=dict)

    @property
    def evaluator(self) -> Evaluator:
        own = check_section(TrainerSettings, self.settings.trainer, "trainer")
        artifacts = ArtifactStore(self.settings.artifacts_url)
        return Evaluator(self.stores, artifacts, self.settings, own)

    async def wish(self, suite: Suite, **more: Any) -> Wish:
        rules = more.pop("rules", EvaluationRules(prompt=False))
        route = replace(await self.stores.rollouts.route(ROUTE), evaluation=rules)
        version = await self.stores.rollouts.version(f"{ROUTE}@2")
        parent = await self.stores.rollouts.version(f"{ROUTE}@1")
        return Wish(route, version, parent, suite, **{"run": "r1", "by": "ada", **more})

    async def report(self, suite: Suite, **more: Any) -> Any:
        return await self.evaluator.evaluate(await self.wish(suite, **more), self.heard.voice())


@pytest.fixture
async def house(stores: Stores, redis_url: str, tmp_path: Path) -> AsyncIterator[House]:
    tuned = Version(ROUTE, 0, "main", "tiny", AT, adapter="ab" * 32, adapter_path="/a")
    await stores.rollouts.register(tuned)
    async with answering(by_version) as engine:
        settings = settings_for(redis_url, tmp_path, tmp_path, gateway_url=engine.url)
        yield House(stores, settings, engine)


async def test_a_report_says_beforehand_what_it_can_show_and_then_what_it_saw(
    house: House,
) -> None:
    suite = make_suite(ROUTE, rows(60), [Scorer(), Scorer("similarity", threshold=0.9)])
    report = await house.report(suite)

    assert "60 rows show a gain of" in house.heard.lines[0]
    assert report.detectable is not None
    assert f"{report.detectable:.1%}" in house.heard.lines[0]
    assert report.outcome == "pass"
    ours, parents = report.scores
    assert (ours.way, ours.correct, parents.way, parents.correct) == ("version", 60, "parent", 20)
    assert (report.gained, report.lost) == (40, 0)
    assert report.low is not None
    assert 0.5 < report.low < 2 / 3 < (report.high or 0)
    assert (ours.low > 0.9, ours.high) == (True, 1.0)
    assert set(ours.metrics) == {"auto", "similarity"}
    assert (ours.prompt_tokens, ours.cost_per_success, ours.cost_unit) == (600, 12.0, "tokens")
    assert ours.p99_seconds >= ours.p50_seconds > 0
    assert [each.tag for each in report.slices] == ["even", "odd"]
    assert all(each.adjusted_p >= each.p_value for each in report.slices)
    assert await house.stores.reports.get(report.id) == report
    assert await house.stores.reports.get(report.id[:10]) == report
    assert await house.stores.reports.of(f"{ROUTE}@2") == report


async def test_a_report_is_named_by_what_it_says(house: House) -> None:
    report = await house.report(make_suite(ROUTE, rows(12)))
    again = await house.report(make_suite(ROUTE, rows(12)))

    assert len(report.id) == 64
    assert again.id != report.id
    assert replace(again, id="", created_at=AT, looks=1, churn=None, detectable=None) == replace(
        report, id="", created_at=AT, looks=1, churn=None, detectable=None
    )


async def test_answers_are_kept_and_not_asked_for_again(house: House) -> None:
    suite = make_suite(ROUTE, rows(12))
    first = await house.report(suite)
    asked = len(house.engine.asked)
    second = await house.report(suite, run="r2")

    assert asked == 24
    assert len(house.engine.asked) == asked
    assert any("not asked again" in line for line in house.heard.lines)
    assert [score.answers for score in second.scores] == [score.answers for score in first.scores]
    await house.report(suite, run="r3", fresh=True)
    assert len(house.engine.asked) == 2 * asked
    await house.report(suite, run="r4", rules=EvaluationRules(latency_ratio=9, prompt=False))
    assert len(house.engine.asked) == 3 * asked


async def test_kept_answers_that_are_gone_are_asked_for_anew(house: House) -> None:
    suite = make_suite(ROUTE, rows(12))
    report = await house.report(suite)
    artifacts = ArtifactStore(house.settings.artifacts_url)
    assert report.scores[0].answers is not None
    folder = Path(house.settings.artifacts_url.removeprefix("file://")) / "documents"
    (folder / report.scores[0].answers).unlink()

    again = await house.report(suite, run="r2")
    assert again.scores[0].correct == 12
    assert artifacts.document(again.scores[0].answers or "")


async def test_what_differed_last_time_is_what_is_expected_next_time(house: House) -> None:
    suite = make_suite(ROUTE, rows(60))
    first = await house.report(suite)
    second = await house.report(suite, run="r2")

    assert (first.churn, second.churn) == (0.2, pytest.approx(40 / 60))
    assert second.detectable > first.detectable


async def test_each_version_that_a_suite_judges_is_counted_once_for_a_run(house: House) -> None:
    suite = make_suite(ROUTE, rows(12))
    rules = EvaluationRules(prompt=False, maximum_looks=2)
    assert (await house.report(suite, rules=rules)).looks == 1
    assert (await house.report(suite, rules=rules)).looks == 1
    for number in range(3, 5):
        look = Look(suite.digest, f"{ROUTE}@{number}", "r", AT)
        await house.stores.suites.look(look)
    worn = await house.report(suite, rules=rules)

    assert worn.looks == 3
    assert any("has judged 3 versions, more than the 2" in note for note in worn.notes)
    assert len(await house.stores.suites.looks(suite.digest)) == 3


async def test_a_look_counts_though_the_evaluation_comes_to_nothing(house: House) -> None:
    house.engine.reply = lambda body: 404
    suite = make_suite(ROUTE, rows(12))
    with pytest.raises(NotFoundError):
        await house.report(suite)
    assert len(await house.stores.suites.looks(suite.digest)) == 1


async def test_the_best_prompt_is_found_in_the_dataset_alone_and_stands_beside(
    house: House,
) -> None:
    suite = make_suite(ROUTE, rows(30))
    found = dataset(90)
    report = await house.report(suite, dataset=found, rules=EvaluationRules(prompt_rows=12))

    assert [each.way for each in report.beside] == ["prompt"]
    assert report.scores[2].correct == 30
    assert any("as good" in note for note in report.notes)
    shown = {each["content"] for each in report.prompt if each["role"] == "user"}
    assert shown
    assert shown <= {row.messages[0]["content"] for row in found.split("train")}
    suites = {row.messages[0]["content"] for row in suite.rows}
    examples = {
        message["content"]
        for body in house.engine.asked
        for message in body["messages"][:-1]
        if message["role"] == "user"
    }
    assert not examples & suites


async def test_a_way_that_cannot_be_asked_is_named_and_stops_nothing(house: House) -> None:
    rules = EvaluationRules(prompt=False, larger="nowhere")
    report = await house.report(make_suite(ROUTE, rows(12)), rules=rules)

    assert report.outcome == "pass"
    assert len(report.scores) == 2
    assert any("route nowhere was not evaluated" in note for note in report.notes)


async def test_a_larger_route_stands_beside(house: House) -> None:
    await house.stores.rollouts.put_route(
        Route(name="large", engine="main"), by="test", at=AT, base="large"
    )
    rules = EvaluationRules(prompt=False, larger="large")
    report = await house.report(make_suite(ROUTE, rows(12)), rules=rules)

    assert [(each.way, each.version) for each in report.scores[2:]] == [("larger", "large@1")]
    assert report.beside[0].difference == 0


async def test_the_bare_base_stands_beside_where_it_is_not_the_parent(house: House) -> None:
    other = Version(ROUTE, 0, "main", "tiny", AT, adapter="cd" * 32, adapter_path="/c")
    third = await house.stores.rollouts.register(other)
    wish = await house.wish(make_suite(ROUTE, rows(12)))
    report = await house.evaluator.evaluate(
        replace(wish, version=third, parent=wish.version), house.heard.voice()
    )

    assert [each.way for each in report.scores] == ["version", "parent", "base"]
    assert report.outcome == "inconclusive"
    assert "more rows would not help" in report.reason


async def test_a_suite_that_a_version_was_trained_on_says_so(house: House) -> None:
    learnt = from_rows(replace(row, split="train") for row in dataset(30, start=0).rows)
    wish = await house.wish(make_suite(ROUTE, rows(12)), dataset=learnt)
    wish = replace(wish, version=replace(wish.version, dataset=learnt.digest))
    report = await house.evaluator.evaluate(wish, house.heard.voice())

    assert any("was trained on" in note for note in report.notes)


async def test_what_a_suite_asks_is_remembered_before_it_is_asked(house: House) -> None:
    suite = make_suite(ROUTE, rows(12))
    await house.report(suite)
    (use,) = await house.stores.datasets.suites()
    artifacts = ArtifactStore(house.settings.artifacts_url)
    assert artifacts.document(use.prompts) == prompt_lines(row.messages for row in suite.rows)
    assert artifacts.document(suite.digest) == suite_lines(suite)


async def test_a_grader_that_fails_is_an_error_of_its_rows_and_noted(house: House) -> None:
    code = "def grade(sample, item): return 1 / (item['id'] != '0003')"
    report = await house.report(make_suite(ROUTE, rows(12), [Scorer("python", code=code)]))

    assert (report.metric, report.scores[0].correct, report.scores[0].errors) == ("python", 11, 1)
    assert {each.row for each in report.errors} == {"0003"}
    assert any("look at the errors" in note for note in report.notes)


async def test_marks_between_right_and_wrong_are_compared_by_their_mean(house: House) -> None:
    schema = '{"type": "object"}'
    suite = make_suite(
        ROUTE,
        [
            replace(row, gold=json.dumps({"a": row.gold, "b": 1}), choices=None, schema=schema)
            for row in rows(30)
        ],
        [Scorer("field_f1")],
    )
    house.engine.reply = lambda body: json.dumps(
        {"a": right(body), "b": 1 if body["model"].endswith("@2") else 2}
    )
    report = await house.report(suite)

    assert (report.metric, report.scores[0].mean, report.scores[1].mean) == ("field_f1", 1.0, 0.5)
    assert (report.scores[1].correct, report.gained, report.outcome) == (0, 30, "pass")


async def test_a_registered_suite_is_used_where_there_is_no_file_and_a_vault_never(
    house: House,
) -> None:
    assert await house.evaluator.suite(ROUTE) is None
    artifacts = ArtifactStore(house.settings.artifacts_url)
    for vault, start in ((False, 0), (True, 50)):
        suite = make_suite(ROUTE, rows(12, start), vault=vault)
        artifacts.put_document(suite_lines(suite))
        manifest = SuiteManifest(
            suite.digest, suite.name, ROUTE, 12, suite.scorers, AT, vault=vault
        )
        await house.stores.suites.put(manifest)
    found = await house.evaluator.suite(ROUTE)
    assert found == make_suite(ROUTE, rows(12))
    config = {"version": f"{ROUTE}@2", "against": f"{ROUTE}@1", "suite": suite.digest}
    with pytest.raises(RefusedError, match="vault"):
        await house.evaluator.wish(config, ROUTE, "r", "ada")
    wish = await house.evaluator.wish({**config, "purpose": "promotion"}, ROUTE, "r", "ada")
    assert wish.suite.vault
    file = house.settings.data_path / "suites" / f"{ROUTE}.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"id": 1, "messages": [{"role": "user", "content": "q"}], "gold": "a"}\n')
    assert len((await house.evaluator.suite(ROUTE) or found).rows) == 1


async def test_an_evaluation_without_a_suite_or_with_a_wrong_setting_is_refused(
    house: House,
) -> None:
    config = {"version": f"{ROUTE}@2", "against": f"{ROUTE}@1"}
    with pytest.raises(InvalidInputError, match="sluice suite add"):
        await house.evaluator.wish(config, ROUTE, "r", "ada")
    with pytest.raises(InvalidInputError, match="no setting 'speed'"):
        await house.evaluator.wish({**config, "speed": 1}, ROUTE, "r", "ada")


def test_prompts_are_the_same_each_time_and_judged_by_other_rows() -> None:
    one, again = (candidates(ROUTE, dataset(60), None, 10) for _ in range(2))

    assert one == again
    assert one is not None
    assert len(one.prompts) >= 4
    assert len(set(map(json.dumps, one.prompts))) == len(one.prompts)
    judging = {row.messages[0]["content"] for row in one.suite.rows}
    examples = {each["content"] for prompt in one.prompts for each in prompt}
    assert not judging & examples
    assert len(one.suite.rows) == 10


def test_no_prompt_is_looked_for_where_there_are_no_rows() -> None:
    assert candidates(ROUTE, from_rows([]), None, 10) is None


def test_of_equal_prompts_the_shortest_is_taken() -> None:
    prompts = [({"role": "user", "content": "x" * length},) for length in (9, 3, 5)]

    assert best([4, 4, 2], prompts) == 1
    assert best([4, 3, 5], prompts) == 2


def test_what_is_said_beforehand_fits_the_rows() -> None:
    few = beforehand(make_suite(ROUTE, rows(5)), EvaluationRules(), None)

    assert few.detectable is None
    assert "cannot show any difference" in str(few)


@pytest.mark.parametrize(
    ("price", "expected", "unit"),
    [
        (None, 48.0, "tokens"),
        (Price(prompt=1e6, completion=2e6), 20 * 4 / 2 + 4 * 4, "USD"),
        (Price(second=3.0, unit="EUR"), 3.0 * 4 / 2, "EUR"),
    ],
)
def test_the_cost_of_a_right_answer(price: Price | None, expected: float, unit: str) -> None:
    graded = [
        Graded(str(number), "", number < 2, 1.0, prompt_tokens=20, completion_tokens=4)
        for number in range(4)
    ]
    expected = expected if price is None or price.second else (80 * 1 + 16 * 2) / 2

    assert cost_per_success(graded, price) == (expected, unit)
    assert cost_per_success(graded[2:], price)[0] is None


async def test_a_version_beside_itself_is_asked_twice_and_is_no_better(house: House) -> None:
    wish = await house.wish(make_suite(ROUTE, rows(12)))
    report = await house.evaluator.evaluate(replace(wish, parent=wish.version), house.heard.voice())

    assert house.engine.models().count(f"{ROUTE}@2") == 24
    assert (report.outcome, report.gained, report.lost) == ("inconclusive", 0, 0)
    assert any("beside itself" in note for note in report.notes)
