"""The rules by which labels become rows."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.cases import Case, Choice, LabelledCase
from rollout.datasets import difference
from rollout.errors import InvalidInputError
from tests.trainer.samples import AT, compiled, labelled, reasons, sentences
from trainer.dataset import (
    AS_GIVEN,
    Manner,
    cases_for,
    compile_dataset,
    load,
)
from trainer.dataset.answers import answer_key, compact


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


def test_several_instructions_make_no_two_rows_alike_either() -> None:
    instructions = [
        f"{name} reads what customers write. " + f"Say as {name} would what it is about. " * 20
        for name in ("ada", "grace")
    ]

    def under(place: int, each: LabelledCase) -> LabelledCase:
        text = f"{instructions[place % 2]} {each.case.messages[0]['content']}"
        message = {"role": "user", "content": text}
        return replace(each, case=replace(each.case, messages=(message,)))

    rows = [under(place, each) for place, each in enumerate(sentences(80))]
    assert len(compiled(*rows).rows) == 80


def test_what_a_system_message_tells_of_one_question_alone_is_compared() -> None:
    def about(each: LabelledCase, text: str) -> LabelledCase:
        messages = ({"role": "system", "content": text}, {"role": "user", "content": "Is it good?"})
        return replace(each, case=replace(each.case, messages=messages))

    rows = sentences(9)
    told = [about(each, each.case.messages[0]["content"]) for each in rows]
    assert len(compiled(*told).rows) == 9


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


def test_a_prompt_that_differs_in_how_its_letters_are_written_is_the_same() -> None:
    dataset = compiled(
        labelled(1, "caf\u00e9 or tea\u200b?", "tea"), labelled(2, "cafe\u0301 or tea?", "tea")
    )
    assert reasons(dataset) == {"c00002": "repeats another"}


def test_json_that_says_the_same_is_no_contradiction() -> None:
    dataset = compiled(
        labelled(1, "which queue?", '{"queue": "billing", "urgent": true}'),
        labelled(2, "which queue?", '{"urgent":true,"queue":"billing"}'),
    )
    assert not dataset.contradictions
    assert len(dataset.rows) == 1


COMPACT = Manner(compact_json=True)


def test_answers_that_are_held_to_a_schema_are_learnt_as_an_engine_may_write_them() -> None:
    row = labelled(1, "which queue?", '{"queue": "billing  desk", "cost": 1.50}')
    row = replace(row, case=replace(row.case, candidate=replace(row.case.candidate, text="[ 1 ]")))
    dataset = compile_dataset([row], heldout=0, manner=COMPACT).dataset
    (pair,) = dataset.preferences("train")
    assert (pair.chosen, pair.rejected) == ('{"queue":"billing  desk","cost":1.50}', "[1]")
    assert {each.answer for each in dataset.unpaired("train")} == {pair.chosen, pair.rejected}
    assert dataset.compacted == 2
    assert compiled(row, heldout=0).rows[0].gold == '{"queue": "billing  desk", "cost": 1.50}'


def test_corrections_and_answers_without_a_right_one_lose_white_space_too() -> None:
    corrected = labelled(1, "which queue?", "billing", correction='{"queue": null}')
    refused = labelled(2, "and which one is it now?", '{"queue": 7}')
    refused = replace(refused, label=replace(refused.label, choice="neither"))
    dataset = compile_dataset([corrected, refused], heldout=0, manner=COMPACT).dataset
    assert [row.gold for row in dataset.rows] == ['{"queue":null}']
    assert dataset.unanswered[0].rejected == ("something else", '{"queue":7}')


def test_tool_calls_and_what_is_said_with_them_stay_as_they_are() -> None:
    row = labelled(1, "open the door", '{"a": 1}')
    calls = ({"function": {"name": "open", "arguments": '{"door": 1}'}},)
    row = replace(row, case=replace(row.case, stable=replace(row.case.stable, tool_calls=calls)))
    dataset = compile_dataset([row], heldout=0, manner=COMPACT).dataset
    assert (dataset.rows[0].gold, dataset.rows[0].calls) == ('{"a": 1}', calls)
    assert dataset.compacted == 0


def test_a_contradiction_keeps_the_words_that_people_used() -> None:
    rows = [labelled(1, "which?", '{"queue": 1}'), labelled(2, "which?", '{"queue": 2}')]
    plain, compacted = (
        cases_for(
            compile_dataset(rows, heldout=0, manner=manner).dataset.contradictions,
            {row.case.id: row for row in rows},
            AT,
        )
        for manner in (AS_GIVEN, COMPACT)
    )
    assert plain == compacted
    assert plain[0].stable.text == '{"queue": 1}'


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Half a pair of surrogates is no Unicode, and never comes so far.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)


@given(VALUES, st.none() | st.integers(0, 4), st.booleans())
def test_only_white_space_goes_out_of_json(value: Any, indent: int | None, plain: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=plain)
    short = compact(text)
    assert short == json.dumps(value, separators=(",", ":"), ensure_ascii=plain)
    assert answer_key(short) == answer_key(text)
    assert compact(short) == short


@pytest.mark.parametrize(
    ("text", "learnt"),
    [
        (
            '{"b" : 1.50, "a": 1e5,\n"b": 12345678901234567890123}',
            '{"b":1.50,"a":1e5,"b":12345678901234567890123}',
        ),
        ("{ not JSON }", "{ not JSON }"),
        ('{"a": 1} and more', '{"a": 1} and more'),
        ('{"a": NaN}', '{"a": NaN}'),
        ("[ " * 100_000, "[ " * 100_000),
        ("[ " * 100_000 + "]" * 100_000, "[ " * 100_000 + "]" * 100_000),
        ("", ""),
    ],
    ids=["numbers", "braces", "two", "NaN", "open", "deep", "empty"],
)
def test_what_is_no_json_stays_and_numbers_are_as_they_were_written(text: str, learnt: str) -> None:
    assert compact(text) == learnt


def test_several_labels_of_a_case_all_count() -> None:
    row = labelled(1, "warm?", "yes")
    other: Choice = "second" if row.label.choice == "first" else "first"
    others = (
        replace(row.label, labeler="grace", choice=other),
        replace(row.label, labeler="barbara"),
    )
    (made,) = compiled(replace(row, others=others)).rows
    assert [(vote.labeler, vote.agrees) for vote in made.labels] == [
        ("ada", True),
        ("barbara", True),
        ("grace", False),
    ]
    assert made.weight == pytest.approx(2 / 3)


def test_preferences_come_from_choices_and_corrections_and_not_from_ties() -> None:
    chosen = labelled(1, "red or blue?", "red")
    corrected = labelled(2, "is it far away from here?", "neither", correction="not at all")
    both = labelled(3, "shall we begin with it now?", "yes")
    both = replace(
        both,
        case=replace(both.case, candidate=replace(both.case.candidate, text="yes, at once")),
        label=replace(both.label, choice="both"),
    )
    dataset = compiled(chosen, corrected, both, heldout=0)
    pairs = [(row.case, row.chosen, row.rejected) for row in dataset.preferences("train")]
    assert pairs == [
        ("c00001", "red", "something else"),
        ("c00002", "not at all", "neither"),
        ("c00002", "not at all", "something else"),
    ]
    alone = [row for row in dataset.unpaired("train") if row.case == "c00003"]
    assert sorted((row.answer, row.desirable) for row in alone) == [
        ("yes", True),
        ("yes, at once", True),
    ]


def test_a_suite_is_found_without_the_instructions_that_clients_send() -> None:
    instruction = "Say where this belongs. Answer in one word, and nothing else whatsoever. "
    rows = [
        replace(
            each,
            case=replace(
                each.case,
                messages=({"role": "system", "content": instruction}, *each.case.messages),
            ),
        )
        for each in sentences(12)
    ]
    suite = [rows[4].case.messages[1:]]
    dataset = compile_dataset(rows, heldout=0, suite_prompts=suite).dataset
    assert reasons(dataset) == {"c00004": "is in an evaluation suite"}


def test_text_that_no_file_can_hold_is_dropped() -> None:
    dataset = compiled(labelled(1, "half a pair: \ud800", "yes"))
    assert reasons(dataset) == {"c00001": "its text is no valid Unicode"}


def test_a_contradiction_asks_once_for_the_same_labels() -> None:
    rows = [labelled(1, "cold?", "yes"), labelled(2, "cold?", "no")]
    found = compiled(*rows).contradictions
    by_id = {row.case.id: row for row in rows}
    (case,) = cases_for(found, by_id, AT)
    assert case == cases_for(found, by_id, AT)[0]
    assert {answer.text for answer in case.answers} == {"yes", "no"}


def test_a_contradiction_shows_two_answers_that_say_different_things() -> None:
    rows = [labelled(n, "cold?", gold) for n, gold in enumerate(("YES", "Yes", "no", "No"))]
    (case,) = cases_for(compiled(*rows).contradictions, {row.case.id: row for row in rows}, AT)
    assert {answer.text for answer in case.answers} == {"No", "YES"}


def test_a_contradiction_of_tool_calls_shows_both() -> None:
    calls = [({"function": {"name": name, "arguments": "{}"}},) for name in ("open", "close")]

    def called(number: int) -> LabelledCase:
        row = labelled(number, "the door?", "")
        answer = replace(row.case.stable, tool_calls=calls[number])
        case = replace(row.case, stable=answer)
        return LabelledCase(case, replace(row.label, choice="first" if first(case) else "second"))

    def first(case: Case) -> bool:
        return bool(case.answers[0].tool_calls)

    rows = [called(0), called(1)]
    (case,) = cases_for(compiled(*rows).contradictions, {row.case.id: row for row in rows}, AT)
    assert sorted(answer.tool_calls[0]["function"]["name"] for answer in case.answers) == [
        "close",
        "open",
    ]


def test_what_changed_between_two_datasets_is_said() -> None:
    rows = sentences(3)
    before = compiled(*rows[:2], labelled(7, "warm?", "yes"))
    after = compiled(*rows[1:], labelled(7, "warm?", "yes"), labelled(8, "warm?", "no"))
    changes = difference(before, after, after.dropped)
    assert [(each.kind, each.case, each.why) for each in changes] == [
        ("removed", "c00000", "its case is not labelled any more"),
        ("added", "c00002", ""),
        ("removed", "c00007", "labels contradict each other"),
    ]


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
