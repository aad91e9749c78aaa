"""The benchmark of extraction: its sentences, its marks, and base and adapter on a real engine."""

import json
from pathlib import Path

import pytest

from benchmarks import tuning
from benchmarks.extraction import (
    KINDS,
    SCHEMA,
    Fields,
    Sentence,
    choose,
    dataset_of,
    fields_of,
    parse_names,
    read_sentences,
    suite_of,
)
from rollout.evaluation import EvaluationRules
from tests.engines import VllmServer
from trainer.base import BaseModel
from trainer.config import TrainingConfig
from trainer.evaluate import Graded
from trainer.graders import Given, mark
from trainer.suites import Suite

NOBODY = dict.fromkeys(KINDS, ())


def sentence(number: int, *, named: bool = True) -> Sentence:
    names = {**NOBODY, "person": ("Borrower",), "location": ("Akron", "Ohio")} if named else NOBODY
    return Sentence(f"Clause {number} of {number * 7919 % 1000} binds no. {number * 31}.", names)


@pytest.mark.parametrize(
    ("ideal", "names"),
    [
        ("No entities found", NOBODY),
        ("[Bank - ORGANIZATION]", {**NOBODY, "organization": ["Bank"]}),
        (
            "[40 William St., Ste. 3, Wellesley - LOCATION, Bank - PERSON, Bank - PERSON]",
            {**NOBODY, "location": ["40 William St., Ste. 3, Wellesley"], "person": ["Bank"]},
        ),
        (
            "[A - B Corp - ORGANIZATION, Ann - PERSON]",
            {**NOBODY, "organization": ["A - B Corp"], "person": ["Ann"]},
        ),
    ],
)
def test_names_are_read_with_their_kind_and_once(ideal: str, names: dict[str, list[str]]) -> None:
    found = parse_names(ideal)
    assert {kind: list(found[kind]) for kind in KINDS} == {k: list(v) for k, v in names.items()}


def test_what_is_too_long_to_be_answered_is_not_asked() -> None:
    def line(text: str, ideal: str) -> bytes:
        return json.dumps({"input": [{"content": ""}, {"content": text}], "ideal": ideal}).encode()

    many = ", ".join(f"P{number} - PERSON" for number in range(9))
    lines = [line("good", "[Bank - PERSON]"), line("x" * 501, "[Bank - PERSON]")]
    lines += [line("many", f"[{many}]"), line("long", f"[{'n' * 61} - PERSON]")]
    assert [each.text for each in read_sentences(b"\n".join(lines))] == ["good"]


def test_a_quarter_of_the_rows_name_nobody() -> None:
    every = [sentence(number, named=number % 2 == 0) for number in range(100)]
    chosen = choose(every, 40)
    assert [len(chosen), sum(each.named for each in chosen)] == [40, 30]


def test_the_right_answer_has_full_marks_and_the_schema_allows_it() -> None:
    suite = suite_of(dataset_of([sentence(number) for number in range(60)], validation=0.0))
    assert suite.rows
    for row in suite.rows:
        assert [mark(each, row, Given(row.gold)).value for each in suite.scorers] == [1.0, 1.0]


def test_names_are_counted_over_all_rows() -> None:
    suite = suite_of(dataset_of([sentence(number) for number in range(60)], validation=0.0))
    part = Suite("part", suite.rows[:2], suite.scorers)
    answer = '{"person": ["borrower"], "organization": ["Ohio"], "location": []}'
    answers = [
        Graded(row.id, text, right=False, seconds=0.0)
        for row, text in zip(part.rows, (answer, "cut off {"), strict=True)
    ]
    found = fields_of(part, answers)
    assert found == Fields(right=1, given=2, wanted=6)
    assert str(found) == "25.0% (precision 50.0%, recall 16.7%)"


@pytest.mark.slow
@pytest.mark.vllm
def test_an_adapter_beats_its_base_by_field_f1_on_a_real_engine(
    tiny_model_dir: Path, vllm_engine: VllmServer, tmp_path: Path
) -> None:
    base = BaseModel.open(vllm_engine.base, tiny_model_dir)
    dataset = dataset_of([sentence(number) for number in range(40)], validation=0.0)
    settings = {"epochs": 5, "learning_rate": 0.01, "minimum_rows": 1}
    adapter = tuning.train(
        base, dataset, TrainingConfig.from_mapping(settings), threads=1, cache=tmp_path
    )
    again = tuning.train(
        base, dataset, TrainingConfig.from_mapping(settings), threads=1, cache=tmp_path
    )
    assert (again.folder, again.seconds) == (adapter.folder, 0.0)

    whole = suite_of(dataset)
    suite = Suite(whole.name, whole.rows[:3], whole.scorers, whole.digest)
    engine = tuning.Engine(vllm_engine.url, vllm_engine.base)
    ways = [
        (way, name, *engine.ask(model, suite, schema=SCHEMA))
        for way, name, model in (
            ("version", "adapter", engine.load(adapter.folder)),
            ("parent", "base", engine.base),
        )
    ]
    found = tuning.report(suite, ways, EvaluationRules())
    assert found.metric == "field_f1"
    tuned, untuned = found.scores
    assert tuned.mean > 0.9 > untuned.mean
    assert tuned.metrics["json_valid"] == 1.0
    assert "| adapter | " in tuning.table(found)
