"""A gateway on a real socket in the test's own loop, and the catalog that it serves."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from gateway import workers
from gateway.app import Gateway
from gateway.server import server_for
from gateway.settings import GatewaySettings
from gateway.snapshot import FILE_NAME, write_file
from gateway.upstream import UpstreamPool
from rollout.catalog import Catalog
from rollout.credentials import ApiKey, digest_secret
from rollout.discovery import Lookup, look_up
from rollout.engines import Residency
from rollout.routes import Route
from rollout.settings import EngineSection, Settings, check_section
from rollout.state import Rollout, Trial
from rollout.versions import Version

AT = datetime(2026, 1, 1, tzinfo=UTC)
SECRET = "sk-test"
KEY = ApiKey("k1", "tests", digest_secret(SECRET), frozenset({"infer"}), AT)
# Nothing listens on the discard port, so a store there is one that is gone.
NO_STORE = "redis://127.0.0.1:9/0"
# Nor is there a controller, unless a test has one; least of all somebody else's on the usual port.
NOWHERE = "http://127.0.0.1:9"
ROUTE = Route("r", "main", capture=1.0)
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def catalog(
    *urls: str,
    candidate: str | None = None,
    weight: float = 100.0,
    route: Route = ROUTE,
    versions: Sequence[Version] = (),
    keys: Sequence[ApiKey] = (KEY,),
    revision: int = 1,
) -> Catalog:
    """One route whose stable is the bare base; with `candidate` an adapter of that digest is on
    trial as version 2, resident on all `urls`."""
    every = [Version("r", 1, "main", "base", AT), *versions]
    trial = None
    if candidate is not None:
        every.append(Version("r", 2, "main", "base", AT, adapter=candidate))
        trial = Trial("r@2.2", 2, "canary" if weight else "shadow", weight, AT, AT)
    served = frozenset(version.served_name for version in every)
    return Catalog(
        revision=revision,
        routes={route.name: route},
        rollouts={route.name: Rollout(route.name, 1, stable=1, trial=trial)},
        versions={version.name: version for version in every},
        keys={key.digest: key for key in keys},
        residency={url: Residency("main", url, ready=True, served=served) for url in urls},
    )


def settings(folder: Path, *urls: str, store: str = NO_STORE, **own: Any) -> Settings:
    return Settings.model_validate(
        {
            "data_dir": folder,
            "store": {"url": store},
            "engines": [EngineSection(name="main", urls=urls, base="base")] if urls else [],
            "gateway": {"health": {"check_seconds": 3600}, "controller_url": NOWHERE, **own},
        }
    )


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """A gateway that listens; `app` is the application itself."""

    app: Gateway
    url: str
    server: Any

    def client(self, key: str = SECRET) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    async def send(
        self,
        method: str = "POST",
        path: str = CHAT,
        body: object = None,
        *,
        key: str | None = SECRET,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request with exactly these headers; a body that is no bytes is sent as JSON."""
        content = body if isinstance(body, bytes) else b"" if body is None else _json(body)
        sent = dict(headers or {})
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        own = check_section(GatewaySettings, {}, "gateway").upstream
        pairs = [(name.encode(), value.encode()) for name, value in sent.items()]
        async with (
            UpstreamPool(own) as pool,
            pool.request(self.url, method.encode(), path.encode(), pairs, content) as response,
        ):
            data = b"".join([part async for part in response])
            return Reply(
                response.status,
                {name.decode(): value.decode("latin-1") for name, value in response.headers},
                data,
            )

    async def ask(self, model: str = "r", **headers: str) -> Reply:
        body = {"model": model, "messages": MESSAGES}
        return await self.send(body=body, headers=headers)


@asynccontextmanager
async def serving(
    config: Settings, known: Catalog | None = None, *, lookup: Lookup = look_up
) -> AsyncIterator[RunningGateway]:
    """Serve until the end of the block; `known` is left as the last known catalog before."""
    if known is not None:
        write_file(config.data_path / FILE_NAME, known)
    own = check_section(GatewaySettings, config.gateway, "gateway")
    app = Gateway(config, lookup=lookup)
    server = server_for(app, own)
    sock = workers.listen("127.0.0.1", 0, own.backlog)
    host, port = sock.getsockname()
    task = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        await until(lambda: server.started or task.done(), "the gateway to start")
        yield RunningGateway(app, f"http://{host}:{port}", server)
    finally:
        server.should_exit = True
        await task


async def until(holds: Callable[[], bool], what: str, *, limit: float = 30.0) -> None:
    """Wait until `holds()`; fail with what it waited for."""
    try:
        async with asyncio.timeout(limit):
            while not holds():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"waited {limit} s for {what}") from None


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
