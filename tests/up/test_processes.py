"""Services are started, started again when they end, and ended with all that they started."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from rollout.errors import UnavailableError
from rollout.processes import Service, Supervisor

pytestmark = pytest.mark.anyio

# Writes its id and its child's, then sleeps; both end only when somebody ends them.
SLEEPER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".draft", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.replace(sys.argv[1] + ".draft", sys.argv[1])
time.sleep(600)
"""


class Told:
    """What the supervisor told the person at the terminal."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, name: str, message: str) -> None:
        self.lines.append(f"{name} {message}")


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
async def supervisor(tmp_path: Path, told: Told) -> AsyncIterator[Supervisor]:
    opened = Supervisor(tmp_path, told)
    yield opened
    for name in ("sleeper", "broken"):
        await opened.stop(name, now=True)


def sleeper(pids: Path) -> Service:
    return service("sleeper", SLEEPER, lambda: exists(pids), str(pids))


def service(name: str, code: str, ready: Callable[[], Awaitable[bool]], *rest: str) -> Service:
    return Service(name, [sys.executable, "-c", code, *rest], dict(os.environ), ready)


async def exists(path: Path) -> bool:
    return path.exists()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def read_pids(path: Path) -> tuple[int, int]:
    leader, child = path.read_text().split()
    return int(leader), int(child)


async def test_stopping_ends_a_service_and_all_that_it_started(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    await supervisor.start(sleeper(pids))
    await supervisor.wait_ready("sleeper")
    await supervisor.stop("sleeper")
    leader, child = read_pids(pids)
    await eventually(lambda: not alive(leader) and not alive(child))


async def test_a_service_that_was_killed_is_started_again(
    supervisor: Supervisor, tmp_path: Path, told: Told
) -> None:
    pids = tmp_path / "pids"
    await supervisor.start(sleeper(pids))
    await supervisor.wait_ready("sleeper")
    first, child = read_pids(pids)
    pids.unlink()
    os.kill(first, signal.SIGKILL)
    await eventually(pids.exists)
    assert read_pids(pids)[0] != first
    await eventually(lambda: not alive(child))
    assert "sleeper ended with status -9" in told.lines[0]


async def test_a_service_that_does_not_start_is_shown_with_its_last_words(
    supervisor: Supervisor,
) -> None:
    async def never() -> bool:
        return False

    code = "import sys; sys.exit('the disk is full')"
    await supervisor.start(service("broken", code, never))
    with pytest.raises(UnavailableError, match="the disk is full"):
        await supervisor.wait_ready("broken")


async def test_what_a_killed_supervisor_left_behind_is_ended(
    supervisor: Supervisor, tmp_path: Path, told: Told
) -> None:
    pids = tmp_path / "pids"
    await supervisor.start(sleeper(pids))
    await supervisor.wait_ready("sleeper")
    leader, child = read_pids(pids)
    # Keep the first supervisor from starting it again, as a killed one would.
    register = (tmp_path / "processes.json").read_text()
    later = tmp_path / "later"
    later.mkdir()
    (later / "processes.json").write_text(register)
    Supervisor(later, told).end_leftovers()
    await eventually(lambda: not alive(child))
    await eventually(lambda: any("status -9" in line for line in told.lines) or not alive(leader))


async def test_a_process_that_only_has_the_same_id_is_left_alone(
    tmp_path: Path, told: Told
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE, start_new_session=True
    )
    (tmp_path / "processes.json").write_text(f'{{"sleeper": [{process.pid}, "1"]}}')
    Supervisor(tmp_path, told).end_leftovers()
    assert process.returncode is None
    await process.communicate(b"\n")
    assert process.returncode == 0
