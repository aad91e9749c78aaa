"""Suites: what may stand in a file, and what names one."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.datasets import Example, from_rows
from rollout.errors import InvalidInputError
from rollout.suites import (
    Scorer,
    SuiteManifest,
    SuiteRow,
    load_suite,
    make_suite,
    read_rows,
    read_scorer,
    sample_suite,
    suite_lines,
)
from trainer.suites import heldout_suite, infer_choices, read_suite

ROW = {"id": "1", "messages": [{"role": "user", "content": "hot?"}], "gold": "yes"}


def lines(*rows: object) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows)


def row(identity: str) -> SuiteRow:
    return SuiteRow(identity, ({"role": "user", "content": identity},), "yes")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        (lines(ROW) + b"\n{", "line 2: no valid JSON"),
        (lines(ROW) + b"\n\xff", "line 2: no UTF-8"),
        (lines([]), "line 1: no JSON object"),
        (b"[" * 100_000, "line 1: nested too deeply"),
        (lines({**ROW, "id": None}), "`id` is missing"),
        (lines({**ROW, "id": True}), "`id` is missing"),
        (lines({**ROW, "messages": "hot?"}), "`messages` is no list"),
        (lines({**ROW, "messages": []}), "`messages` is no list of messages"),
        (lines({**ROW, "messages": [{"content": "hot?"}]}), "`messages` is no list of messages"),
        (lines({**ROW, "gold": 3}), "`gold` is no text"),
        (lines({**ROW, "choices": ["no"]}), "`choices` is no list of texts that `gold` is in"),
        (lines({**ROW, "choices": ["yes", 3]}), "`choices`"),
        (lines({**ROW, "schema": "{"}), "`schema` is no JSON"),
        (lines({**ROW, "schema": [1]}), "`schema` is no JSON schema"),
        (lines({**ROW, "tags": [1]}), "`tags` is no list of texts"),
        (lines({**ROW, "labels": []}), "there is no field 'labels'"),
        (lines(ROW, ROW), "line 2: the id '1' occurs more than once; it is that of line 1"),
    ],
)
def test_a_broken_line_refuses_the_file_and_is_named(content: bytes, why: str) -> None:
    with pytest.raises(InvalidInputError, match=r"x\.jsonl") as caught:
        read_rows(content, "x.jsonl")
    assert why in caught.value.message


@given(
    st.lists(
        st.builds(
            SuiteRow,
            id=st.text(min_size=1),
            messages=st.just(({"role": "user", "content": "q"},)),
            gold=st.text(),
            tags=st.frozensets(st.text()).map(lambda tags: tuple(sorted(tags))),
            schema=st.sampled_from([None, '{"type": "object"}']),
        ),
        min_size=1,
        unique_by=lambda each: each.id,
    )
)
def test_a_stored_suite_is_read_back_as_it_was(rows: list[SuiteRow]) -> None:
    suite = make_suite("triage", rows, [Scorer("python", code="def grade(s, i): return 1")])
    manifest = SuiteManifest(
        suite.digest,
        suite.name,
        "triage",
        len(rows),
        suite.scorers,
        datetime(2026, 1, 1, tzinfo=UTC),
    )

    assert load_suite(manifest, suite_lines(suite)) == suite


def test_the_name_is_of_the_rows_and_scorers_whatever_their_order() -> None:
    one = make_suite("triage", [row("a"), row("b")])

    assert make_suite("triage", [row("b"), row("a")]) == one
    assert make_suite("triage", [row("a")]).digest != one.digest
    assert make_suite("triage", [row("a"), row("b")], [Scorer("exact")]).digest != one.digest


def test_a_part_of_a_suite_is_the_same_each_time_and_knows_its_whole() -> None:
    whole = make_suite("triage", [row(str(number)) for number in range(50)])
    part = sample_suite(whole, 10)

    assert part == sample_suite(whole, 10)
    assert len(part.rows) == 10
    assert (part.whole, part.digest != whole.digest) == (whole.digest, True)
    assert sample_suite(whole, 0) == sample_suite(whole, 50) == whole


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"kind": "vibes"}, "there is no scorer 'vibes'"),
        ({"kind": "exact", "treshold": 1}, "has no 'treshold'"),
        ({"kind": "exact", "threshold": 0}, "threshold must lie in"),
        ({"kind": "exact", "threshold": "high"}, "threshold"),
        ({"kind": "python"}, "grade(sample, item)"),
        ({"kind": "python", "code": "x" * 70_000}, "longer than 64 KiB"),
        ({"kind": "python", "code": "x", "seconds": 0}, "seconds must lie in"),
        ({"kind": "python", "code": "x", "memory_mb": 1}, "memory_mb must lie in"),
        ({"kind": "label_model", "labels": ["a"], "passing": ["b"]}, "which of them are passing"),
    ],
)
def test_a_scorer_that_makes_no_sense_is_refused(values: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_scorer(values)
    assert why in caught.value.message


def test_near_is_right_for_what_is_never_exact() -> None:
    assert read_scorer({"kind": "similarity"}).threshold == 0.9
    assert read_scorer({"kind": "similarity", "threshold": 0.5}).threshold == 0.5


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot read the suite"):
        read_suite("triage", tmp_path / "none.jsonl")


def test_a_tool_call_is_no_choice_among_the_rows_that_are_held_out() -> None:
    call = {"function": {"name": "find", "arguments": "{}"}}

    def example(number: int, gold: str, *calls: Mapping[str, Any]) -> Example:
        asked = ({"role": "user", "content": str(number)},)
        name = f"c{number}"
        return Example(name, asked, gold, "ada", "first", 1.0, name, "heldout", calls=calls)

    texts = [example(number, "yes" if number % 2 else "no") for number in range(6)]
    dataset = from_rows([*texts, *(example(number, "", call) for number in range(6, 12))])
    suite = heldout_suite("triage", dataset, None)
    assert {row.choices for row in suite.rows if not row.calls} == {("no", "yes")}
    assert {row.choices for row in suite.rows if row.calls} == {None}


def test_choices_are_short_answers_that_come_again() -> None:
    assert infer_choices(["a", "b"] * 3) == ("a", "b")
    assert infer_choices(["a", "b", "c"]) is None
    assert infer_choices(["a"] * 9) is None
    assert infer_choices(["x" * 65, "y"] * 5) is None
