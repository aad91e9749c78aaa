"""Versions asked through a gateway: how, how often, and what becomes of a row without an answer."""

from dataclasses import replace

import pytest

from rollout.errors import (
    AuthenticationError,
    NotFoundError,
)
from rollout.suites import make_suite
from tests.trainer.answering import Body, Reply, answering, last_question
from tests.trainer.colours import CHOICES, right, row, rows
from tests.trainer.samples import ROUTE
from trainer.evaluate import Gateway, answer_suite, held, with_examples

pytestmark = pytest.mark.anyio


async def test_a_version_is_asked_pinned_constrained_and_uncaptured() -> None:
    constrained = [
        replace(row(1), tags=()),
        replace(row(2), choices=None, schema='{"type": "object"}'),
        replace(row(3), choices=None, tools=({"type": "function"},)),
        replace(row(4), choices=None),
    ]
    async with answering(right) as engine:
        suite = make_suite(ROUTE, constrained)
        graded = await answer_suite(
            Gateway(engine.url, "key"), "triage@2", suite, schema='{"type": "string"}'
        )
    by_row = {last_question(body): body for body in engine.asked}
    one, two, three, four = (by_row[row.messages[0]["content"]] for row in constrained)
    assert one["structured_outputs"] == {"choice": list(CHOICES)}
    assert two["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert three["tools"] == [{"type": "function"}]
    assert "response_format" not in three
    assert four["response_format"]["json_schema"]["schema"] == {"type": "string"}
    assert all((body["model"], body["temperature"]) == ("triage@2", 0) for body in engine.asked)
    assert graded[0].right
    assert (graded[0].prompt_tokens, graded[0].completion_tokens) == (10, 2)


async def test_what_an_engine_refuses_is_wrong_and_says_why() -> None:
    async with answering(lambda body: 400 if "blue" in last_question(body) else right(body)) as one:
        graded = await answer_suite(Gateway(one.url, "key"), "v", make_suite(ROUTE, rows(6)))
    assert [each.right for each in graded] == [True, False, True] * 2
    assert graded[1].error == "400 as asked"
    assert len(one.asked) == 6


async def test_what_fails_for_a_while_is_asked_again() -> None:
    failed: set[str] = set()

    def reply(body: Body) -> Reply:
        question = last_question(body)
        if question in failed:
            return right(body)
        failed.add(question)
        return 503

    async with answering(reply) as engine:
        graded = await answer_suite(Gateway(engine.url, "key"), "v", make_suite(ROUTE, rows(3)))
    assert all(each.right for each in graded)
    assert len(engine.asked) == 6


@pytest.mark.parametrize(("status", "error"), [(401, AuthenticationError), (404, NotFoundError)])
async def test_what_no_try_can_mend_ends_the_evaluation(status: int, error: type) -> None:
    async with answering(lambda body: status) as engine:
        with pytest.raises(error):
            await answer_suite(Gateway(engine.url, "key"), "v", make_suite(ROUTE, rows(3)))


async def test_no_more_are_asked_at_once_than_may_be() -> None:
    told: list[tuple[int, int]] = []

    async def on_row(done: int, total: int) -> None:
        told.append((done, total))

    suite = make_suite(ROUTE, rows(12))
    async with answering(right) as engine:
        await answer_suite(Gateway(engine.url, "key", concurrency=2), "v", suite, on_row=on_row)
    assert len(engine.asked) == 12
    assert engine.most <= 2
    assert told == [(done, 12) for done in range(1, 13)]


def test_there_is_one_system_message_at_most() -> None:
    shots = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"})
    asked = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "b"})

    assert [each["role"] for each in with_examples(asked, shots)] == ["system", "user", "user"]
    assert with_examples(asked, shots)[0]["content"] == "Be brief.\n\nBe kind."
    assert with_examples(asked, ()) == asked


def test_a_route_s_schema_holds_only_rows_that_nothing_else_does() -> None:
    plain = replace(row(1), choices=None)

    assert held(plain, "{}").schema == "{}"
    assert held(row(1), "{}").schema is None
    assert held(replace(plain, schema="true"), "{}").schema == "true"
    assert held(plain, None) == plain
