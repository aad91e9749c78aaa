"""`sluice up`: every role on one machine, with a store and an engine brought along."""

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import httpx2

from rollout.engines import Engine
from rollout.errors import ConfigError, SluiceError, StoreUnavailableError
from rollout.processes import Service, Supervisor
from rollout.settings import Settings, bootstrap_key, load_settings
from rollout.stores import open_stores
from rollout.stores.embedded import valkey_command
from rollout.vllm import SHUTDOWN_SECONDS, vllm_command, vllm_environment

# The engine that is brought along goes by this name in the routes.
OWN_ENGINE = "main"
_PATIENCE_SECONDS = 5.0
_READY_TIMEOUT_SECONDS = 2.0
# How long streams may go on after Ctrl-C; a second Ctrl-C cuts them.
_DRAIN_SECONDS = 30
_SHADOW_PRIORITY = 100
_ROLES = {
    "controller": "rollout.controller",
    "gateway": "gateway",
    "shadow": "gateway.shadow",
    "trainer": "trainer.worker",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to run: worked out from the settings before anything is started."""

    settings: Settings
    store_url: str
    store_port: int | None
    engines: tuple[Engine, ...]
    model: Path | None
    key: str
    gateway_url: str
    control_url: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sluice up", description=__doc__)
    parser.add_argument("--config", type=Path, help="the configuration file (sluice.toml)")
    options = parser.parse_args(arguments)
    try:
        return asyncio.run(_run(load_settings(options.config)))
    except SluiceError as exc:
        print(f"sluice up: {exc.message}", file=sys.stderr)
        return 1


async def _run(settings: Settings) -> int:
    data = settings.data_path
    _make(data)
    with _only_one(data):
        stop = asyncio.Event()
        hurry = asyncio.Event()
        _on_signals(stop, hurry)
        supervisor = Supervisor(data / "run", _say)
        supervisor.end_leftovers()
        plan = make_plan(settings)
        names: list[str] = []
        try:
            starting = asyncio.ensure_future(_start(plan, supervisor, names))
            stopping = asyncio.ensure_future(stop.wait())
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                _greet(plan)
                await stopping
            else:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
            _say("sluice", "stopping; press Ctrl-C again to cut what still runs")
        finally:
            # The gateway first, so that nothing is accepted which nobody could answer; the
            # store last, so that everyone can still write down what they know.
            for name in sorted(names, key=_stop_order):
                await _stop(supervisor, name, hurry)
        _say("sluice", f"stopped; everything is kept in {data}")
    return 0


def make_plan(settings: Settings) -> Plan:
    """Work out what to start, and find out beforehand what would not start.

    Raises ConfigError for a port in use, a missing model or a missing vLLM.
    """
    engines = settings.engine_list()
    model = None
    vllm_ports: list[int] = []
    if not engines:
        model = _model_path(settings)
        vllm_ports = [settings.vllm.port + n for n in range(settings.vllm.replicas)]
        engines = (_own_engine(settings),)
    store_port = None if settings.store.url else _store_port(settings.data_path)
    store_url = settings.store.url or f"redis://127.0.0.1:{store_port}/0"
    gateway_host = str(settings.gateway.get("host", "127.0.0.1"))
    gateway_port = int(settings.gateway.get("port", 8000))
    _check_port(gateway_host, gateway_port, "[gateway] port")
    _check_port(settings.controller.host, settings.controller.port, "[controller] port")
    for port in vllm_ports:
        _check_port(settings.vllm.host, port, "[vllm] port")
    return Plan(
        settings=settings,
        store_url=store_url,
        store_port=store_port,
        engines=engines,
        model=model,
        key=bootstrap_key() or _kept_key(settings.data_path / "bootstrap.key"),
        gateway_url=f"http://{_reachable(gateway_host)}:{gateway_port}",
        control_url=f"http://{_reachable(settings.controller.host)}:{settings.controller.port}",
    )


def role_environment(plan: Plan, environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with what the roles could not read from the configuration file."""
    engines = [
        {
            "name": engine.name,
            "urls": list(engine.urls),
            "base": engine.base,
            "kind": engine.kind,
            "api_key": engine.api_key,
            "max_adapters": engine.max_adapters,
            "max_rank": engine.max_rank,
        }
        for engine in plan.engines
    ]
    added = {
        "SLUICE_DATA_DIR": str(plan.settings.data_path),
        "SLUICE_STORE__URL": plan.store_url,
        "SLUICE_ENGINES": json.dumps(engines),
        "SLUICE_BOOTSTRAP_KEY": plan.key,
        "PYTHONUNBUFFERED": "1",
    }
    if plan.settings.source is not None:
        added["SLUICE_CONFIG"] = str(plan.settings.source)
    if plan.model is not None:
        models = {plan.settings.vllm.served_name: str(plan.model)}
        added["SLUICE_TRAINER__MODELS"] = json.dumps(
            models | dict(plan.settings.trainer.get("models", {}))
        )
        if "priority" not in plan.settings.shadow:
            # Our own vLLM schedules by priority; a larger number is served later.
            added["SLUICE_SHADOW__PRIORITY"] = str(_SHADOW_PRIORITY)
    if "drain_seconds" not in plan.settings.gateway:
        added["SLUICE_GATEWAY__DRAIN_SECONDS"] = str(_DRAIN_SECONDS)
    if "notice_seconds" not in plan.settings.gateway:
        # There is no balancer before it that had to notice.
        added["SLUICE_GATEWAY__NOTICE_SECONDS"] = "0"
    return {**environ, **added}


async def _start(plan: Plan, supervisor: Supervisor, names: list[str]) -> None:
    """Start all services, the store first; `names` grows as they are started."""
    async with httpx2.AsyncClient(timeout=_READY_TIMEOUT_SECONDS) as client:
        services = list(_services(plan, client))
        for service in services:
            names.append(service.name)
            await supervisor.start(service)
            if service.name == "store":
                await _wait(supervisor, service)
        if plan.store_port is None:
            _say("store", f"using {plan.store_url}")
        await asyncio.gather(
            *(_wait(supervisor, service) for service in services if service.name != "store")
        )


def _services(plan: Plan, client: httpx2.AsyncClient) -> Iterator[Service]:
    settings = plan.settings
    environment = role_environment(plan, os.environ)
    if plan.store_port is not None:
        folder = settings.data_path / "store"
        _make(folder)
        yield Service(
            name="store",
            command=valkey_command(folder, plan.store_port),
            environment=dict(os.environ),
            ready=_store_answers(plan.store_url),
            start_seconds=120,
        )
    if plan.model is not None:
        yield from _engine_services(plan, plan.model, client)
    ready = {
        "controller": _answers(client, f"{plan.control_url}/readyz"),
        "gateway": _answers(client, f"{plan.gateway_url}/readyz"),
    }
    for role, module in _ROLES.items():
        yield Service(
            name=role,
            command=[sys.executable, "-m", module],
            environment=environment,
            ready=ready.get(role, _at_once),
            # The gateway is ready when an engine answers, which can take minutes on a CPU.
            start_seconds=settings.vllm.start_seconds if role == "gateway" else 60,
            stop_seconds=_DRAIN_SECONDS + 5 if role == "gateway" else 20,
        )


def _engine_services(plan: Plan, model: Path, client: httpx2.AsyncClient) -> Iterator[Service]:
    section = plan.settings.vllm
    gpu = has_gpu()
    threads = max(1, (os.cpu_count() or 1) // section.replicas)
    cache = Path(sys.prefix).parent / ".cache" / "vllm"
    python = _vllm_python(plan.settings)
    for number in range(section.replicas):
        port = section.port + number
        yield Service(
            name="engine" if section.replicas == 1 else f"engine-{number}",
            command=vllm_command(
                section.model_copy(update={"python": python}), model, port, gpu=gpu
            ),
            environment=vllm_environment(os.environ, cache, gpu=gpu, threads=threads),
            ready=_answers(client, f"http://{_reachable(section.host)}:{port}/v1/models"),
            start_seconds=section.start_seconds,
            stop_seconds=SHUTDOWN_SECONDS + 10,
        )


async def _wait(supervisor: Supervisor, service: Service) -> None:
    began = monotonic()
    waiting = asyncio.ensure_future(supervisor.wait_ready(service.name))
    try:
        while not (await asyncio.wait({waiting}, timeout=_PATIENCE_SECONDS))[0]:
            _say(service.name, f"starting, {monotonic() - began:.0f} s so far")
        _say(service.name, f"ready after {waiting.result():.1f} s")
    finally:
        waiting.cancel()


async def _stop(supervisor: Supervisor, name: str, hurry: asyncio.Event) -> None:
    stopping = asyncio.ensure_future(supervisor.stop(name, now=hurry.is_set()))
    hurrying = asyncio.ensure_future(hurry.wait())
    await asyncio.wait({stopping, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done() and name != "store":
        supervisor.kill(name)
    await stopping
    hurrying.cancel()
    _say(name, "stopped")


def _stop_order(name: str) -> int:
    order = ("gateway", "shadow", "trainer", "controller")
    if name == "store":
        return len(order) + 1
    return order.index(name) if name in order else len(order)


def _greet(plan: Plan) -> None:
    route = plan.settings.routes[0].name if plan.settings.routes else "ROUTE"
    print(
        f"""
Sluice is up.

  endpoint   {plan.gateway_url}/v1      for applications, OpenAI-compatible
  console    {plan.control_url}         rollouts, cases to label, training runs
  API        {plan.control_url}/docs    the same for programs
  key        {plan.key}
             ({_kept(plan)})

Three things to try, in another terminal:

  1. Ask it something:
     curl {plan.gateway_url}/v1/chat/completions -H 'Authorization: Bearer {plan.key}' \\
       -H 'Content-Type: application/json' \\
       -d '{{"model": "{route}", "messages": [{{"role": "user", "content": "It broke on day one."}}]}}'
  2. See what is served:          .venv/bin/sluice rollout status {route}
  3. Watch the whole loop run:    .venv/bin/sluice demo

Ctrl-C stops everything; nothing is lost.
""",
        flush=True,
    )


def _kept(plan: Plan) -> str:
    if bootstrap_key() is not None:
        return "from SLUICE_BOOTSTRAP_KEY"
    return f"kept in {plan.settings.data_path / 'bootstrap.key'}"


def _say(name: str, message: str) -> None:
    print(f"{name:<11} {message}", flush=True)


def _on_signals(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """The first signal stops in good order, the second one at once."""

    def received() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, received)


@contextlib.contextmanager
def _only_one(data: Path) -> Iterator[None]:
    """Hold the data directory; raises ConfigError where another `sluice up` does."""
    with (data / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise ConfigError(
                f"another `sluice up` already runs on {data}: stop it, or set another data_dir"
            ) from exc
        yield


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as exc:
        raise ConfigError(
            f"cannot write to the data directory {folder}: {exc.strerror}; make room there, or "
            "set another data_dir",
            param="data_dir",
        ) from exc


def _kept_key(path: Path) -> str:
    """The admin key in `path`, made at the first start and readable by the owner alone."""
    try:
        if key := path.read_text().strip():
            return key
    except FileNotFoundError:
        pass
    key = f"sk-sluice-{secrets.token_urlsafe(32)}"
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(key + "\n")
    return key


def _store_port(data: Path) -> int:
    """The port that the store had last time if it is free, else any free one; it is kept."""
    kept = data / "store.port"
    with contextlib.suppress(OSError, ValueError, ConfigError):
        port = int(kept.read_text())
        _check_port("127.0.0.1", port, "the store's port")
        return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
    kept.write_text(str(found))
    return found


def _check_port(host: str, port: int, setting: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({exc.strerror}): stop what uses it, or set "
                f"another {setting} in the configuration",
                param=setting,
            ) from exc


def _own_engine(settings: Settings) -> Engine:
    section = settings.vllm
    return Engine(
        name=OWN_ENGINE,
        urls=tuple(
            f"http://{_reachable(section.host)}:{section.port + number}"
            for number in range(section.replicas)
        ),
        base=section.served_name,
        max_adapters=section.max_adapters,
        max_rank=section.max_rank,
    )


def _model_path(settings: Settings) -> Path:
    section = settings.vllm
    _vllm_python(settings)
    path = section.model or settings.data_path / "models" / section.served_name
    path = path if path.is_absolute() else settings.folder / path
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"there is no model in {path}: run `make model`, set [vllm] model to a folder that "
            "has one, or name engines of yours under [[engines]]",
            param="vllm.model",
        )
    return path.resolve()


def _vllm_python(settings: Settings) -> Path:
    """The interpreter of vLLM's own environment, found beside ours or below the configuration."""
    named = settings.vllm.python
    for folder in (settings.folder, Path.cwd(), Path(sys.prefix).parent):
        if (folder / named).is_file():
            # Not resolved: a virtual environment is found by the link's own place.
            return (folder / named).absolute()
    raise ConfigError(
        f"vLLM is not installed at {named}: run `make engine`, set [vllm] python, or name engines "
        "of yours under [[engines]]",
        param="vllm.python",
    )


def has_gpu() -> bool:
    return Path("/dev/nvidia0").exists()


def _reachable(host: str) -> str:
    """A host to connect to, for one to listen on."""
    if host in ("", "0.0.0.0"):  # noqa: S104 (compared, not bound)
        return "127.0.0.1"
    return f"[{'::1' if host == '::' else host}]" if ":" in host else host


def _answers(client: httpx2.AsyncClient, url: str) -> Callable[[], Awaitable[bool]]:
    async def ready() -> bool:
        try:
            answer = await client.get(url)
        except httpx2.HTTPError:
            return False
        return answer.status_code == 200

    return ready


def _store_answers(url: str) -> Callable[[], Awaitable[bool]]:
    async def ready() -> bool:
        async with open_stores(url) as stores:
            try:
                await stores.ping()
            except StoreUnavailableError:
                return False
        return True

    return ready


async def _at_once() -> bool:
    return True


if __name__ == "__main__":
    sys.exit(main())
