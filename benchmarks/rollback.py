"""How long a rollback takes under load, from the command to the last gateway's confirmation.

    python -m benchmarks.rollback [--rounds 20] [--workers 4] [--clients 32] [--rate 1000]

Each round promotes a candidate with an adapter, so that it takes all of the traffic, and rolls it
back with the `sluice` command. After each rollback requests of many users are asked one by one:
whoever is not answered by stable then was told too early. Exit status 1 where a request failed, a
gateway did not confirm, or the median of "confirmed" is not under the goal.
"""

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import numpy as np
import uvloop
from safetensors.numpy import save_file

from benchmarks.client import Load, make_request
from benchmarks.load import ANSWER_1, KEY, MODEL, PATH, Endpoint, LoadResult
from benchmarks.processes import Cores, Processes, StartError, free_port
from benchmarks.stub import BASE
from rollout.client import ControlClient
from rollout.stores.embedded import valkey_command

GOAL_SECONDS = 1.0
ASKED_AFTERWARDS = 40
PATIENCE_SECONDS = 60.0
LONGEST_SECONDS = 3600.0
CONFIRMED = re.compile(r"(\d+) gateway workers? confirmed in ([\d.]+) s")

CONFIG = """
data_dir = "{folder}"
[store]
url = "redis://127.0.0.1:{store}/0"
[gateway]
host = "127.0.0.1"
port = {gateway}
workers = {workers}
notice_seconds = 0
[controller]
port = {controller}
tick_seconds = 0.2
[[engines]]
name = "stub"
urls = ["{engine}"]
base = "{base}"
[[routes]]
name = "{route}"
engine = "stub"
capture = 0.1
"""


@dataclass(frozen=True, slots=True)
class Rollback:
    """In seconds: `commanded` is the whole command, Python's start included; `confirmed` is what it
    says of itself, from reading its arguments to the last confirmation. `astray` are requests sent
    after it that stable did not answer."""

    commanded: float
    confirmed: float
    workers: int
    astray: int


@dataclass(frozen=True, slots=True)
class Figures:
    rollbacks: tuple[Rollback, ...]
    load: LoadResult
    workers: int

    @property
    def good(self) -> bool:
        return (
            self.load.failed + self.load.unfinished == 0
            and all(one.workers == self.workers and one.astray == 0 for one in self.rollbacks)
            and median(one.confirmed for one in self.rollbacks) < GOAL_SECONDS
        )


