"""What each scorer makes of an answer, and what becomes of graders that misbehave."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from rollout.engines import Engine
from rollout.errors import ConfigError
from rollout.routes import Judge
from rollout.suites import Scorer, ScorerKind, SuiteRow, read_scorer
from tests.trainer.answering import Body, Reply, answering, last_question
from trainer.graders import Given, mark, names
from trainer.referee import Asked, Referee, whom
from trainer.sandbox import PythonGrader

CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"id": 7}'}}


def row(gold: str = "", **more: Any) -> SuiteRow:
    return SuiteRow("1", ({"role": "user", "content": "q"},), gold, **more)


@pytest.mark.parametrize(
    ("kind", "gold", "answer", "expected"),
    [
        ("auto", "warm", " WARM ", 1),
        ("auto", "warm", "it is warm", 0),
        ("exact", "warm", "Warm", 0),
        ("exact", "warm", "warm", 1),
        ("normalised", "It’s warm", "it s WARM!", 1),
        ("normalised", "warm", "worm", 0),
        ("json_valid", "", "{}", 1),
        ("json_valid", "", "{", 0),
        ("field_f1", '{"a": 1, "b": "x"}', '{"a": 1.0, "b": "X "}', 1),
        ("field_f1", '{"a": 1, "b": 2}', '{"a": 1, "b": 3}', 0.5),
        ("field_precision", '{"a": 1, "b": 2}', '{"a": 1}', 1),
        ("field_recall", '{"a": 1, "b": 2}', '{"a": 1}', 0.5),
        ("field_f1", '{"a": [1, 2]}', '{"a": [2, 1]}', 1),
        ("field_f1", '{"a": [1, 2]}', '{"a": [1, 1]}', 0.5),
        ("field_f1", '{"a": null}', "{}", 1),
        ("field_f1", '{"a": 1}', "[[", 0),
        ("field_f1", '{"a": true}', '{"a": 1}', 0),
        ("similarity", "abcd", "abcd", 1),
        ("similarity", "abcd", "abxd", 0.75),
        ("similarity", "abcd", "", 0),
    ],
)
def test_the_mark_of_an_answer(kind: ScorerKind, gold: str, answer: str, expected: float) -> None:
    assert mark(Scorer(kind), row(gold), Given(answer)).value == pytest.approx(expected)


def test_json_is_right_where_it_satisfies_the_schema_and_equals_the_gold() -> None:
    schema = json.dumps({"type": "object", "required": ["n"]})
    one = row('{"n": 1}', schema=schema)

    assert mark(Scorer(), one, Given('{"n": 1.0}')).value == 1
    assert mark(Scorer(), one, Given('{"n": 2}')).value == 0
    assert mark(Scorer("json_valid"), one, Given('{"n": 2}')).value == 1
    assert mark(Scorer("json_valid"), one, Given('{"m": 2}')).value == 0
    assert mark(Scorer("json_valid", schema='{"type": "array"}'), one, Given("[]")).value == 1


@pytest.mark.parametrize(
    ("arguments", "expected"), [('{"id": 7}', 1), ('{ "id": 7.0 }', 1), ('{"id": 8}', 0.5)]
)
def test_tool_calls_are_compared_by_name_and_arguments(arguments: str, expected: float) -> None:
    given = {"type": "function", "function": {"name": "find", "arguments": arguments}}

    assert mark(Scorer("tool_call"), row(calls=(CALL,)), Given("", (given,))).value == expected
    assert mark(Scorer(), row(calls=(CALL,)), Given("", (given,))).value == expected


def test_no_tool_call_is_right_where_none_was_asked_for() -> None:
    assert mark(Scorer("tool_call"), row(), Given("just a text")).value == 1
    assert mark(Scorer("tool_call"), row(calls=(CALL,)), Given("text")).value == 0
    assert mark(Scorer("tool_call"), row(), Given("", (CALL,))).value == 0


def test_scorers_of_one_kind_are_numbered() -> None:
    assert names((Scorer("exact"), Scorer("judge"), Scorer("exact"))) == (
        "exact",
        "judge",
        "exact-2",
    )


HOSTILE: Mapping[str, tuple[str, str]] = {
    "raises": ("def grade(s, i): return 1 / 0", "ZeroDivisionError"),
    "hangs": ("def grade(s, i):\n while True: pass", "longer than 0.4 s"),
    "sleeps": ("import time\ndef grade(s, i): time.sleep(99)", "longer than 0.4 s"),
    "dies": ("import os\ndef grade(s, i): os._exit(3)", "status 3"),
    "kills": ("import os\ndef grade(s, i): os.kill(os.getppid(), 9)", "not for graders"),
    "exits": ("def grade(s, i): raise SystemExit", "the grader ended"),
    "text": ("def grade(s, i): return 'rubbish'", "ValueError"),
    "nothing": ("def grade(s, i): pass", "TypeError"),
    "too much": ("def grade(s, i): return 7", "between 0 and 1"),
    "no number": ("def grade(s, i): return float('nan')", "between 0 and 1"),
    "memory": ("def grade(s, i): return len(bytearray(10**10))", "MemoryError"),
    "network": (
        "import socket\ndef grade(s, i): socket.create_connection(('127.0.0.1', 9))",
        "not for graders",
    ),
    "files": ("def grade(s, i): open('there', 'w')", "not for graders"),
    "processes": ("import os\ndef grade(s, i): os.fork()", "not for graders"),
    "code": ("def grade(s, i) return 1", "SyntaxError"),
    "no grade": ("x = 1", "KeyError"),
    "rubbish": (
        "import os\ndef grade(s, i):\n"
        " for f in range(3, 20):\n  try: os.write(f, b'rubbish\\n')\n  except OSError: pass\n"
        " return 1",
        "where a mark was due",
    ),
    "a list": (
        "import os\ndef grade(s, i):\n"
        " for f in range(3, 20):\n  try: os.write(f, b'[1]\\n')\n  except OSError: pass\n"
        " return 1",
        "where a mark was due",
    ),
}
# Whoever else answers in time has all the time that a slow machine takes.
SECONDS = {"hangs": 0.4, "sleeps": 0.4}


@pytest.mark.anyio
@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_grader_that_misbehaves_is_an_error_of_its_row(kind: str) -> None:
    code, why = HOSTILE[kind]
    seconds = SECONDS.get(kind, 60.0)
    grader = PythonGrader(Scorer("python", code=code, seconds=seconds, memory_mb=256))
    try:
        for _ in range(2):
            got = await grader.mark(row("warm"), Given("warm"))
            assert got.value == 0
            assert got.error is not None
            assert why in got.error
    finally:
        await grader.close()


@pytest.mark.anyio
async def test_the_next_row_has_a_new_process() -> None:
    code = "import os\ndef grade(s, i):\n if s['output_text'] == 'die': os._exit(1)\n return 0.5"
    grader = PythonGrader(Scorer("python", code=code))
    try:
        marks = [await grader.mark(row(), Given(text)) for text in ("a", "die", "b")]
    finally:
        await grader.close()
    assert [got.value for got in marks] == [0.5, 0, 0.5]
    assert [got.error is None for got in marks] == [True, False, True]


@pytest.mark.anyio
async def test_a_python_grader_sees_the_answer_and_the_row_and_may_print() -> None:
    code = (
        "import difflib\ndef grade(sample, item):\n print('x' * 100000)\n"
        " return difflib.SequenceMatcher(None, sample['output_text'], item['gold']).ratio()"
    )
    grader = PythonGrader(Scorer("python", code=code))
    try:
        assert (await grader.mark(row("warm"), Given("warm"))).value == 1
        assert (await grader.mark(row("warm"), Given("zzzz"))).value == 0
    finally:
        await grader.close()


def judging(body: Body) -> Reply:
    """Honest: better is the one that says "warm", in whatever order."""
    seen = json.loads(last_question(body))
    right = {side for side in "AB" if seen[side]["text"] == "warm"}
    return json.dumps({"better": right.pop() if len(right) == 1 else "neither"})


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("reply", "answer", "expected"),
    [
        (judging, "warm", 1.0),
        (judging, "cold", 0.0),
        (lambda body: '{"better": "A"}', "cold", 0.5),
        (lambda body: '{"better": "neither"}', "cold", 1.0),
    ],
)
async def test_a_judge_is_asked_in_both_orders(reply: Any, answer: str, expected: float) -> None:
    async with answering(reply) as engine:
        referee = Referee(Scorer("judge"), Asked(engine.url, None, "big"))
        got = await referee.mark(row("warm"), Given(answer))
        await referee.close()
        orders = [json.loads(last_question(body))["A"]["text"] for body in engine.asked]
    assert (got.value, got.error) == (expected, None)
    assert orders == ["warm", answer]


@pytest.mark.anyio
@pytest.mark.parametrize("reply", [lambda body: "well, it depends", lambda body: 400])
async def test_a_judge_without_a_verdict_is_an_error_of_the_row(reply: Any) -> None:
    async with answering(reply) as engine:
        referee = Referee(Scorer("judge"), Asked(engine.url, None, "big"))
        got = await referee.mark(row("warm"), Given("cold"))
        await referee.close()
    assert got.error is not None
    assert "big gave no verdict" in got.error


@pytest.mark.anyio
async def test_a_label_model_passes_what_is_among_the_passing() -> None:
    scorer = read_scorer(
        {"kind": "label_model", "labels": ["right", "wrong"], "passing": ["right"], "model": "big"}
    )

    def reply(body: Body) -> Reply:
        seen = json.loads(last_question(body))
        return json.dumps({"label": "right" if seen["answer"] == seen["right"] else "wrong"})

    async with answering(reply) as engine:
        referee = Referee(scorer, Asked(engine.url, "key", "big"))
        marks = [await referee.mark(row("warm"), Given(text)) for text in ("warm", "cold")]
        await referee.close()
    assert [got.value for got in marks] == [1, 0]


def test_who_is_asked() -> None:
    engines = {"main": Engine("main", ("http://one", "http://two"), "tiny", api_key="secret")}
    gateway = Asked("http://gateway", "key", "")

    assert whom(Scorer("judge", engine="main"), engines, None, gateway) == Asked(
        "http://one", "secret", "tiny"
    )
    assert whom(Scorer("judge", model="big@2"), engines, None, gateway).url == "http://gateway"
    assert whom(Scorer("judge"), engines, Judge("main", "big"), gateway).model == "big"
    with pytest.raises(ConfigError, match="asks nobody"):
        whom(Scorer("judge"), engines, None, gateway)
    with pytest.raises(ConfigError, match="does not have"):
        whom(Scorer("judge", engine="none"), engines, None, gateway)
