"""Child processes: started in groups of their own, watched, started again, ended in order."""

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import BinaryIO

from rollout.errors import UnavailableError

_POLL_SECONDS = 0.1
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0
# A process that lived for this long is started again at once when it ends.
_STEADY_SECONDS = 30.0
_LOG_BYTES = 10 * 2**20
_LOG_TAIL_LINES = 15


@dataclass(frozen=True, slots=True)
class Service:
    """One process to keep running.

    `ready` answers whether it does its work; `start_seconds` is how long that may take, and
    `stop_seconds` how long it may take to end after SIGTERM before its group is killed.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: Callable[[], Awaitable[bool]]
    start_seconds: float = 60.0
    stop_seconds: float = 10.0


@dataclass(slots=True)
class _Running:
    service: Service
    process: asyncio.subprocess.Process | None = None
    keeper: asyncio.Task[None] | None = None
    failed: str | None = None
    waiting: bool = True


class Supervisor:
    """Keeps services running until they are stopped.

    `say(name, message)` tells a person what happens. Logs go to `folder/logs/<name>.log`. The
    processes are noted in `folder/processes.json`, so that a supervisor that comes after one that
    was killed can end what it left behind.
    """

    def __init__(self, folder: Path, say: Callable[[str, str], None]) -> None:
        self._logs = folder / "logs"
        self._register = folder / "processes.json"
        self._say = say
        self._running: dict[str, _Running] = {}
        self._ending: dict[str, _Running] = {}

    def end_leftovers(self) -> None:
        """End the processes of a supervisor that was killed. Raises nothing where there are none.

        A process counts as ours only if it also started when ours did, for ids are reused.
        """
        with suppress(OSError, ValueError):
            for pid, started in json.loads(self._register.read_text()).values():
                if _started_at(pid) == started is not None:
                    _kill_group(pid)
        self._register.unlink(missing_ok=True)

    async def start(self, service: Service) -> None:
        """Start a service, and keep it running from now on. `wait_ready` waits for it."""
        running = _Running(service)
        self._running[service.name] = running
        process = await self._spawn(running)
        running.keeper = asyncio.create_task(self._keep(running, process))

    async def wait_ready(self, name: str) -> float:
        """Wait until the service is ready; returns after how many seconds it was.

        Raises UnavailableError, with the end of its log, where it ends first or takes too long.
        """
        running = self._running[name]
        service = running.service
        began = monotonic()
        while True:
            if running.failed is not None:
                raise UnavailableError(running.failed)
            if await service.ready():
                running.waiting = False
                return monotonic() - began
            if monotonic() - began > service.start_seconds:
                raise UnavailableError(
                    f"{name} was not ready after {service.start_seconds:.0f} s. "
                    + self._log_tail(name)
                )
            await asyncio.sleep(_POLL_SECONDS)

    async def stop(self, name: str, *, now: bool = False) -> None:
        """End a service: SIGTERM, and SIGKILL for its whole group when that takes too long."""
        running = self._running.pop(name, None)
        if running is None:
            return
        self._ending[name] = running
        if running.keeper is not None:
            running.keeper.cancel()
            with suppress(asyncio.CancelledError):
                await running.keeper
        if running.process is not None:
            await _end(running.process, 0.0 if now else running.service.stop_seconds)
        del self._ending[name]
        self._note()

    def kill(self, name: str) -> None:
        """Cut a service that is being stopped."""
        running = self._ending.get(name)
        if running is not None and running.process is not None:
            _kill_group(running.process.pid)

    async def _keep(self, running: _Running, process: asyncio.subprocess.Process) -> None:
        """Start the service again whenever it ends."""
        pause = _FIRST_PAUSE_SECONDS
        name = running.service.name
        while True:
            began = monotonic()
            status = await process.wait()
            _kill_group(process.pid)
            if running.waiting:
                running.failed = f"{name} ended with status {status}. " + self._log_tail(name)
                return
            if monotonic() - began > _STEADY_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            self._say(name, f"ended with status {status}; starting it again in {pause:.1f} s")
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
            process = await self._spawn(running)

    async def _spawn(self, running: _Running) -> asyncio.subprocess.Process:
        service = running.service
        with self._open_log(service.name) as log:
            running.process = await asyncio.create_subprocess_exec(
                *service.command,
                env=dict(service.environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C must reach the supervisor alone, and a whole group can be killed.
                start_new_session=True,
            )
        self._note()
        return running.process

    def _note(self) -> None:
        processes = {
            name: (running.process.pid, _started_at(running.process.pid))
            for name, running in self._running.items()
            if running.process is not None
        }
        draft = self._register.with_suffix(".draft")
        draft.write_text(json.dumps(processes))
        # Whole or not at all: a supervisor that is killed here must not leave half a list.
        draft.replace(self._register)

    def _open_log(self, name: str) -> BinaryIO:
        self._logs.mkdir(parents=True, exist_ok=True)
        path = self._logs / f"{name}.log"
        if path.exists() and path.stat().st_size > _LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        return path.open("ab")

    def _log_tail(self, name: str) -> str:
        path = self._logs / f"{name}.log"
        lines = path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return f"The end of {path}:\n" + "\n".join(f"  {line}" for line in lines)


async def _end(process: asyncio.subprocess.Process, seconds: float) -> None:
    if process.returncode is None and seconds > 0:
        with suppress(ProcessLookupError):
            process.terminate()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), seconds)
    # Also where the leader is gone: the others of its group may not be.
    _kill_group(process.pid)
    await process.wait()


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _started_at(pid: int) -> str | None:
    """When a process started, as the kernel counts it; None where that can't be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
