"""A small OpenAI-compatible server whose answers a test decides."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Body = dict[str, Any]
# A text, a whole message, or a status to fail with.
Reply = str | dict[str, Any] | int


@dataclass
class Answering:
    """`asked` are the bodies of all requests so far, `most` is how many there were at once."""

    reply: Callable[[Body], Reply]
    url: str = ""
    asked: list[Body] = field(default_factory=list)
    most: int = 0
    under_way: int = 0

    def models(self) -> list[str]:
        return [body["model"] for body in self.asked]

    async def answer(self, request: Request) -> Response:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        body = await request.json()
        # Whoever else has asked already is heard before the first is answered.
        await asyncio.sleep(0.01)
        self.under_way -= 1
        self.asked.append(body)
        reply = self.reply(body)
        if isinstance(reply, int):
            return JSONResponse({"error": {"message": "as asked"}}, reply)
        message = {"role": "assistant", "content": reply} if isinstance(reply, str) else reply
        usage = {"prompt_tokens": 10, "completion_tokens": 2}
        return JSONResponse({"choices": [{"message": message}], "usage": usage})


@contextlib.asynccontextmanager
async def answering(reply: Callable[[Body], Reply]) -> AsyncIterator[Answering]:
    engine = Answering(reply)
    async with serving({"/v1/chat/completions": engine.answer}) as engine.url:
        yield engine


@contextlib.asynccontextmanager
async def serving(
    posts: Mapping[str, Callable[[Request], Awaitable[Response]]],
) -> AsyncIterator[str]:
    """A server on loopback that takes posts at these paths; yields its address."""
    app = Starlette(routes=[Route(path, each, methods=["POST"]) for path, each in posts.items()])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


def last_question(body: Body) -> str:
    return str(body["messages"][-1]["content"])
