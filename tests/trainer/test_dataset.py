"""The rules by which labels become rows."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.cases import LabelledCase
from rollout.errors import InvalidInputError
from tests.trainer.samples import labelled, sentences
from trainer.dataset import Dataset, compile_dataset, load, split_of


def compiled(*rows: LabelledCase, heldout: float = 0.2) -> Dataset:
    return compile_dataset(rows, heldout=heldout).dataset


def reasons(dataset: Dataset) -> dict[str, str]:
    return {each.case: each.reason for each in dataset.dropped}


def test_a_row_says_what_was_asked_what_is_right_and_who_said_so() -> None:
    dataset = compiled(labelled(1, "red or blue?", "red", labeler="ada"))
    (row,) = dataset.rows
    assert row.messages == ({"role": "user", "content": "red or blue?"},)
    assert (row.case, row.gold, row.labeler, row.inclusion) == ("c00001", "red", "ada", 0.5)


def test_a_correction_is_the_right_answer() -> None:
    (row,) = compiled(labelled(1, "red or blue?", "neither", correction="purple")).rows
    assert row.gold == "purple"


def test_a_label_without_a_right_answer_leaves_what_was_refused() -> None:
    case = labelled(1, "red or blue?", "nothing that was answered")
    case = replace(case, label=replace(case.label, choice="neither"))
    dataset = compiled(case, heldout=0)
    assert (dataset.rows, dataset.dropped) == ((), ())
    (row,) = dataset.unanswered
    assert row.rejected == ("nothing that was answered", "something else")
    assert [each.desirable for each in dataset.unpaired("train")] == [False, False]


def test_repeats_are_dropped_and_the_oldest_stays() -> None:
    dataset = compiled(
        labelled(3, "Is it red?", "yes"),
        labelled(1, "is  it RED?", "Yes"),
        labelled(2, "is it blue?", "no"),
    )
    assert [row.case for row in dataset.rows] == ["c00001", "c00002"]
    assert reasons(dataset) == {"c00003": "repeats another"}


def test_near_repeats_are_dropped_where_the_answer_is_the_same() -> None:
    long = "the battery of this camera lasted for three whole days of walking through the alps"
    dataset = compiled(
        labelled(1, long, "good"),
        labelled(2, f"{long}!", "good"),
        labelled(3, "the screen broke on the very first day and nobody answered the phone", "bad"),
    )
    assert reasons(dataset) == {"c00002": "nearly repeats another"}


def test_near_repeats_with_another_answer_stay_and_share_a_split() -> None:
    text = "the battery of this camera did {}last for three whole days of walking in the alps"
    dataset = compiled(
        labelled(1, text.format(""), "good"),
        labelled(2, text.format("not "), "bad"),
        labelled(3, "the screen broke on the very first day and nobody answered the phone", "bad"),
    )
    first, second, other = dataset.rows
    assert first.cluster == second.cluster != other.cluster
    assert first.split == second.split


def test_instructions_that_come_with_every_request_make_no_two_rows_alike() -> None:
    instruction = "Say of this sentence from a review whether it is good or bad. " * 10
    rows = [
        replace(
            each,
            case=replace(
                each.case,
                messages=(
                    {"role": "system", "content": instruction},
                    *each.case.messages,
                    {"role": "user", "content": instruction},
                ),
            ),
        )
        for each in sentences(60)
    ]
    assert len(compile_dataset(rows, heldout=0.2).dataset.rows) == 60


def test_a_contradiction_is_settled_by_a_majority_or_dropped() -> None:
    dataset = compiled(
        labelled(1, "warm?", "yes"),
        labelled(2, "warm?", "no"),
        labelled(3, "warm?", "no"),
        labelled(4, "cold?", "yes"),
        labelled(5, "cold?", "no"),
    )
    assert [(row.case, row.gold) for row in dataset.rows] == [("c00002", "no")]
    assert [each.settled for each in dataset.contradictions] == ["no", None]
    assert reasons(dataset)["c00001"] == "contradicted by the majority"
    assert reasons(dataset)["c00004"] == "labels contradict each other"


def test_what_a_suite_asks_is_never_trained_on() -> None:
    suite = [[{"role": "user", "content": "IS it red today in the whole of the northern sky?"}]]
    rows = [labelled(1, "is it red today in the whole of the northern sky", "yes"), *sentences(9)]
    dataset = compile_dataset(rows, heldout=0, suite_prompts=suite).dataset
    assert reasons(dataset) == {"c00001": "is in an evaluation suite"}


def test_messages_in_parts_are_read_as_text_and_pictures_are_dropped() -> None:
    case = labelled(1, "", "yes")
    text = {"type": "text", "text": "is it red?"}
    picture: Any = {"type": "image_url", "image_url": {"url": "data:"}}

    def asked(parts: list[Any]) -> LabelledCase:
        message = {"role": "user", "content": parts}
        return replace(case, case=replace(case.case, messages=(message,)))

    (row,) = compiled(asked([text])).rows
    assert row.messages == ({"role": "user", "content": "is it red?"},)
    assert reasons(compiled(asked([text, picture]))) == {"c00001": "its messages are not text"}


def test_the_same_labels_in_any_order_are_the_same_dataset() -> None:
    rows = sentences(50)
    assert (
        compile_dataset(rows, heldout=0.2).dataset.digest
        == compile_dataset(rows[::-1], heldout=0.2).dataset.digest
    )


@given(st.lists(st.integers(0, 200), unique=True, min_size=1), st.integers(1, 100))
def test_later_labels_never_move_an_earlier_row(numbers: list[int], cut: int) -> None:
    rows = sorted((sentences(201)[number] for number in numbers), key=lambda row: row.case.id)
    before = compile_dataset(rows[:cut], heldout=0.3, validation=0.1).dataset
    after = {
        row.case: row.split
        for row in compile_dataset(rows, heldout=0.3, validation=0.1).dataset.rows
    }
    assert all(after[row.case] == row.split for row in before.rows)


@given(st.text(), st.floats(0, 0.4), st.floats(0, 0.4))
def test_a_larger_share_only_adds_to_the_heldout_rows(name: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert split_of(name, heldout=small) != "heldout" or split_of(name, heldout=large) == "heldout"


@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_a_dataset_reads_back_as_it_was_written(text: str, gold: str) -> None:
    dataset = compiled(labelled(1, text, gold))
    again = load(dataset.content)
    assert (again.digest, again.rows) == (dataset.digest, dataset.rows)


def test_a_broken_line_is_named() -> None:
    dataset = compile_dataset(sentences(3), heldout=0.2).dataset
    content = dataset.content + b'{"case": 1}\n'
    with pytest.raises(InvalidInputError, match="line 4"):
        load(content)


def test_the_stats_say_what_is_there_and_what_was_dropped() -> None:
    rows = [*sentences(30), labelled(30, sentences(1)[0].case.messages[0]["content"], "warm")]
    stats = compile_dataset(rows, heldout=0.2).dataset.stats
    assert stats["rows"] == 30
    assert sum(stats["splits"].values()) == 30
    assert stats["answers"] == {"warm": 10, "cold": 10, "mild": 10}
    assert stats["dropped"] == {"repeats another": 1}
    assert json.dumps(stats)
