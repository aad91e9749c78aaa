"""The end of the cascade, which takes an engine: nearness in meaning, and a judge.

Neither ever holds a pair up: what fails, or does not come in time, is counted and left out.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, Final, TypeVar

import msgspec

from gateway.answers import answer_from_body
from gateway.errors import UpstreamError
from gateway.shadow.embedding import LocalModels
from gateway.shadow.fleet import Fleet, Model
from gateway.shadow.metrics import ShadowMetrics
from gateway.shadow.pairing import chance, messages_of
from gateway.wire import CHAT, EMBEDDINGS
from rollout.agreement.judging import Verdict, judgement, question, verdict_of
from rollout.agreement.meaning import semantic_score, similarity
from rollout.exchanges import Answer, Comparison, Exchange, Judgement, Kind, Step
from rollout.routes import Judge, Route, Semantic

log = logging.getLogger(__name__)

T = TypeVar("T")

# Further pairs wait for these; a judge is slower than what it judges.
_CONCURRENCY: Final = 4
_NEVER_LONGER_SECONDS: Final = 30.0
# A judge that hangs costs the shadow its slots, so after so many failures it gets a rest.
_FAILURES_IN_A_ROW: Final = 3
_REST_SECONDS: Final = 30.0


class StepError(Exception):
    """A step that takes an engine came to nothing; its first argument is a reason for metrics."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


class _Vector(msgspec.Struct):
    index: int
    embedding: list[float]


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class _Embeddings(msgspec.Struct):
    data: list[_Vector]
    usage: _Usage | None = None


_embeddings: Final = msgspec.json.Decoder(_Embeddings)


