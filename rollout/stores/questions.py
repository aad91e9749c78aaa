"""The question which gateway worker answered a request, shown to all of them, and what they say."""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Final

from rollout.exchanges import Receipt
from rollout.stores import keys
from rollout.stores.codec import decode, encode
from rollout.stores.link import BLOCK_SECONDS, RedisLink

_MAXIMUM_QUESTIONS: Final = 1000
_KEEP_ANSWERS_SECONDS: Final = 60
_UNKNOWN: Final = ""
# As long as the store lets one wait; it counts in whole tenths.
_STEP_SECONDS: Final = 0.2


class QuestionStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def ask(self, request_id: str, listeners: int, seconds: float) -> Sequence[Receipt]:
        """What the workers know of requests with this id, once all `listeners` or the time is up."""
        question = secrets.token_hex(8)
        await self._link.run(
            *("XADD", keys.QUESTIONS, "MAXLEN", "~", _MAXIMUM_QUESTIONS, "*"),
            *("question", question, "request_id", request_id),
        )
        said: list[str] = []
        until = asyncio.get_running_loop().time() + seconds
        while len(said) < listeners and asyncio.get_running_loop().time() < until:
            found = await self._link.run("BLPOP", keys.answers(question), _STEP_SECONDS)
            if found is not None:
                said.append(found[1])
        return [decode(Receipt, each) for text in said for each in text.splitlines()]

    async def answer(self, question: str, known: Sequence[Receipt]) -> None:
        """Say what one worker knows, which may be nothing."""
        text = b"\n".join(encode(each) for each in known) if known else _UNKNOWN
        await self._link.run_all(
            [
                ("RPUSH", keys.answers(question), text),
                ("EXPIRE", keys.answers(question), _KEEP_ANSWERS_SECONDS),
            ]
        )

    async def newest(self) -> str:
        """The position behind everything that was asked so far."""
        rows = await self._link.run("XREVRANGE", keys.QUESTIONS, "+", "-", "COUNT", 1)
        return str(rows[0][0]) if rows else "0-0"

    async def asked(self, after: str) -> Sequence[tuple[str, str, str]]:
        """What was asked behind a position: its own position, the question, the request's id."""
        block = int(BLOCK_SECONDS * 1000)
        command = ("XREAD", "COUNT", 100, "BLOCK", block, "STREAMS", keys.QUESTIONS, after)
        answer = await self._link.run(*command)
        rows = [row for _, entries in answer or () for row in entries]
        return [(entry, fields["question"], fields["request_id"]) for entry, fields in rows]
