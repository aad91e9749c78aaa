"""The load: what is asked for, and wrk, which asks for it."""

import json
import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import StartError

SCRIPT = Path(__file__).with_name("post.lua")
KEY = "sk-bench"
MODEL = "bench"
PATH = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Workload:
    """`connections` clients, each asking again as soon as it has its answer."""

    name: str
    stream: bool
    connections: int
    chunks: int = 32
    delay_ms: int = 0

    @property
    def least_seconds(self) -> int:
        """Long enough that the streams cut off at the end hardly count."""
        return math.ceil(8 * self.chunks * self.delay_ms / 1000)

    @property
    def body(self) -> str:
        request = {
            "model": MODEL,
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


WORKLOADS = (
    Workload("answer@1", stream=False, connections=1),
    Workload("answer@32", stream=False, connections=32),
    Workload("stream@1", stream=True, connections=1),
    Workload("stream@32", stream=True, connections=32),
    # Many open streams at the pace of a real engine; not in the default run.
    Workload("open@256", stream=True, connections=256, chunks=64, delay_ms=20),
)
DEFAULT_WORKLOADS = tuple(workload.name for workload in WORKLOADS[:4])


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What wrk saw; latencies in microseconds, from sending to the last byte."""

    requests: int
    microseconds: int
    p50: int
    p99: int
    mean: float
    bad_status: int
    broken: int

    @property
    def per_second(self) -> float:
        return self.requests / self.microseconds * 1e6


def find_wrk() -> str:
    path = shutil.which("wrk")
    if path is None:
        raise StartError(
            "wrk is not installed, and it makes the load: `apt-get install wrk` (Debian, Ubuntu)"
            " or build it from github.com/wg/wrk, and put it on the PATH"
        )
    return path


def drive(url: str, workload: Workload, seconds: int, core: int) -> LoadResult:
    """Load `url` for `seconds`, or as long as the workload needs; raises StartError if wrk cannot."""
    seconds = max(seconds, workload.least_seconds)
    command = [
        *("taskset", "-c", str(core), find_wrk(), "-t1", f"-c{workload.connections}"),
        *(f"-d{seconds}s", "--timeout", "10s", "-s", str(SCRIPT)),
        *(url + PATH, "--", workload.body, KEY),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + 30, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return LoadResult(**json.loads(line.removeprefix("RESULT ")))
    raise StartError(f"wrk failed against {url}: {(done.stderr or done.stdout)[-500:]}")
