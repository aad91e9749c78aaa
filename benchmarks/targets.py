"""What is measured: how Sluice is started in front of the stub engine, and the list of targets."""

import http.client
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import compiled
from benchmarks.load import (
    ANSWER_32,
    KEY,
    MODEL,
    OPEN_512,
    STREAM_32,
    WORKLOADS,
    Endpoint,
    Workload,
)
from benchmarks.peers import (
    start_litellm,
    start_nginx,
    start_portkey,
    start_smg,
    start_vllm_router,
)
from benchmarks.place import Place, Started
from benchmarks.processes import StartError, free_port
from benchmarks.stub import BASE
from rollout.stores.embedded import valkey_command

ROUTE_SECONDS = 10.0
CANARY_PERCENT = 5
# A route like the other, of which nothing is captured.
BARE = "bench-bare"
# What the variants of Sluice are called: without capture, and with a shadow at work.
NO_CAPTURE, SHADOW = "no capture", "shadow"
VARIANT_WORKLOADS = (ANSWER_32, STREAM_32)

Body = Mapping[str, str | int | Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Target:
    """A gateway that can be measured. `start` raises SkipTarget where it cannot be had here.

    Whatever it starts through `place.processes` is ended with the run. One that is `slow`, by orders
    of magnitude, is measured in one round only, and not where it would need minutes.
    """

    name: str
    start: Callable[[Place], Started]
    slow: bool = False

    def takes(self, workload: Workload) -> bool:
        return not (self.slow and workload is OPEN_512)


def start_direct(place: Place) -> Started:
    """No gateway: the stub engine itself, which shares its core with the client."""
    return Started(Endpoint(place.engine_url), place.engine_pid)


SLUICE_CONFIG = """
data_dir = "{folder}"
[store]
url = "redis://127.0.0.1:{store_port}/0"
[gateway]
port = {port}
workers = 1
notice_seconds = 0
[controller]
port = {controller_port}
[shadow]
metrics_port = {shadow_port}
[[engines]]
name = "stub"
kind = "openai"
urls = ["{engine}"]
base = "{base}"
[[routes]]
name = "{route}"
engine = "stub"
capture = 0.1
[[routes]]
name = "{bare}"
engine = "stub"
capture = 0.0
"""


def start_sluice(place: Place) -> Started:
    """The gateway with one worker on its core; store, controller and shadow on the other.

    Everything is on: keys, metrics, accounting, a canary that takes 5 %, and a tenth of the
    exchanges captured into the store. The shadow runs only for the variant of its name.
    """
    port, controller_port = free_port(), free_port()
    store_port, shadow_port = free_port(), free_port()
    config = place.folder / "sluice.toml"
    config.write_text(
        SLUICE_CONFIG.format(
            folder=place.folder,
            store_port=store_port,
            port=port,
            controller_port=controller_port,
            shadow_port=shadow_port,
            engine=place.engine_url,
            base=BASE,
            route=MODEL,
            bare=BARE,
        )
    )
    start, rest = place.processes.start, place.cores.rest
    environ = {"SLUICE_BOOTSTRAP_KEY": KEY}
    store = start(
        "valkey",
        valkey_command(place.folder, store_port),
        core=rest,
        ready=f"tcp://127.0.0.1:{store_port}",
    )
    # The controller creates the routes that the configuration names.
    controller = start(
        "controller",
        _role("rollout.controller", config),
        core=rest,
        ready=f"http://127.0.0.1:{controller_port}/readyz",
        environ=environ,
    )
    for route in (MODEL, BARE):
        _set_canary(controller_port, route)
    # On a core that it shares with the client it may have only what that leaves.
    idle = ["chrt", "--idle", "0", *_role("gateway.shadow", config)]
    shadow = start("shadow", idle, core=rest, ready=f"tcp://127.0.0.1:{shadow_port}")
    os.kill(shadow, signal.SIGSTOP)
    url = f"http://127.0.0.1:{port}"
    pid = start(
        "sluice",
        _role("gateway", config),
        core=place.cores.gateway,
        ready=f"{url}/readyz",
        environ={**environ, **compiled.environ()},
    )
    beside = (store, controller)
    variants = {
        NO_CAPTURE: Started(Endpoint(url, model=BARE), pid, beside),
        SHADOW: Started(Endpoint(url), pid, (*beside, shadow), awake=(shadow,)),
    }
    return Started(Endpoint(url), pid, beside, variants=variants)


def _set_canary(controller_port: int, route: str) -> None:
    """Give a second version of the route a canary's share, before the gateway looks."""
    reason = "measured with a canary"
    deadline = time.monotonic() + ROUTE_SECONDS
    # The controller is ready a moment before it has created the configured routes.
    while _control(controller_port, "GET", f"/routes/{route}")[0] == 404:
        if time.monotonic() > deadline:
            raise StartError(f"the controller made no route {route} in {ROUTE_SECONDS:.0f} s")
        time.sleep(0.05)
    version: Body = {"route": route, "sampling": {"seed": 1}, "note": reason}
    proposal: Body = {"version": f"{route}@2", "reason": reason}
    canary: Body = {"percent": CANARY_PERCENT, "reason": reason}
    for path, body in (
        ("/versions", version),
        (f"/routes/{route}/rollout/propose", proposal),
        (f"/routes/{route}/rollout/canary", canary),
    ):
        status, said = _control(controller_port, "POST", path, body)
        if status >= 300:
            raise StartError(f"the controller answered {status} to {path}: {said!r}")


def _control(port: int, method: str, path: str, body: Body | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    try:
        connection.request(method, f"/api/v1{path}", json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _role(module: str, config: Path) -> list[str]:
    return [sys.executable, "-m", module, "--config", str(config)]


# A further peer is one more line here, and its function in `peers.py`.
TARGETS = (
    Target("direct", start_direct),
    Target("nginx", start_nginx),
    Target("vllm-router", start_vllm_router),
    Target("smg", start_smg),
    Target("litellm", start_litellm, slow=True),
    Target("portkey", start_portkey, slow=True),
    Target("sluice", start_sluice),
)

__all__ = ["TARGETS", "VARIANT_WORKLOADS", "WORKLOADS", "Target"]
