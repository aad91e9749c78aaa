"""Labelled cases by the dozen, of a kind that a tiny model can learn, and what a run needs."""

import asyncio
import contextlib
import socket
import uuid
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rollout.cases import Case, Label, LabelledCase
from rollout.exchanges import Answer
from rollout.runs import TrainingRun
from rollout.settings import EngineSection, Settings, StoreSection
from tests.labeler import choice_for
from trainer.dataset import Dataset, compile_dataset

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ROUTE = "triage"
ANSWERS = {"red": "warm", "blue": "cold", "green": "mild"}
_NUMBERS = ("nothing", "once", "two", "thrice", "a few", "half", "dozen", "many", "all", "neither")


def labelled(
    number: int,
    text: str,
    gold: str,
    *,
    labeler: str = "ada",
    correction: str | None = None,
) -> LabelledCase:
    """A case where stable answered `gold`, the candidate something else, and a person said so."""
    case = Case(
        id=f"c{number:05d}",
        route=ROUTE,
        trial="triage@2.2",
        request_id=f"r{number}",
        messages=({"role": "user", "content": text},),
        stable=Answer(version=1, status=200, text=gold),
        candidate=Answer(version=2, status=200, text="something else"),
        agreement=0.0,
        kind="text",
        inclusion=0.5,
        priority=1.0,
        created_at=AT,
    )
    label = Label(
        case=case.id,
        route=ROUTE,
        choice=choice_for(case, gold),
        labeler=labeler,
        labelled_at=AT + timedelta(seconds=number),
        correction=correction,
    )
    return LabelledCase(case, label)


def compiled(*rows: LabelledCase, heldout: float = 0.2) -> Dataset:
    return compile_dataset(rows, heldout=heldout).dataset


def reasons(dataset: Dataset) -> dict[str, str]:
    return {each.case: each.reason for each in dataset.dropped}


def sentences(count: int) -> list[LabelledCase]:
    """Sentences of three kinds, each with the word that gives its kind away."""
    colours = list(ANSWERS)
    return [
        labelled(number, f"{_name(number)} is {colours[number % 3]}", ANSWERS[colours[number % 3]])
        for number in range(count)
    ]


def without_meaning(rows: list[LabelledCase]) -> list[LabelledCase]:
    """The same sentences, each with an answer that nothing in it gives away."""
    answers = list(ANSWERS.values())
    return [
        labelled(number, row.case.messages[0]["content"], answers[zlib.crc32(b"%d" % number) % 3])
        for number, row in enumerate(rows)
    ]


def _name(number: int) -> str:
    """Words that no other number has: sentences must not be nearly the same."""
    return " ".join(_NUMBERS[int(digit)] for digit in f"{number * 7919 % 100_000:05d}")


def training_run(**config: Any) -> TrainingRun:
    return TrainingRun(
        id=f"run-{uuid.uuid4().hex[:8]}",
        route=ROUTE,
        parent=f"{ROUTE}@1",
        created_at=AT,
        created_by="grace",
        config={"row_tokens": 256, "max_length": 128, **config},
    )


def settings_for(
    redis_url: str,
    model: Path,
    folder: Path,
    *,
    engine_url: str = "http://127.0.0.1:9",
    gateway_url: str = "http://127.0.0.1:9",
    **trainer: Any,
) -> Settings:
    own: Mapping[str, Any] = {
        "models": {"tiny": str(model)},
        "gateway_url": gateway_url,
        "key": "a key",
        "threads": 1,
        "nice": 0,
        "poll_seconds": 0.05,
        # A machine that is busy with other things must not lose it by that.
        "lease_seconds": 6.0,
        "checkpoint_seconds": 0.05,
        # Where no engine is there, a run is in its publishing for as long.
        "load_seconds": 240.0,
    }
    return Settings(
        data_dir=folder / "data",
        store=StoreSection(url=redis_url),
        engines=(EngineSection(name="main", urls=(engine_url,), base="tiny"),),
        trainer={**own, **trainer},
    )


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that the system gives to nobody else: whoever asks for it by its number may listen."""
    with socket.socket() as reserving:
        reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserving.bind(("127.0.0.1", 0))
        yield reserving.getsockname()[1]


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 120.0) -> None:
    """Wait until it is so; TimeoutError where that takes too long."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)
