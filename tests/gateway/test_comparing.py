"""The steps of the comparing that ask an engine, and stable beside itself."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model2vec import StaticModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from rollout.agreement.judging import cohens_kappa, judgement, question, record, verdict_of
from rollout.agreement.meaning import semantic_score, similarity
from rollout.engines import Engine
from rollout.evidence import PairCounts
from rollout.exchanges import Answer, Exchange, Judgement
from rollout.policy import Policy
from rollout.routes import Judge, Route, Semantic
from rollout.stores import open_stores
from rollout.versions import Version
from tests.engines import VllmServer
from tests.gateway.shadowing import (
    CHAT,
    NOW,
    Bed,
    asks,
    count,
    made_bed,
    propose,
    running,
    shadow,
    until_empty,
)
from tests.stub_engine import Received, Reply, at, is_inference

pytestmark = pytest.mark.anyio


@pytest.fixture
async def bed(redis_url: str) -> AsyncIterator[Bed]:
    async with made_bed(redis_url) as made:
        yield made


def is_judging(received: Received) -> bool:
    return is_inference(received) and "response_format" in received.json()


def prefers(text: str) -> Reply:
    """A judge that likes one text best, wherever it stands."""

    def said(request: Mapping[str, Any]) -> str:
        seen = json.loads(request["messages"][-1]["content"])
        liked = [name for name in ("A", "B") if seen[name]["text"] == text]
        return json.dumps({"better": liked[0] if liked else "neither"})

    return Reply(text=said)


def embedding(*vectors: tuple[float, ...]) -> Reply:
    rows = [{"index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return Reply(body={"data": rows, "usage": {"prompt_tokens": 7}})


async def compared(bed: Bed) -> None:
    await bed.capture(bed.exchange("r1"))
    await bed.settled()


async def test_stable_is_asked_again_and_compared_with_itself(bed: Bed) -> None:
    await bed.update_route(self_sample=1.0)
    async with shadow(bed) as metrics:
        await compared(bed)
    evidence = await bed.stores.evidence.read("triage", bed.trial.id)
    assert evidence.pairs == PairCounts(disagree=1)
    assert evidence.floor == PairCounts(agree=1)
    assert count(metrics, "asked_again_total", agreement="agree") == 1
    assert len(bed.engine.inference_requests) == 2


async def test_stable_that_differs_from_itself_is_noise_and_not_the_candidates(bed: Bed) -> None:
    await bed.update_route(self_sample=1.0)
    bed.engine.script(
        Reply(text="fine"), where=lambda r: is_inference(r) and r.json()["model"] == "base"
    )
    async with shadow(bed):
        await compared(bed)
    evidence = await bed.stores.evidence.read("triage", bed.trial.id)
    assert (evidence.pairs, evidence.floor) == (PairCounts(disagree=1), PairCounts(disagree=1))


async def test_a_second_answer_that_does_not_come_costs_no_pair(bed: Bed) -> None:
    await bed.update_route(self_sample=1.0)
    bed.engine.script(
        Reply(status=500), where=lambda r: is_inference(r) and r.json()["model"] == "base"
    )
    async with shadow(bed):
        await compared(bed)
    evidence = await bed.stores.evidence.read("triage", bed.trial.id)
    assert (evidence.pairs, evidence.floor) == (PairCounts(disagree=1), PairCounts())


@pytest.mark.parametrize(
    ("vectors", "rule", "agree", "agreement"),
    [
        (((1.0, 0.0), (1.0, 0.0)), Semantic("main", "embedder"), 0, 0.99),
        (((1.0, 0.0), (3.0, 0.3)), Semantic("main", "embedder", agrees_from=0.9), 1, 1.0),
        (((1.0, 0.0), (1.0, 1.0)), Semantic("main", "embedder", agrees_from=0.9), 0, 0.7071),
    ],
)
async def test_nearness_in_meaning_is_asked_of_an_engine(
    bed: Bed, vectors: tuple[tuple[float, ...], ...], rule: Semantic, agree: int, agreement: float
) -> None:
    await bed.update_route(semantic=rule, agreement_sample=1.0)
    bed.engine.script(embedding(*vectors), where=at("/v1/embeddings"))
    async with shadow(bed) as metrics:
        await compared(bed)
    assert await bed.pairs() == PairCounts(agree=agree, disagree=1 - agree)
    ((case, _),) = await bed.stores.cases.list("triage")
    assert case.kind == "semantic"
    assert case.agreement == pytest.approx(agreement, abs=1e-4)
    (asked,) = [r for r in bed.engine.requests if r.path == "/v1/embeddings"]
    assert asked.json() == {"model": "embedder", "input": ["good", "bad"]}
    assert count(metrics, "step_tokens_total", step="semantic") == 7


@pytest.fixture(scope="module")
def static_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three words: "good" and "fine" lie close together, "bad" far from both."""
    words = {"[UNK]": 0, "good": 1, "fine": 2, "bad": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    vectors = np.array([[0, 0], [1, 0], [1, 0.1], [-0.1, 1]], dtype=np.float32)
    folder = tmp_path_factory.mktemp("model2vec")
    StaticModel(vectors, tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("stable", "agree"), [("fine", 0), ("bad fine", 0), ("bad bad", 1)])
async def test_a_static_model_runs_in_the_shadow_itself(
    bed: Bed, static_model: Path, stable: str, agree: int
) -> None:
    await bed.update_route(semantic=Semantic(local=str(static_model), agrees_from=0.9))
    async with shadow(bed) as metrics:
        await bed.capture(bed.exchange("r1", answer=Answer(1, 200, stable)))
        await bed.settled()
    assert await bed.pairs() == PairCounts(agree=agree, disagree=1 - agree)
    assert count(metrics, "compared_total", kind="semantic") == 1


async def test_a_model_that_is_not_there_costs_no_pair(bed: Bed, tmp_path: Path) -> None:
    await bed.update_route(semantic=Semantic(local=str(tmp_path / "nowhere")))
    async with shadow(bed) as metrics:
        await compared(bed)
    assert await bed.pairs() == PairCounts(disagree=1)
    assert count(metrics, "step_failures_total", step="semantic", reason="not_served") == 1


@pytest.mark.parametrize("decides", [False, True])
async def test_a_judge_is_asked_in_both_orders(bed: Bed, decides: bool) -> None:
    await bed.update_route(judge=Judge("main", "referee", decides=decides))
    bed.engine.any_model = True
    bed.engine.script(prefers("bad"), where=is_judging, times=None)
    async with shadow(bed) as metrics:
        await compared(bed)
    seen = [
        json.loads(r.json()["messages"][-1]["content"])
        for r in bed.engine.inference_requests
        if is_judging(r)
    ]
    assert sorted((each["A"]["text"], each["B"]["text"]) for each in seen) == [
        ("bad", "good"),
        ("good", "bad"),
    ]
    ((case, _),) = await bed.stores.cases.list("triage")
    assert case.judgement == Judgement("referee", "win")
    assert case.kind == ("judge" if decides else "text")
    assert await bed.pairs() == PairCounts(disagree=1, wins=1 if decides else 0)
    assert count(metrics, "judgements_total", verdict="win") == 1
    assert count(metrics, "step_tokens_total", step="judge") > 0


async def test_a_judge_that_goes_by_the_place_is_a_tie_and_told(bed: Bed) -> None:
    await bed.update_route(judge=Judge("main", decides=True))
    bed.engine.script(Reply(text='{"better": "A"}'), where=is_judging, times=None)
    async with shadow(bed) as metrics:
        await compared(bed)
    ((case, _),) = await bed.stores.cases.list("triage")
    assert case.judgement == Judgement("base", "tie", consistent=False)
    assert await bed.pairs() == PairCounts(disagree=1, ties=1)
    assert count(metrics, "judgements_total", verdict="inconsistent") == 1


async def test_what_agrees_or_is_decided_is_not_judged(bed: Bed) -> None:
    await bed.update_route(judge=Judge("main"))
    async with shadow(bed):
        await bed.capture(bed.exchange("agree"))
        await bed.settled()
        bed.engine.script(Reply(status=500), where=asks(bed.candidate), times=None)
        await compared(bed)
    assert not any(is_judging(r) for r in bed.engine.inference_requests)


@pytest.mark.parametrize(
    ("reply", "judge", "reason"),
    [
        (Reply(status=500), Judge("main"), "engine_error"),
        (Reply(text="I like the first"), Judge("main"), "unreadable"),
        (Reply(hold_headers=asyncio.Event()), Judge("main", seconds=0.2), "deadline"),
        (Reply(), Judge("nowhere"), "not_served"),
    ],
)
async def test_a_judge_that_fails_holds_nothing_up(
    bed: Bed, reply: Reply, judge: Judge, reason: str
) -> None:
    await bed.update_route(judge=replace(judge, decides=True))
    bed.engine.script(reply, where=is_judging, times=None)
    async with shadow(bed, concurrency=1) as metrics:
        await bed.capture(*(bed.exchange(f"r{number}") for number in range(5)))
        await bed.settled()
    assert await bed.pairs() == PairCounts(disagree=5)
    assert count(metrics, "step_failures_total", step="judge", reason=reason) == 3
    # Who fails again and again gets a rest, or it would cost the shadow its time.
    assert count(metrics, "step_failures_total", step="judge", reason="resting") == 2


@pytest.mark.vllm
async def test_a_real_engine_gives_verdicts_that_can_be_read(
    redis_url: str, vllm_engine: VllmServer
) -> None:
    engine = Engine("main", (vllm_engine.url,), vllm_engine.base)
    route = Route("triage", "main", policy=Policy(self_sample=0.0), judge=Judge("main"))
    messages = [{"role": "user", "content": "Hi"}]
    asked = {"model": "triage", "messages": messages, "max_tokens": 8}
    async with open_stores(redis_url) as stores:
        await stores.rollouts.put_route(route, by="test", at=NOW, base=engine.base)
        _, trial = await propose(stores, Version("triage", 0, "main", engine.base, NOW))
        captured = Exchange(
            *("r1", "triage", trial.id, "stable", "u", CHAT),
            request=json.dumps(asked),
            answer=Answer(1, 200, "Hello."),
            captured_at=NOW,
        )
        async with running(stores, engine, priority=100) as metrics:
            await stores.captures.append([captured])
            await until_empty(stores)
        ((case, _),) = await stores.cases.list("triage")
    # It is random weights that judge: what they say is as good as dice, but it is a verdict.
    assert case.judgement is not None
    assert case.judgement.judge == engine.base
    assert count(metrics, "step_tokens_total", step="judge") > 0


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"better": "A"}', "A"),
        ('```json\n{"better" : "neither"}\n```', "neither"),
        ('{"better": "A"} {"better": "B"}', None),
        ('{"better": "C"}', None),
        ("A", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_it_is_none(text: str, verdict: str | None) -> None:
    assert verdict_of(text) == verdict


def test_the_same_verdict_in_both_orders_is_one() -> None:
    assert judgement("j", stable_as_a="A", stable_as_b="B") == Judgement("j", "loss")
    assert judgement("j", stable_as_a="B", stable_as_b="A") == Judgement("j", "win")
    assert judgement("j", stable_as_a="neither", stable_as_b="neither") == Judgement("j", "tie")
    assert judgement("j", stable_as_a="A", stable_as_b="neither") == Judgement("j", "tie", False)


def test_a_judge_sees_tool_calls_and_no_word_of_who_answered() -> None:
    called = Answer(3, 200, tool_calls=({"id": "call_1", "function": {"name": "find"}},))
    body = question(Judge("main", prompt="Be fair."), "m", [], called, Answer(4, 200, "no"))
    assert "Be fair." in body["messages"][0]["content"]
    seen = json.loads(body["messages"][1]["content"])
    assert seen["A"] == {"text": "", "tool_calls": [{"function": {"name": "find"}}]}
    assert seen["B"] == {"text": "no"}


def test_a_judges_record_tells_its_bias_and_its_agreement_with_people() -> None:
    win, loss = Judgement("j", "win"), Judgement("j", "loss")
    biased = Judgement("j", "tie", consistent=False)
    found = record([win, loss, biased, win], [(win, "win"), (loss, "win"), (win, "win")])
    assert (found.judged, found.inconsistent, found.labelled, found.agreed) == (4, 1, 3, 2)
    assert found.position_bias == 0.25
    assert record([], []).kappa is None


def test_kappa_is_nothing_where_chance_says_as_much() -> None:
    assert cohens_kappa([("win", "win"), ("loss", "loss")]) == 1.0
    assert cohens_kappa([("win", "win"), ("win", "win")]) is None
    assert cohens_kappa([("win", "loss"), ("loss", "win")]) == -1.0


VECTORS = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8)


@given(VECTORS, VECTORS)
def test_similarity_has_bounds_and_no_direction(one: list[float], other: list[float]) -> None:
    near = similarity(one, other)
    assert -1.0 <= near <= 1.0
    assert near == pytest.approx(similarity(other, one))
    assert 0.0 <= semantic_score(near, None) < 1.0
