"""The application: it asks the endpoint about sentences with the official client, and knows nothing."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import openai

from trainer.demo.sentences import CLASSES, Sentence

_TIMEOUT_SECONDS = 120.0
_ANSWER_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the application saw: requests by arm, and those that failed."""

    sent: int
    failed: int
    arms: Counter[str]

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.sent + other.sent, self.failed + other.failed, self.arms + other.arms)


class Application:
    """`model` is the route; one customer writes each sentence."""

    def __init__(self, url: str, key: str, model: str, concurrency: int = 8) -> None:
        self._client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key=key, timeout=_TIMEOUT_SECONDS, max_retries=0
        )
        self._model = model
        self._places = asyncio.Semaphore(concurrency)

    async def ask(self, sentences: Sequence[Sentence], on_answer: Callable[[], None]) -> Traffic:
        """Ask about each sentence once. A failed request is counted, not raised."""
        arms: Counter[str] = Counter()
        failed = 0

        async def one(sentence: Sentence) -> None:
            nonlocal failed
            async with self._places:
                try:
                    arms[await self._ask(sentence)] += 1
                except openai.OpenAIError:
                    failed += 1
            on_answer()

        async with asyncio.TaskGroup() as group:
            for sentence in sentences:
                group.create_task(one(sentence))
        return Traffic(len(sentences), failed, arms)

    async def close(self) -> None:
        await self._client.close()

    async def _ask(self, sentence: Sentence) -> str:
        answer = await self._client.chat.completions.with_raw_response.create(
            model=self._model,
            messages=list(sentence.messages),  # type: ignore[arg-type]
            temperature=0,
            max_tokens=_ANSWER_TOKENS,
            user=_customer(sentence),
            extra_body={"structured_outputs": {"choice": list(CLASSES)}},
        )
        return answer.headers.get("x-sluice-arm", "?")


def _customer(sentence: Sentence) -> str:
    return "customer-" + hashlib.sha256(sentence.text.encode()).hexdigest()[:12]
