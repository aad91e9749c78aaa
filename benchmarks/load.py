"""The load: what is asked for, and wrk and a client of our own, which ask for it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import StartError

SCRIPT = Path(__file__).with_name("post.lua")
# Long enough for those who ask for a long one.
KEY = "sk-bench-0123456789abcdef0123456789abcdef"
MODEL = "bench"
PATH = "/v1/chat/completions"
# Each stream should be seen from its beginning to its end a few times.
LEAST_OPEN_SECONDS = 6


@dataclass(frozen=True, slots=True)
class Workload:
    """`connections` clients, each asking again as soon as it has its answer.

    Where there is a pace (`delay_ms` between the chunks of a stream), what counts is the time to
    the first token, which wrk cannot tell: such streams are asked for by a client of our own.
    """

    name: str
    stream: bool
    connections: int
    chunks: int = 32
    delay_ms: int = 0

    @property
    def paced(self) -> bool:
        return self.delay_ms > 0

    def body(self, model: str = MODEL) -> str:
        request = {
            "model": model,
            "messages": [
                {"role": "system", "content": "You sort messages for a support team."},
                {"role": "user", "content": "My parcel has not come, and it is Friday. " * 4},
            ],
            "temperature": 0,
            "max_tokens": 64,
        }
        if self.stream:
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(request)


ANSWER_1 = Workload("answer@1", stream=False, connections=1)
ANSWER_32 = Workload("answer@32", stream=False, connections=32)
STREAM_1 = Workload("stream@1", stream=True, connections=1)
STREAM_32 = Workload("stream@32", stream=True, connections=32)
OPEN_64 = Workload("open@64", stream=True, connections=64, chunks=64, delay_ms=20)
OPEN_512 = Workload("open@512", stream=True, connections=512, chunks=64, delay_ms=20)
WORKLOADS = (ANSWER_1, ANSWER_32, STREAM_1, STREAM_32, OPEN_64, OPEN_512)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What is asked: a gateway's address, the headers that it wants, and its name for the model."""

    url: str
    headers: tuple[str, ...] = (f"authorization: Bearer {KEY}",)
    model: str = MODEL


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What the client saw; latencies in microseconds, to the last byte, or of a paced stream to
    the first."""

    requests: int
    microseconds: int
    p50: int
    p99: int
    mean: float
    bad_status: int
    broken: int
    unfinished: int = 0

    @property
    def per_second(self) -> float:
        return self.requests / self.microseconds * 1e6

    @property
    def failed(self) -> int:
        return self.bad_status + self.broken


def find_wrk() -> str:
    path = shutil.which("wrk")
    if path is None:
        raise StartError(
            "wrk is not installed, and it makes the load: `apt-get install wrk` (Debian, Ubuntu)"
            " or build it from github.com/wg/wrk, and put it on the PATH"
        )
    return path


def drive(endpoint: Endpoint, workload: Workload, seconds: int, core: int) -> LoadResult:
    """Load `endpoint` for `seconds`; raises StartError where the client fails."""
    body = workload.body(endpoint.model)
    if workload.paced:
        seconds = max(seconds, LEAST_OPEN_SECONDS)
        pace = ["--chunks", str(workload.chunks), "--delay-ms", str(workload.delay_ms)]
        options = [f"--open={workload.connections}", f"--seconds={seconds}", *pace]
        return _our_client(endpoint, options, body, core, seconds + 30)
    command = [
        *(find_wrk(), "-t1", f"-c{workload.connections}", f"-d{seconds}s", "--timeout", "10s"),
        *("-s", str(SCRIPT), endpoint.url + PATH, "--", body, *endpoint.headers),
    ]
    return _read(command, "", core, seconds + 30)


def send(endpoint: Endpoint, workload: Workload, requests: int, core: int) -> LoadResult:
    """Ask exactly `requests` times; raises StartError where that takes over ten minutes."""
    options = [f"--open={workload.connections}", f"--requests={requests}"]
    return _our_client(endpoint, options, workload.body(endpoint.model), core, 600)


def _our_client(
    endpoint: Endpoint, options: Sequence[str], body: str, core: int, limit: int
) -> LoadResult:
    headers = [part for header in endpoint.headers for part in ("--header", header)]
    command = [sys.executable, "-m", "benchmarks.client", endpoint.url + PATH, *options, *headers]
    return _read(command, body, core, limit)


def _read(command: Sequence[str], body: str, core: int, limit: int) -> LoadResult:
    try:
        done = subprocess.run(
            ["taskset", "-c", str(core), *command],
            input=body,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise StartError(f"{command[0]} did not end in {limit} s") from error
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return LoadResult(**json.loads(line.removeprefix("RESULT ")))
    raise StartError(f"{command[0]} failed: {(done.stderr or done.stdout)[-500:]}")
