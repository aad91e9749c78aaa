"""What is measured: how each gateway is started in front of the stub engine."""

import getpass
import http.client
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import KEY, MODEL
from benchmarks.processes import Cores, Processes, StartError, free_port
from benchmarks.stub import BASE
from rollout.stores.embedded import valkey_command

# Survives runs; ignored by git.
CACHE = Path(".cache/bench")
VLLM_ROUTER = "vllm-router==0.1.17"
INSTALL_SECONDS = 600
ROUTE_SECONDS = 10.0

Body = Mapping[str, str | Mapping[str, int]]


class SkipTarget(Exception):
    """This target cannot be had here; the message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a target is started: `processes` ends what it starts, `folder` is its own."""

    processes: Processes
    folder: Path
    cores: Cores
    engine_url: str
    engine_pid: int


@dataclass(frozen=True, slots=True)
class Started:
    """A target that answers at `url`; `pid` is the root of the process tree that is measured.

    `beside` are processes that the target keeps busy off the path of a request, on the other core:
    their CPU time is shown apart.
    """

    url: str
    pid: int
    beside: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """A gateway that can be measured. `start` raises SkipTarget where it cannot be had here.

    Whatever it starts through `place.processes` is ended with the run.
    """

    name: str
    start: Callable[[Place], Started]


def start_direct(place: Place) -> Started:
    """No gateway: the stub engine itself, which shares its core with wrk."""
    return Started(place.engine_url, place.engine_pid)


NGINX_CONFIG = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  tcp_nodelay on;
  keepalive_timeout 300s;
  keepalive_requests 100000000;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream engine {{
    server {engine};
    keepalive 512;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


def start_nginx(place: Place) -> Started:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        raise SkipTarget("nginx is not installed (`apt-get install nginx-light`)")
    port = free_port()
    user = f"user {getpass.getuser()};" if getpass.getuser() == "root" else ""
    config = place.folder / "nginx.conf"
    config.write_text(
        NGINX_CONFIG.format(
            user=user,
            folder=place.folder,
            engine=place.engine_url.removeprefix("http://"),
            port=port,
        )
    )
    url = f"http://127.0.0.1:{port}"
    command = [nginx, "-e", "stderr", "-p", str(place.folder), "-c", str(config)]
    pid = place.processes.start("nginx", command, core=place.cores.gateway, ready=f"{url}/health")
    return Started(url, pid)


def start_vllm_router(place: Place) -> Started:
    binary = install_in_own_environment("vllm-router", VLLM_ROUTER)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(str(binary), "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", place.engine_url, "--policy", "round_robin"),
        *("--prometheus-port", str(free_port()), "--log-level", "warning"),
    ]
    pid = place.processes.start(
        "vllm-router", command, core=place.cores.gateway, ready=f"{url}/health"
    )
    return Started(url, pid)


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
[[engines]]
name = "stub"
kind = "openai"
urls = ["{engine}"]
base = "{base}"
[[routes]]
name = "{route}"
engine = "stub"
capture = 0.1
"""


def start_sluice(place: Place) -> Started:
    """The gateway with one worker on its core; the store and the controller on the other.

    A candidate is in the shadow, so that a tenth of the exchanges is captured into the store, as in
    everyday work. No shadow process takes them from there: it would compete with the load.
    """
    port, controller_port, store_port = free_port(), free_port(), free_port()
    config = place.folder / "sluice.toml"
    config.write_text(
        SLUICE_CONFIG.format(
            folder=place.folder,
            store_port=store_port,
            port=port,
            controller_port=controller_port,
            engine=place.engine_url,
            base=BASE,
            route=MODEL,
        )
    )
    start, rest = place.processes.start, place.cores.rest
    environ = {"SLUICE_BOOTSTRAP_KEY": KEY}
    store = valkey_command(place.folder, store_port)
    store_pid = start("valkey", store, core=rest, ready=f"tcp://127.0.0.1:{store_port}")
    # The controller creates the route that the configuration names.
    controller_pid = start(
        "controller",
        _role("rollout.controller", config),
        core=rest,
        ready=f"http://127.0.0.1:{controller_port}/readyz",
        environ=environ,
    )
    _propose_candidate(controller_port)
    url = f"http://127.0.0.1:{port}"
    pid = start(
        "sluice",
        _role("gateway", config),
        core=place.cores.gateway,
        ready=f"{url}/readyz",
        environ=environ,
    )
    return Started(url, pid, (store_pid, controller_pid))


def _propose_candidate(controller_port: int) -> None:
    """Put a second version of the route into the shadow, before the gateway looks."""
    reason = "measured with a candidate in the shadow"
    deadline = time.monotonic() + ROUTE_SECONDS
    # The controller is ready a moment before it has created the configured routes.
    while _control(controller_port, "GET", f"/routes/{MODEL}")[0] == 404:
        if time.monotonic() > deadline:
            raise StartError(f"the controller made no route {MODEL} in {ROUTE_SECONDS:.0f} s")
        time.sleep(0.05)
    version: Body = {"route": MODEL, "sampling": {"seed": 1}, "note": reason}
    proposal: Body = {"version": f"{MODEL}@2", "reason": reason}
    for path, body in (
        ("/versions", version),
        (f"/routes/{MODEL}/rollout/propose", proposal),
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


def install_in_own_environment(name: str, requirement: str) -> Path:
    """Install `requirement` under the cache on first use; return its command `name`.

    Peers pin what Sluice pins otherwise, so each has an environment of its own.
    """
    environment = CACHE.absolute() / f"venv-{name}"
    command = environment / "bin" / name
    if command.exists():
        return command
    print(f"bench: installing {requirement} into {CACHE}/venv-{name}", flush=True)
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "-qq", requirement]
    try:
        for step in ([sys.executable, "-m", "venv", str(environment)], pip):
            subprocess.run(step, check=True, capture_output=True, timeout=INSTALL_SECONDS)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise SkipTarget(f"{requirement} could not be installed: {' '.join(said)}") from error
    except subprocess.TimeoutExpired as error:
        raise SkipTarget(f"{requirement} took over {INSTALL_SECONDS} s to install") from error
    if not command.exists():
        raise SkipTarget(f"{requirement} brought no command {name}")
    return command


# A further peer is one more line here, and its function above.
TARGETS = (
    Target("direct", start_direct),
    Target("nginx", start_nginx),
    Target("vllm-router", start_vllm_router),
    Target("sluice", start_sluice),
)

__all__ = ["TARGETS", "Place", "SkipTarget", "StartError", "Started", "Target"]
