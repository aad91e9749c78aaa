"""An evaluation: a version against its parent on the same rows, asked through the gateway."""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Literal

import httpx2

from rollout.errors import (
    AuthenticationError,
    EngineUnavailableError,
    InvalidInputError,
    NotFoundError,
)
from rollout.evidence import Report, Score
from rollout.statistics import mcnemar_exact, wilson
from trainer.graders import grade
from trainer.suites import Suite, SuiteRow

# A pass is claimed only where chance alone would give such a difference in one of twenty suites.
SIGNIFICANCE = 0.05
Outcome = Literal["pass", "fail", "inconclusive"]
_TRIES = 4
_CHOICE_TOKENS = 64
_TEXT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Graded:
    """One row's answer. `error` is why there is none; the row then counts as wrong."""

    row: str
    answer: str
    right: bool
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Gateway:
    """Where versions are asked: the data plane's root, and a key that may ask."""

    url: str
    key: str
    concurrency: int = 8
    timeout_seconds: float = 120.0


async def answer_suite(
    gateway: Gateway,
    version: str,
    suite: Suite,
    *,
    on_row: Callable[[int, int], Awaitable[None]] | None = None,
) -> list[Graded]:
    """Ask a pinned version every row, the engine held to each row's choices or schema.

    Raises EngineUnavailableError where a row gets no answer even when tried again: a report on
    half a suite would say nothing.
    """
    waiting = asyncio.Semaphore(gateway.concurrency)
    done = 0

    async def one(row: SuiteRow) -> Graded:
        nonlocal done
        async with waiting:
            graded = await _ask(client, version, row)
        done += 1
        if on_row is not None:
            await on_row(done, len(suite.rows))
        return graded

    headers = {
        "authorization": f"Bearer {gateway.key}",
        # What is asked to evaluate is no traffic to learn from.
        "x-sluice-no-capture": "1",
    }
    async with httpx2.AsyncClient(
        base_url=gateway.url, headers=headers, timeout=gateway.timeout_seconds
    ) as client:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(row)) for row in suite.rows]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return [task.result() for task in tasks]


async def _ask(client: httpx2.AsyncClient, version: str, row: SuiteRow) -> Graded:
    problem = ""
    for attempt in range(_TRIES):
        if attempt:
            await asyncio.sleep(2.0 ** (attempt - 1))
        started = time.monotonic()
        try:
            answer = await client.post("/v1/chat/completions", json=_request(version, row))
        except httpx2.HTTPError as exc:
            problem = f"{type(exc).__name__} {exc}".strip()
            continue
        seconds = time.monotonic() - started
        if answer.status_code == 200:
            text = answer.json()["choices"][0]["message"]["content"] or ""
            return Graded(row.id, text, grade(row, text), seconds)
        problem = f"{answer.status_code} {_message(answer)}"
        if answer.status_code in (401, 403):
            raise AuthenticationError(
                f"the gateway refuses the trainer's key ({_message(answer)}): set `key` under "
                "[trainer], or SLUICE_KEY"
            )
        if answer.status_code == 404:
            raise NotFoundError(f"the gateway does not know {version}: {_message(answer)}")
        if answer.status_code < 500 and answer.status_code not in (408, 429):
            return Graded(row.id, "", right=False, seconds=seconds, error=problem)
    raise EngineUnavailableError(
        f"{version} did not answer row {row.id} of {_TRIES} tries: {problem}; look at the gateway and "
        "the engine, then start the run again"
    )


def _request(version: str, row: SuiteRow) -> dict[str, Any]:
    request: dict[str, Any] = {
        "model": version,
        "messages": list(row.messages),
        "temperature": 0,
        "seed": 0,
        "max_tokens": _TEXT_TOKENS,
    }
    if row.choices is not None:
        request["structured_outputs"] = {"choice": list(row.choices)}
        request["max_tokens"] = _CHOICE_TOKENS
    elif row.schema is not None:
        request["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": json.loads(row.schema), "strict": True},
        }
    return request


def _message(answer: httpx2.Response) -> str:
    try:
        error = answer.json()["error"]
        return str(error["message"] if isinstance(error, Mapping) else error)
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


def score(version: str, graded: Sequence[Graded], seconds: float) -> Score:
    right = sum(each.right for each in graded)
    low, high = wilson(right, len(graded))
    return Score(version, right, len(graded), low, high, seconds)


def compare(
    *,
    route: str,
    version: str,
    parent: str,
    suite: Suite,
    graded: Sequence[Graded],
    parent_graded: Sequence[Graded],
    seconds: tuple[float, float],
    now: datetime,
) -> Report:
    """The report on both versions' answers to the same rows, in the same order."""
    pairs = list(zip(graded, parent_graded, strict=True))
    if any(one.row != other.row for one, other in pairs):
        raise InvalidInputError("the two versions were not asked the same rows")
    gained = sum(one.right and not other.right for one, other in pairs)
    lost = sum(other.right and not one.right for one, other in pairs)
    p_value = mcnemar_exact(gained, lost)
    scores = (score(version, graded, seconds[0]), score(parent, parent_graded, seconds[1]))
    outcome: Outcome = "inconclusive"
    if p_value < SIGNIFICANCE:
        outcome = "pass" if gained > lost else "fail"
    report = Report(
        id="",
        route=route,
        version=version,
        parent=parent,
        suite=suite.name,
        scores=scores,
        gained=gained,
        lost=lost,
        p_value=p_value,
        outcome=outcome,
        reason=_reason(outcome, scores, gained, lost, p_value),
        created_at=now,
    )
    return replace(report, id=_digest(report))


def _reason(
    outcome: Outcome, scores: tuple[Score, Score], gained: int, lost: int, p_value: float
) -> str:
    ours, parents = scores
    verdict = {
        "pass": f"{ours.version} is better than {parents.version}",
        "fail": f"{ours.version} is worse than {parents.version}",
        "inconclusive": f"no difference from {parents.version} is shown",
    }[outcome]
    return (
        f"{verdict}: {ours.accuracy:.1%} against {parents.accuracy:.1%} on {ours.total} rows, "
        f"{gained} gained, {lost} lost, p = {p_value:.2g} (below {SIGNIFICANCE:g} decides)"
    )


def _digest(report: Report) -> str:
    content = json.dumps(asdict(report), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()
