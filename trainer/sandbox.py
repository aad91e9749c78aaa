"""A Python grader in a process of its own: limits of time and memory, no files, no network.

What it is held to keeps a grader's mistakes from hurting; it is no prison for whoever wants out,
so only an admin may register one.
"""

import asyncio
import contextlib
import json
import math
import os
import signal
import sys
import tempfile
from dataclasses import asdict
from typing import Any, Final

from rollout.suites import Scorer, SuiteRow
from trainer.graders import Given, Mark

_START_SECONDS: Final = 20.0
_LONGEST_REPLY: Final = 64 * 2**10
_SHOWN: Final = 300

# Runs inside: one line of JSON in, one out. The first line is the code with its limits.
_INSIDE: Final = r"""
import ctypes, json, os, resource, signal, sys
head = json.loads(sys.stdin.readline())
replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
isolated = False
try:
    # A network namespace without an interface in it, where the kernel lets an ordinary user have one.
    isolated = ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x40000000) == 0
except (OSError, AttributeError):
    pass
bytes_ = head["memory_mb"] * 2**20
for name, limit in (("AS", bytes_), ("FSIZE", 0), ("CORE", 0), ("NPROC", 0), ("NOFILE", 64)):
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
    except (ValueError, OSError, AttributeError):
        pass
REFUSED = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto",
           "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn",
           "os.kill", "os.killpg", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod",
           "os.chown", "os.link", "os.symlink", "os.truncate", "os.utime", "ctypes.dlopen")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
def refuse(event, arguments):
    if event in REFUSED or (event == "open" and (arguments[2] or 0) & WRITING):
        raise PermissionError(event + " is not for graders")
sys.addaudithook(refuse)
space = {"__name__": "grader"}
def say(**reply):
    replies.write(json.dumps(reply) + "\n")
    replies.flush()
try:
    exec(compile(head["code"], "grader.py", "exec"), space)
    grade = space["grade"]
except BaseException as exc:
    say(fatal=f"{type(exc).__name__}: {exc}"[:300])
    raise SystemExit(1)
say(ready=True, isolated=isolated)
for line in sys.stdin:
    asked = json.loads(line)
    try:
        value = grade(asked["sample"], asked["item"])
        reply = {"value": float(value)}
    except Exception as exc:
        reply = {"error": f"{type(exc).__name__}: {exc}"[:300]}
    try:
        say(**reply)
    except ValueError:
        say(error="no number")
"""


class PythonGrader:
    """Starts its process when it is first asked, and a new one after each that had to be ended."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._process: asyncio.subprocess.Process | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        # One row at a time: a limit is a row's, and what a row breaks is its own.
        self._turn = asyncio.Lock()

    async def mark(self, row: SuiteRow, given: Given) -> Mark:
        """Never raises for what the grader does, and never waits longer than its limit."""
        asked = {
            "sample": {"output_text": given.text, "output_tools": list(given.calls)},
            "item": asdict(row),
        }
        async with self._turn:
            try:
                if self._process is None:
                    await self._start()
                reply = await self._exchange(asked, self._scorer.seconds)
            except TimeoutError:
                await self._end()
                return Mark(0.0, f"the grader took longer than {self._scorer.seconds:g} s")
            except (OSError, EOFError, ValueError) as exc:
                status = await self._end()
                return Mark(0.0, f"the grader ended ({status}): {exc}"[:_SHOWN])
        return _read(reply)

    async def close(self) -> None:
        await self._end()
        if self._folder is not None:
            self._folder.cleanup()

    async def _start(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="sluice-grader-")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            "-c",
            _INSIDE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=self._folder.name,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            start_new_session=True,
            limit=_LONGEST_REPLY,
        )
        head = {"code": self._scorer.code, "memory_mb": self._scorer.memory_mb}
        reply = await self._exchange(head, _START_SECONDS)
        if "fatal" in reply:
            raise ValueError(f"its code cannot be run: {reply['fatal']}")

    async def _exchange(self, asked: dict[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise EOFError("it is not running")
        async with asyncio.timeout(seconds):
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
        if not line:
            raise EOFError("it said nothing")
        try:
            reply = json.loads(line)
        except ValueError as exc:
            raise ValueError(f"it printed {line[:80]!r} where a mark was due") from exc
        if isinstance(reply, dict):
            return reply
        raise ValueError(f"it printed {line[:80]!r} where a mark was due")

    async def _end(self) -> str:
        """How it ended; what it started goes with it."""
        process, self._process = self._process, None
        if process is None:
            return "it had not begun"
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        status = await process.wait()
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _read(reply: dict[str, Any]) -> Mark:
    value = reply.get("value")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value) and 0.0 <= value <= 1.0:
            return Mark(float(value))
        return Mark(0.0, f"the grader gave {value:g}: a mark lies between 0 and 1")
    return Mark(0.0, f"the grader raised {reply['error']}" if "error" in reply else "no mark")