class House:
    """A store, a controller and a gateway with its workers, before the stub engine."""

    def __init__(self, processes: Processes, cores: Cores, workers: int) -> None:
        self._processes = processes
        self._cores = cores
        self.workers = workers
        self.folder = processes.folder
        self.config = self.folder / "sluice.toml"
        self._ports = {name: free_port() for name in ("engine", "store", "gateway", "controller")}
        self.endpoint = Endpoint(f"http://127.0.0.1:{self._ports['gateway']}")

    @property
    def control_url(self) -> str:
        return f"http://127.0.0.1:{self._ports['controller']}"

    def start(self) -> None:
        engine = f"http://127.0.0.1:{self._ports['engine']}"
        ports: Mapping[str, object] = self._ports | {"engine": engine}
        self.config.write_text(
            CONFIG.format(folder=self.folder, workers=self.workers, base=BASE, route=MODEL, **ports)
        )
        rest = self._cores.rest
        stub = [sys.executable, "-m", "benchmarks.stub", "--port", str(self._ports["engine"])]
        self._start("stub", stub, rest, f"{engine}/health")
        store = self._ports["store"]
        self._start("store", valkey_command(self.folder, store), rest, f"tcp://127.0.0.1:{store}")
        self._start(
            "controller", self._role("rollout.controller"), rest, f"{self.control_url}/readyz"
        )
        ready = f"{self.endpoint.url}/readyz"
        self._start("gateway", self._role("gateway"), self._cores.gateway, ready)

    def sluice(self, *arguments: str) -> str:
        """What a command says; raises StartError where it fails."""
        command = [sys.executable, "-m", "rollout.cli", *arguments, "--config", str(self.config)]
        done = subprocess.run(
            [*command, "--key", KEY], capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise StartError(f"sluice {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def _role(self, module: str) -> list[str]:
        return [sys.executable, "-m", module, "--config", str(self.config)]

    def _start(self, name: str, command: Sequence[str], core: int, ready: str) -> None:
        environ = {"SLUICE_BOOTSTRAP_KEY": KEY}
        self._processes.start(name, command, core=core, ready=ready, environ=environ)


def measure(rounds: int, workers: int, clients: int, rate: float) -> Figures:
    """Start everything, roll back `rounds` times under load, end everything."""
    cores = Cores.pick()
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        Processes(Path(folder)) as processes,
        ThreadPoolExecutor(1) as pool,
    ):
        house = House(processes, cores, workers)
        house.start()
        with ControlClient(house.control_url, KEY) as control:
            _wait_for_route(control)
            adapter = _make_adapter(house.folder / "adapter")
            candidate = control.register(MODEL, adapter_path=str(adapter)).name
            load = _Load(pool, house.endpoint, clients, rate, cores.rest)
            done = []
            try:
                for number in range(1, rounds + 1):
                    _say(f"rollback {number} of {rounds}")
                    done.append(_round(house, control, candidate))
            finally:
                seen = load.stop()
            return Figures(tuple(done), seen, workers)


class _Load:
    """Clients that ask without a pause between the rounds, in a thread of their own."""

    def __init__(
        self, pool: ThreadPoolExecutor, endpoint: Endpoint, clients: int, rate: float, core: int
    ) -> None:
        parts = urlsplit(endpoint.url)
        self._over = False
        self._core = core
        self._load = Load(
            host=str(parts.hostname),
            port=int(parts.port or 80),
            request=make_request(
                endpoint.url + PATH, list(endpoint.headers), ANSWER_1.body(endpoint.model).encode()
            ),
            connections=clients,
            tokens=0,
            rate=rate,
        )
        self._running: Future[dict[str, float]] = pool.submit(self._run)

    def stop(self) -> LoadResult:
        self._over = True
        seen = self._running.result()
        return LoadResult(
            requests=int(seen["requests"]),
            microseconds=int(seen["microseconds"]),
            p50=int(seen["p50"]),
            p99=int(seen["p99"]),
            mean=seen["mean"],
            bad_status=int(seen["bad_status"]),
            broken=int(seen["broken"]),
            unfinished=int(seen["unfinished"]),
        )

    def _run(self) -> dict[str, float]:
        # Of this thread alone: the commands may have either core.
        os.sched_setaffinity(0, {self._core})
        return uvloop.run(self._load.run(lambda: not self._over, 0.0, LONGEST_SECONDS))


def _round(house: House, control: ControlClient, candidate: str) -> Rollback:
    """The candidate takes all of the traffic, and gives it back by command."""
    stable = control.rollout(MODEL).stable
    control.change(MODEL, "propose", reason="measured", version=candidate)
    promoted = control.change(
        MODEL, "promote", reason="measured", force=True, patience=PATIENCE_SECONDS
    )
    control.wait_until_served(promoted.catalog_revision, PATIENCE_SECONDS)
    if _answered_by(house.endpoint, "before") != candidate:
        raise StartError(f"{candidate} was promoted and does not answer")
    began = time.perf_counter()
    said = house.sluice("rollout", "rollback", MODEL, "--reason", "measured", "--force")
    commanded = time.perf_counter() - began
    astray = sum(
        _answered_by(house.endpoint, f"user-{n}") != stable for n in range(ASKED_AFTERWARDS)
    )
    found = CONFIRMED.search(said)
    if found is None:
        raise StartError(f"the rollback was not confirmed: {said.strip()}")
    return Rollback(commanded, float(found[2]), int(found[1]), astray)


def _answered_by(endpoint: Endpoint, user: str) -> str | None:
    """The version that answers a request of this user, on a connection of its own."""
    host, port = endpoint.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    try:
        body = json.dumps(json.loads(ANSWER_1.body()) | {"user": user})
        connection.request("POST", PATH, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.getheader("x-sluice-version") if answer.status == 200 else None
    finally:
        connection.close()


def _wait_for_route(control: ControlClient) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(row.route.name == MODEL for row in control.routes()):
        if time.monotonic() > deadline:
            raise StartError("the controller made no route")
        time.sleep(0.05)


def _make_adapter(folder: Path) -> Path:
    """What the controller's checks accept; the stub engine does not look into it."""
    folder.mkdir()
    config = {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{module}.lora_A.weight": np.ones((4, 8), np.float32),
        f"{module}.lora_B.weight": np.ones((8, 4), np.float32),
    }
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def report(figures: Figures) -> str:
    """For people."""
    load, done = figures.load, figures.rollbacks
    lines = [
        f"{len(done)} rollbacks by command, {figures.workers} gateway workers on one core under "
        f"{load.per_second:,.0f} requests a second",
        "",
        "  seconds       median     max",
    ]
    for name, values in (
        ("confirmed", [one.confirmed for one in done]),
        ("commanded", [one.commanded for one in done]),
    ):
        lines.append(f"  {name:<12}{median(values):>8.3f}{max(values):>8.3f}")
    astray = sum(one.astray for one in done)
    lines += [
        "",
        f"{load.failed} of {load.requests:,} requests failed; {astray} of "
        f"{len(done) * ASKED_AFTERWARDS} that were sent after a confirmation went astray",
        f"goal, under {GOAL_SECONDS:g} s and none failed: {'met' if figures.good else 'NOT met'}",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollback", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument(
        "--rate", type=float, default=1000.0, help="requests a second; 0: as fast as they go"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure")
    arguments = parser.parse_args()
    try:
        figures = measure(arguments.rounds, arguments.workers, arguments.clients, arguments.rate)
    except StartError as error:
        print(f"\nbenchmarks.rollback: {error}", file=sys.stderr)
        return 1
    _say("")
    print(report(figures))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(figures), indent=2) + "\n")
    return 0 if figures.good else 1


def _say(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
