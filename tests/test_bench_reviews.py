"""The benchmark of training on reviews: a model's answers, its datasets, what it says was met."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tuning
from benchmarks.reviews import Answers, Sentences, dataset_of, disagreeing, goals
from rollout.evaluation import EvaluationRules
from trainer import models
from trainer.base import BaseModel
from trainer.demo.sentences import CLASSES, Sentence, suite_rows
from trainer.evaluate import Graded, with_examples
from trainer.rendering import render_prompt
from trainer.suites import Suite, make_suite

TEXTS = (
    "The battery lasts all day, and then some.",
    "It broke within a week of careful use.",
    "I bought it in March.",
    "The zoom is slow and the pictures are dark.",
)


def sentence(number: int, text: str = "", split: Any = "train") -> Sentence:
    text = text or TEXTS[number % len(TEXTS)]
    return Sentence(f"s{number}", text, CLASSES[number % 3], 1.0, split)


def graded(suite: Suite, right: Sequence[bool]) -> list[Graded]:
    pairs = zip(suite.rows, right, strict=True)
    return [Graded(row.id, row.gold if good else "", good, 0.0) for row, good in pairs]


def test_a_row_gets_the_choice_that_the_model_gives_most(tiny_model_dir: Path) -> None:
    base = BaseModel.open("tiny", tiny_model_dir)
    model = models.load_base(base, torch.device("cpu"), torch.float32)
    tokenizer = models.load_tokenizer(base)
    prompt = ({"role": "user", "content": "Bad."}, {"role": "assistant", "content": "negative"})
    suite = make_suite("reviews", suite_rows([sentence(number) for number in range(4)]))

    found, _ = Answers(model, tokenizer).answer(suite, prompt)

    for row, answer in zip(suite.rows, found, strict=True):
        asked = render_prompt(tokenizer, with_examples(row.messages, prompt))
        likely = [_likelihood(model, asked, tokenizer.encode(each)) for each in CLASSES]
        assert answer.answer == CLASSES[likely.index(max(likely))]
        assert answer.right == (answer.answer == row.gold)


def _likelihood(model: Any, asked: Sequence[int], answer: Sequence[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*asked, *answer]])).logits[0].log_softmax(-1)
    places = range(len(asked) - 1, len(asked) + len(answer) - 1)
    return sum(float(logits[place, each]) for place, each in zip(places, answer, strict=True))


def test_what_is_learnt_asked_later_and_held_out_never_meet() -> None:
    every = [sentence(n, f"Sentence {n}", "heldout" if n % 4 == 0 else "train") for n in range(40)]
    found = Sentences.of(every, labelled=10, heldout=5, pool=8)
    parts = [{each.id for each in part} for part in (found.first, found.pool, found.heldout)]
    assert [len(part) for part in parts] == [10, 8, 5]
    assert len(set.union(*parts)) == 23
    assert all(each.split == "train" for each in (*found.first, *found.pool))


def test_a_sentence_that_comes_close_to_a_held_out_one_is_not_learnt() -> None:
    held = sentence(9, "The battery lasts all day and then some!", "heldout")
    dataset = dataset_of([sentence(number) for number in range(4)], [held], frozenset({"s2"}))
    assert [row.case for row in dataset.rows] == ["s1", "s2", "s3"]
    assert [row.split for row in dataset.rows] == ["train", "validation", "train"]
    assert "1 that is in an evaluation suite" in tuning.describe("first", dataset)


def test_people_are_asked_where_two_answers_differ() -> None:
    pool = [sentence(number) for number in range(3)]
    one = [Graded(each.id, "positive", right=True, seconds=0.0) for each in pool]
    other = [Graded("s0", "positive", right=True, seconds=0.0)]
    other += [Graded(f"s{n}", "negative", right=True, seconds=0.0) for n in (2, 1)]
    assert [each.id for each in disagreeing(pool, one, other)] == ["s1", "s2"]


@pytest.mark.parametrize(
    ("tuned", "prompt", "met"),
    [
        (80, 50, (True, True)),
        (76, 50, (False, True)),
        (80, 75, (True, False)),
        (77, 100, (True, False)),
    ],
)
def test_a_figure_is_met_or_it_is_said_that_it_is_not(
    tuned: int, prompt: int, met: tuple[bool, bool]
) -> None:
    suite = make_suite("reviews", suite_rows([sentence(number) for number in range(100)]))
    ways = [
        (way, way, graded(suite, [place < right for place in range(100)]), 1.0)
        for way, right in (("version", tuned), ("parent", 40), ("prompt", prompt))
    ]
    found = tuning.report(suite, ways, EvaluationRules())
    assert tuple(not line.endswith("NOT met") for line in goals(found)) == met
    lines = tuning.table(found).splitlines()
    assert lines[2].startswith(f"| version | {tuned}.0% ({tuned} of 100) |")
    assert lines[3].startswith("| parent | 40.0% (40 of 100) |")
    assert f" | {tuned - 40}, 0 | " in lines[3]


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("epochs=3", ("epochs", 3)),
        ("keep=last", ("keep", "last")),
        ("rslora=true", ("rslora", True)),
    ],
)
def test_a_training_setting_of_the_command_line(text: str, pair: tuple[str, object]) -> None:
    assert tuning.setting(text) == pair
