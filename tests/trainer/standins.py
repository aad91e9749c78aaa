"""What stands between the trainer and an engine in a test: one that routes, one that loads."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import httpx2
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rollout.engines import Engine
from rollout.serving import Replica, Waits, required_versions
from rollout.stores import Stores
from tests.trainer.answering import serving
from trainer.rendering import with_prompt


@contextlib.asynccontextmanager
async def pinned_versions(stores: Stores, engine_url: str) -> AsyncIterator[str]:
    """A data plane that knows pinned versions only, and puts their prompts where they belong."""

    async def answer(request: Request) -> Response:
        body = await request.json()
        version = await stores.rollouts.version(body["model"])
        body["model"] = version.served_name
        body["messages"] = with_prompt(body["messages"], version.prompt)
        given = await client.post(f"{engine_url}/v1/chat/completions", json=body)
        return JSONResponse(given.json(), given.status_code)

    async with (
        httpx2.AsyncClient(timeout=60) as client,
        serving({"/v1/chat/completions": answer}) as url,
    ):
        yield url


@contextlib.asynccontextmanager
async def loading(stores: Stores, engine: Engine) -> AsyncIterator[Sequence[Replica]]:
    """The controller's part: each replica brought to hold what is required, and unloaded after."""

    async def reconcile() -> None:
        while True:
            for replica in replicas:
                catalog, wanted = await stores.catalog.load(), await stores.catalog.wanted()
                required = required_versions(catalog, wanted).get(engine.name, ())
                done = await replica.reconcile(required)
                await stores.catalog.put_residency([done.residency])
            await asyncio.sleep(0.05)

    async with httpx2.AsyncClient(timeout=60) as client:
        waits = Waits(drain=0.2, notice=0.2, retry=0.2)
        replicas = [Replica(client, engine, url, waits) for url in engine.urls]
        task = asyncio.create_task(reconcile())
        try:
            yield replicas
        finally:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and (failure := task.exception()):
                raise failure
            for url in engine.urls:
                await _unload_ours(client, engine, url)


async def _unload_ours(client: httpx2.AsyncClient, engine: Engine, url: str) -> None:
    models = (await client.get(f"{url}/v1/models")).json()["data"]
    for model in models:
        if model["id"].startswith(f"{engine.base}-"):
            await client.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": model["id"]})