class Referee:
    """Takes the steps of a route's comparing that ask an engine, and notes what each cost."""

    def __init__(self, fleet: Fleet, metrics: ShadowMetrics) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._slots = asyncio.Semaphore(_CONCURRENCY)
        self._local = LocalModels()
        self._failures: Counter[tuple[Kind, str]] = Counter()
        self._rests_until: dict[tuple[Kind, str], float] = {}

    async def complete(
        self, comparison: Comparison, exchange: Exchange, route: Route, until: float
    ) -> Comparison:
        """The comparison with what embeddings and the judge say of it, by `until` at the latest."""
        if comparison.kind == "text" and route.semantic is not None:
            comparison = await self._semantic(comparison, route.semantic, until)
        if (
            route.judge is not None
            and not comparison.agrees
            and comparison.outcome is None
            and chance("judge", comparison) < route.judge.sample
        ):
            comparison = await self._judged(comparison, exchange, route.judge, until)
        for step in comparison.steps:
            self._metrics.step(step)
        return comparison

    async def _semantic(self, comparison: Comparison, rule: Semantic, until: float) -> Comparison:
        score, step = await self._step(
            ("semantic", rule.engine or str(rule.local)),
            lambda: self._near(rule, comparison),
            min(until, _now() + _NEVER_LONGER_SECONDS),
        )
        told = replace(comparison, steps=(*comparison.steps, step))
        return told if score is None else replace(told, agreement=score, kind="semantic")

    async def _judged(
        self, comparison: Comparison, exchange: Exchange, judge: Judge, until: float
    ) -> Comparison:
        found, step = await self._step(
            ("judge", judge.engine),
            lambda: self._ask_judge(judge, comparison, exchange),
            min(until, _now() + judge.seconds),
        )
        told = replace(comparison, steps=(*comparison.steps, step))
        if found is None:
            return told
        self._metrics.judgements.labels(found.outcome if found.consistent else "inconsistent").inc()
        told = replace(told, judgement=found)
        return replace(told, kind="judge", outcome=found.outcome) if judge.decides else told

    async def _step(
        self,
        which: tuple[Kind, str],
        take: Callable[[], Coroutine[Any, Any, tuple[T, float | None, int]]],
        until: float,
    ) -> tuple[T | None, Step]:
        """What the step found (None: nothing), and the step with its cost; `which` is its name
        and its engine."""
        began = perf_counter()
        if _now() < self._rests_until.get(which, 0.0):
            return None, self._failed(which[0], "resting", began)
        try:
            async with asyncio.timeout_at(until), self._slots:
                found, agreement, tokens = await take()
        except TimeoutError:
            reason = "deadline"
        except StepError as exc:
            reason = exc.reason
        except UpstreamError:
            reason = "engine_error"
        else:
            self._failures.pop(which, None)
            return found, Step(which[0], agreement, perf_counter() - began, tokens)
        self._failures[which] += 1
        if self._failures[which] >= _FAILURES_IN_A_ROW:
            self._rests_until[which] = _now() + _REST_SECONDS
        return None, self._failed(which[0], reason, began)

    def _failed(self, name: Kind, reason: str, began: float) -> Step:
        self._metrics.step_failures.labels(name, reason).inc()
        return Step(name, None, perf_counter() - began, error=reason)

    async def _near(self, rule: Semantic, comparison: Comparison) -> tuple[float, float, int]:
        texts = [comparison.stable.text, comparison.candidate.text]
        if rule.engine is None:
            (one, other), tokens = await self._embed_here(str(rule.local), texts), 0
        else:
            (one, other), tokens = await self._embed(rule.engine, rule.model, texts)
        score = semantic_score(similarity(one, other), rule.agrees_from)
        return score, score, tokens

    async def _embed_here(self, path: str, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        try:
            return await self._local.embed(path, texts)
        except ImportError as exc:
            log.warning("a route asks for a local model: install sluice[semantic]")
            raise StepError("not_installed") from exc
        except (OSError, ValueError) as exc:
            log.warning("there is no model to read in %s: %s", path, exc)
            raise StepError("not_served") from exc

    async def _embed(
        self, engine: str, name: str | None, texts: Sequence[str]
    ) -> tuple[Sequence[Sequence[float]], int]:
        model = self._model(engine, name)
        status, data = await self._send(model, EMBEDDINGS, {"model": model.name, "input": texts})
        if status != 200:
            raise StepError("engine_error")
        try:
            read = _embeddings.decode(data)
        except msgspec.MsgspecError as exc:
            raise StepError("unreadable") from exc
        vectors = {each.index: each.embedding for each in read.data}
        if vectors.keys() != set(range(len(texts))):
            raise StepError("unreadable")
        found = [vectors[place] for place in range(len(texts))]
        return found, read.usage.prompt_tokens if read.usage else 0

    async def _ask_judge(
        self, judge: Judge, comparison: Comparison, exchange: Exchange
    ) -> tuple[Judgement, float | None, int]:
        model = self._model(judge.engine, judge.model)
        stable, candidate = comparison.stable, comparison.candidate
        messages = messages_of(exchange.request)
        bodies = (
            question(judge, model.name, messages, stable, candidate),
            question(judge, model.name, messages, candidate, stable),
        )
        try:
            async with asyncio.TaskGroup() as both:
                asked = [both.create_task(self._verdict(model, body)) for body in bodies]
        except ExceptionGroup as group:
            raise group.exceptions[0] from group
        (one, cost), (other, more) = (task.result() for task in asked)
        found = judgement(model.name, stable_as_a=one, stable_as_b=other)
        # It says which is better, not how far they agree.
        return found, None, cost + more

    async def _verdict(self, model: Model, body: dict[str, Any]) -> tuple[Verdict, int]:
        status, data = await self._send(model, CHAT, body)
        answer: Answer = answer_from_body(0, status, data)
        if not answer.ok:
            raise StepError("engine_error")
        verdict = verdict_of(answer.text)
        if verdict is None:
            raise StepError("unreadable")
        return verdict, answer.prompt_tokens + answer.completion_tokens

    async def _send(self, model: Model, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        """Once there is room beside the live traffic of the model's engine."""
        while (url := self._fleet.roomiest(model.urls)) is None:
            await self._fleet.change()
        return await self._fleet.send(model.engine, url, path, msgspec.json.encode(body))

    def _model(self, engine: str, name: str | None) -> Model:
        model = self._fleet.model(engine, name)
        if model is None:
            raise StepError("not_served")
        return model


def _now() -> float:
    return asyncio.get_running_loop().time()
