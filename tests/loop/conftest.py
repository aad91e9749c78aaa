"""An application's clients and a load for the running Sluice."""

import threading
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import openai
import pytest

from rollout.client import ControlClient
from tests.system import RunningSluice

ROUTE = "review-triage"


@pytest.fixture
def house(running_sluice: RunningSluice) -> RunningSluice:
    """What `client` and `control` speak to; a module may bring its own."""
    return running_sluice


@pytest.fixture
def client(house: RunningSluice) -> Iterator[openai.OpenAI]:
    """The official client with only its address and key changed."""
    with openai.OpenAI(
        base_url=f"{house.gateway_url}/v1", api_key=house.key, max_retries=0
    ) as opened:
        yield opened


@pytest.fixture
def control(house: RunningSluice) -> Iterator[ControlClient]:
    """The control API. Whatever trial a test leaves behind is rolled back after it."""
    with ControlClient(house.control_url, house.key) as opened:
        yield opened
        if opened.rollout(ROUTE).candidate is not None:
            opened.change(ROUTE, "rollback", reason="the test is over")


class Load:
    """An application that asks without pause until the `with` block ends; fails on any error."""

    def __init__(self, client: openai.OpenAI, clients: int = 3) -> None:
        self._client = client
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(clients)]
        self.answered: Counter[str] = Counter()
        self.errors: list[str] = []

    def total(self) -> int:
        return sum(self.answered.values())

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        if kind is None:
            assert not self.errors, self.errors[:3]
            assert self.total() > 0

    def _ask(self, number: int) -> None:
        turn = 0
        while not self._over.is_set():
            turn += 1
            try:
                arm = ask(self._client, f"question {turn} of {number}", user=f"u{number}-{turn}")
            except openai.OpenAIError as exc:
                self.errors.append(repr(exc))
            else:
                with self._lock:
                    self.answered[arm] += 1


def ask(client: openai.OpenAI, text: str, *, user: str, model: str = ROUTE) -> str:
    """Ask one question; returns the arm that answered."""
    answer = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=4,
        temperature=0,
        user=user,
    )
    assert answer.parse().choices
    return answer.headers["x-sluice-arm"]
