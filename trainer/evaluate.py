"""Asking a version every row of a suite through the gateway, and marking what it answers."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import httpx2

from rollout.binomial import wilson
from rollout.errors import AuthenticationError, EngineUnavailableError, NotFoundError
from rollout.evidence import Score
from rollout.suites import Scorer
from trainer.graders import Given, Mark, mark, names
from trainer.sandbox import PythonGrader
from trainer.suites import Suite, SuiteRow

_TRIES: Final = 4
_CHOICE_TOKENS: Final = 64
_TEXT_TOKENS: Final = 512
_MOST_TOKENS: Final = 8192
_LONGEST_PAUSE_SECONDS: Final = 30.0

Messages = tuple[Mapping[str, Any], ...]
OnRow = Callable[[int, int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Graded:
    """One row's answer with its marks by scorer. `right` is by the main one.

    `error` is why there is no answer, or no mark; the row then counts as wrong.
    """

    row: str
    answer: str
    right: bool
    seconds: float
    error: str | None = None
    calls: Messages = ()
    marks: Mapping[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def main(self, metric: str) -> float:
        return self.marks.get(metric, float(self.right))


@dataclass(frozen=True, slots=True)
class Gateway:
    """Where versions are asked: the data plane's root, and a key that may ask."""

    url: str
    key: str
    concurrency: int = 8
    timeout_seconds: float = 120.0


class Marker(Protocol):
    """A scorer that takes a process or an engine."""

    async def mark(self, row: SuiteRow, given: Given) -> Mark: ...

    async def close(self) -> None: ...


class Marking:
    """The scorers of a suite. `markers` has those that ask an engine, by their place."""

    def __init__(self, scorers: Sequence[Scorer], markers: Mapping[int, Marker]) -> None:
        self._scorers = tuple(scorers)
        self._names = names(self._scorers)
        self._markers: dict[int, Marker] = dict(markers)
        for place, scorer in enumerate(self._scorers):
            if scorer.kind == "python":
                self._markers[place] = PythonGrader(scorer)

    async def __aenter__(self) -> "Marking":
        return self

    async def __aexit__(self, *_: object) -> None:
        async with AsyncExitStack() as stack:
            for marker in self._markers.values():
                stack.push_async_callback(marker.close)

    async def grade(self, row: SuiteRow, graded: Graded) -> Graded:
        """The answer with its marks; one that cannot be marked is an error of its row."""
        given = Given(graded.answer, graded.calls)
        marks: dict[str, float] = {}
        errors: list[str] = []
        for place, (scorer, name) in enumerate(zip(self._scorers, self._names, strict=True)):
            marker = self._markers.get(place)
            got = mark(scorer, row, given) if marker is None else await marker.mark(row, given)
            marks[name] = got.value
            if got.error is not None:
                errors.append(f"{name}: {got.error}")
        right = marks[self._names[0]] >= self._scorers[0].threshold - 1e-9
        return replace(graded, right=right, marks=marks, error="; ".join(errors) or None)


async def answer_suite(
    gateway: Gateway,
    version: str,
    suite: Suite,
    *,
    on_row: OnRow | None = None,
    marking: Marking | None = None,
    prompt: Messages = (),
    schema: str | None = None,
) -> list[Graded]:
    """Ask a pinned version every row, the engine held to each row's choices or schema.

    `schema` holds rows that have neither; `prompt` comes before each row's messages. Raises
    EngineUnavailableError where a row gets no answer even when tried again: a report on half a
    suite would say nothing.
    """
    waiting = asyncio.Semaphore(gateway.concurrency)
    done = 0

    async def one(row: SuiteRow, grading: Marking) -> Graded:
        nonlocal done
        async with waiting:
            graded = await _ask(client, version, row, prompt)
        if graded.error is None:
            graded = await grading.grade(row, graded)
        done += 1
        if on_row is not None:
            await on_row(done, len(suite.rows))
        return graded

    headers = {
        "authorization": f"Bearer {gateway.key}",
        # What is asked to evaluate is no traffic to learn from.
        "x-sluice-no-capture": "1",
    }
    async with (
        httpx2.AsyncClient(
            base_url=gateway.url, headers=headers, timeout=gateway.timeout_seconds
        ) as client,
        AsyncExitStack() as stack,
    ):
        grading = marking
        if grading is None:
            grading = await stack.enter_async_context(Marking(suite.scorers, {}))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(held(row, schema), grading)) for row in suite.rows]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return [task.result() for task in tasks]


