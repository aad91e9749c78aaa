"""Starts a training job as a process, passes its progress on, and ends it."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rollout.errors import InvalidInputError, SluiceError, UnservableError
from trainer.job import ENGINE_KEY, Job
from trainer.rendering import MaskError

Line = Mapping[str, Any]
# A step on a slow machine, and then the checkpoint; `sluice up` gives the trainer 20 s.
_STOP_SECONDS = 15.0
_LINE_BYTES = 1 << 20
# Codes of a job that will not do what was asked; any other error is a failure to do it.
_REFUSALS = frozenset({InvalidInputError.code, UnservableError.code, MaskError.code})


class JobFailedError(SluiceError):
    """The job ended by itself without a bundle; the message says why."""

    code = "training_failed"


async def run_job(
    job: Job, on_line: Callable[[Line], Awaitable[None]], *, engine_key: str | None = None
) -> None:
    """Carry the job out and leave its bundle in `job.bundle`.

    Cancelled, it lets the job save its state first. Raises InvalidInputError where the job refused
    its input, and JobFailedError where it died. Whatever happens, no process is left behind.
    """
    folder = Path(job.folder)
    file = folder / "job.json"
    file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    log = folder / "job.log"
    process = await _start(file, log, job.gpus, engine_key)
    refusal: Line | None = None
    try:
        async for line in _lines(process):
            if "error" in line:
                refusal = line
            else:
                await on_line(line)
        status = await process.wait()
    finally:
        with contextlib.suppress(TimeoutError):
            await _end(process)
    if refusal is not None:
        if refusal.get("code") in _REFUSALS:
            raise InvalidInputError(str(refusal["error"]), param=refusal.get("param"))
        raise JobFailedError(str(refusal["error"]))
    if status:
        raise JobFailedError(_explain(status, log))


async def _start(file: Path, log: Path, gpus: int, engine_key: str | None) -> Process:
    launch = ["-m", "trainer.job"]
    if gpus > 1:
        several = ["--multi_gpu", f"--num_processes={gpus}", "--num_machines=1"]
        plain = ["--mixed_precision=no", "--dynamo_backend=no"]
        launch = ["-m", "accelerate.commands.launch", *several, *plain, *launch]
    environment = {**os.environ} if engine_key is None else {**os.environ, ENGINE_KEY: engine_key}
    with log.open("wb") as errors:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *launch,
            str(file),
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            # Ctrl-C in the terminal is for the trainer, which then stops its job in order.
            start_new_session=True,
            limit=_LINE_BYTES,
        )


async def _end(process: Process) -> None:
    """Ask it to stop by ending its input, and kill it where that takes too long."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _lines(process: Process) -> AsyncIterator[Line]:
    if process.stdout is None:
        return
    async for raw in process.stdout:
        with contextlib.suppress(ValueError):
            line = json.loads(raw)
            if isinstance(line, dict):
                yield line


def _explain(status: int, log: Path) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        likely = "; most likely the machine ran out of memory" if name == "SIGKILL" else ""
        return f"the training process was ended by {name}{likely}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"the training process failed: {lines[-1] if lines else f'status {status}'}; see {log}"
