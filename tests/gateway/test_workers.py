"""The gateway as processes: `python -m gateway`."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.errors import UpstreamError
from gateway.settings import UpstreamSection
from gateway.snapshot import FILE_NAME, write_file
from gateway.upstream import UpstreamPool
from tests.gateway.serving import CHAT, MESSAGES, NO_STORE, SECRET, catalog
from tests.stub_engine import Reply, StubEngine
from tests.system import free_port

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
BODY = json.dumps({"model": "r", "messages": MESSAGES}).encode()
STREAM = json.dumps({"model": "r", "messages": MESSAGES, "stream": True}).encode()
_RELOADS = "sluice_config_reloads_total"
KEY = [(b"authorization", f"Bearer {SECRET}".encode())]


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base") as engine:
        yield engine


class Running:
    """A gateway with worker processes of its own."""

    def __init__(
        self, process: asyncio.subprocess.Process, config: Path, url: str, pool: UpstreamPool
    ) -> None:
        self.process = process
        self.config = config
        self.url = url
        self.pool = pool

    async def get(self, path: bytes, body: bytes | None = None) -> tuple[int, str]:
        method = b"GET" if body is None else b"POST"
        # A connection for each request, so that every worker gets some.
        headers = [*KEY, (b"connection", b"close")]
        async with self.pool.request(self.url, method, path, headers, body or b"") as response:
            data = b"".join([part async for part in response])
            return response.status, data.decode()

    def workers(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    async def count(
        self, metric: str = "sluice_requests_total", label: str = 'code="200"'
    ) -> float:
        """The sum of a counter where it has that label; without more, of the answers with 200."""
        _, text = await self.get(b"/metrics")
        lines = [line for line in text.splitlines() if line.startswith(metric + "{")]
        return sum(float(line.split()[-1]) for line in lines if label in line)

    async def reload(self, result: str) -> None:
        """Have the configuration read anew, and wait until every worker has."""
        label = f'result="{result}"'
        expected = await self.count(_RELOADS, label) + max(len(self.workers()), 1)
        self.process.send_signal(signal.SIGHUP)

        async def read() -> bool:
            return await self.count(_RELOADS, label) >= expected

        await eventually(read, f"the configuration to be {result}")


@asynccontextmanager
async def running(
    folder: Path, engine: StubEngine, workers: int, store: str = NO_STORE
) -> AsyncIterator[Running]:
    write_file(folder / FILE_NAME, catalog(engine.url))
    config, port = folder / "sluice.toml", free_port()
    config.write_text(
        f'data_dir = "{folder}"\n[store]\nurl = "{store}"\n'
        f"[gateway]\nport = {port}\nworkers = {workers}\n"
        f'[[engines]]\nname = "main"\nbase = "base"\nurls = ["{engine.url}"]\n'
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "--config", str(config)
    )
    async with UpstreamPool(UpstreamSection()) as pool:
        one = Running(process, config, f"http://127.0.0.1:{port}", pool)
        try:
            await eventually(lambda: ready(one), "the gateway to be ready")
            yield one
        finally:
            if process.returncode is None:
                process.terminate()
            await asyncio.wait_for(process.wait(), 30)


async def ready(one: Running) -> bool:
    try:
        return (await one.get(b"/readyz"))[0] == 200
    except UpstreamError:
        return False


async def eventually(
    holds: Callable[[], Awaitable[bool]], what: str, *, limit: float = 30.0
) -> None:
    try:
        async with asyncio.timeout(limit):
            while not await holds():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"waited {limit} s for {what}") from None


async def test_workers_share_the_port_and_their_metrics_are_summed(
    engine: StubEngine, tmp_path: Path
) -> None:
    async with running(tmp_path, engine, workers=2) as gateway:
        assert len(gateway.workers()) == 2
        answers = [(await gateway.get(CHAT.encode(), BODY))[0] for _ in range(30)]
        assert answers == [200] * 30
        assert await gateway.count() == 30
        # A worker dies: another takes its place, and what it counted stays.
        before = gateway.workers()
        os.kill(before[0], signal.SIGKILL)

        async def replaced() -> bool:
            now = gateway.workers()
            return len(now) == 2 and before[0] not in now

        await eventually(replaced, "another worker")
        assert (await gateway.get(CHAT.encode(), BODY))[0] == 200
        assert await gateway.count() == 31
        gateway.process.terminate()
        assert await asyncio.wait_for(gateway.process.wait(), 30) == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_stream_is_finished_after_sigterm(
    engine: StubEngine, tmp_path: Path, workers: int
) -> None:
    gate = asyncio.Event()
    engine.script(Reply(hold_stream=gate))
    async with running(tmp_path, engine, workers) as gateway:
        request = gateway.pool.request(gateway.url, b"POST", CHAT.encode(), KEY, STREAM)
        async with request as response:
            body = await response.read()
            gateway.process.terminate()

            async def red() -> bool:
                return not await ready(gateway)

            await eventually(red, "readiness to turn red")
            gate.set()
            while data := await response.read():
                body += data
        assert body.endswith(b"data: [DONE]\n\n")
        assert await asyncio.wait_for(gateway.process.wait(), 30) == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_replicas_change_under_load_and_no_request_fails(
    engine: StubEngine, tmp_path: Path, workers: int
) -> None:
    gate = asyncio.Event()
    engine.script(Reply(hold_stream=gate))
    async with StubEngine(base="base") as other, running(tmp_path, engine, workers) as gateway:
        request = gateway.pool.request(gateway.url, b"POST", CHAT.encode(), KEY, STREAM)
        async with request as response, under_load(gateway) as statuses:
            body = await response.read()
            await engine.wait_for_answered(50, limit=30)
            text = gateway.config.read_text()
            gateway.config.write_text(text.replace(engine.url, other.url))
            await gateway.reload("applied")
            await other.wait_for_answered(50, limit=30)
            before = len(engine.inference_requests)
            # What is not right is refused, and what was read before holds.
            gateway.config.write_text(text + "\n[nonsense")
            await gateway.reload("refused")
            await other.wait_for_answered(len(other.inference_requests) + 50, limit=30)
            assert len(engine.inference_requests) == before
            gate.set()
            while data := await response.read():
                body += data
        assert body.endswith(b"data: [DONE]\n\n")
        assert set(statuses) == {200}


async def test_a_worker_that_starts_beside_a_broken_file_goes_by_the_last_good_one(
    engine: StubEngine, tmp_path: Path
) -> None:
    async with running(tmp_path, engine, workers=2) as gateway:
        gateway.config.write_text("gateway = ")
        await gateway.reload("refused")
        before = set(gateway.workers())
        os.kill(min(before), signal.SIGKILL)

        async def replaced() -> bool:
            return len(gateway.workers()) == 2 and set(gateway.workers()) != before

        await eventually(replaced, "another worker")
        statuses = [(await gateway.get(CHAT.encode(), BODY))[0] for _ in range(20)]
        assert statuses == [200] * 20


@asynccontextmanager
async def under_load(gateway: Running) -> AsyncIterator[list[int]]:
    """A few clients that ask again and again, and the statuses that they were answered with."""
    statuses, stop = list[int](), asyncio.Event()

    async def client() -> None:
        while not stop.is_set():
            statuses.append((await gateway.get(CHAT.encode(), BODY))[0])

    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(client())
        try:
            yield statuses
        finally:
            stop.set()


async def test_a_port_in_use_is_said_with_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = tmp_path / "sluice.toml"
        config.write_text(f'data_dir = "{tmp_path}"\n[store]\nurl = "{NO_STORE}"\n')
        status, said = await run("--config", str(config), "--port", str(port))
    assert status == 1
    assert f"port {port}" in said
    assert "in use" in said
    assert "--port" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[gateway]\nprot = 8000\n", "prot"),
        ("[gateway]\nport = 8000\n", "no store is configured"),
        ("gateway = ", "no valid TOML"),
    ],
)
async def test_a_broken_configuration_is_said_in_one_line(
    tmp_path: Path, text: str, expected: str
) -> None:
    config = tmp_path / "sluice.toml"
    config.write_text(text)
    status, said = await run("--config", str(config), "--port", "0")
    assert status == 1
    assert expected in said
    assert "Traceback" not in said


async def run(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return process.returncode, out.decode()