def held(row: SuiteRow, schema: str | None) -> SuiteRow:
    """The row held to the route's schema, where nothing of its own constrains the answer."""
    if schema is None or row.choices or row.schema or row.tools or row.calls:
        return row
    return replace(row, schema=schema)


def decoding_of(schema: str | None, prompt: Messages = ()) -> str:
    """All that decides an answer beside the version and the row, as text."""
    return json.dumps(
        {
            "temperature": 0,
            "seed": 0,
            "max_tokens": [_CHOICE_TOKENS, _TEXT_TOKENS, _MOST_TOKENS],
            "schema": schema,
            "prompt": list(prompt),
        },
        sort_keys=True,
    )


def with_examples(messages: Messages, prompt: Messages) -> Messages:
    """The prompt before a client's messages, with one system message at most."""
    if not prompt:
        return messages
    leading = [each["content"] for each in (*prompt, *messages) if each["role"] == "system"]
    rest = [each for each in (*prompt, *messages) if each["role"] != "system"]
    said = [str(each) for each in leading if each]
    system = [{"role": "system", "content": "\n\n".join(said)}] if said else []
    return (*system, *rest)


async def _ask(client: httpx2.AsyncClient, version: str, row: SuiteRow, prompt: Messages) -> Graded:
    problem, pause = "", 0.0
    for attempt in range(_TRIES):
        if attempt:
            await asyncio.sleep(max(pause, 2.0 ** (attempt - 1)))
        started = time.monotonic()
        try:
            answer = await client.post("/v1/chat/completions", json=_request(version, row, prompt))
        except httpx2.HTTPError as exc:
            problem = f"{type(exc).__name__} {exc}".strip()
            continue
        seconds = time.monotonic() - started
        if answer.status_code == 200:
            try:
                return _read(row, answer.json(), seconds)
            except (ValueError, KeyError, IndexError, TypeError) as exc:
                problem = f"an answer that is none ({type(exc).__name__} {exc})"
                continue
        problem, pause = f"{answer.status_code} {_message(answer)}", _retry_after(answer)
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


def _read(row: SuiteRow, body: Mapping[str, Any], seconds: float) -> Graded:
    message = body["choices"][0]["message"]
    usage = body.get("usage") or {}
    return Graded(
        row=row.id,
        answer=message.get("content") or "",
        right=False,
        seconds=seconds,
        calls=tuple(message.get("tool_calls") or ()),
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
    )


def _request(version: str, row: SuiteRow, prompt: Messages) -> dict[str, Any]:
    request: dict[str, Any] = {
        "model": version,
        "messages": list(with_examples(row.messages, prompt)),
        "temperature": 0,
        "seed": 0,
        # A right answer must not be cut: it has fewer tokens than letters.
        "max_tokens": max(_TEXT_TOKENS, min(len(row.gold), _MOST_TOKENS)),
    }
    if row.tools:
        request["tools"] = list(row.tools)
    if row.choices is not None:
        request["structured_outputs"] = {"choice": list(row.choices)}
        request["max_tokens"] = _CHOICE_TOKENS
    elif row.schema is not None:
        request["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": json.loads(row.schema), "strict": True},
        }
    return request


def _retry_after(answer: httpx2.Response) -> float:
    try:
        return min(_LONGEST_PAUSE_SECONDS, max(0.0, float(answer.headers.get("retry-after", "0"))))
    except ValueError:
        return 0.0


def _message(answer: httpx2.Response) -> str:
    try:
        error = answer.json()["error"]
        return str(error["message"] if isinstance(error, Mapping) else error)
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


def score(version: str, graded: Sequence[Graded], seconds: float) -> Score:
    """How many rows are right, for whoever wants to know no more."""
    right = sum(each.right for each in graded)
    low, high = wilson(right, len(graded))
    return Score(version, right, len(graded), low, high, seconds)
