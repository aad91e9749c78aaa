"""What `sluice up` starts on one machine: worked out beforehand, with whatever stands in its way."""

import contextlib
import json
import os
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2

from rollout.engines import Engine
from rollout.errors import ConfigError, StoreUnavailableError
from rollout.processes import Service
from rollout.settings import Settings, bootstrap_key
from rollout.stores import open_stores
from rollout.stores.embedded import valkey_command
from rollout.vllm import SHUTDOWN_SECONDS, vllm_command, vllm_environment

# The engine that is brought along goes by this name in the routes.
OWN_ENGINE = "main"
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
            "base_revision": engine.base_revision,
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


def services(plan: Plan, client: httpx2.AsyncClient) -> Iterator[Service]:
    """Every process of the plan, the store first; `client` asks them whether they are ready."""
    settings = plan.settings
    environment = role_environment(plan, os.environ)
    if plan.store_port is not None:
        folder = settings.data_path / "store"
        make_folder(folder)
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


def make_folder(folder: Path) -> None:
    """Make sure that it is there and can be written to; raises ConfigError where it can't."""
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
    """Whether there is an NVIDIA GPU with its driver."""
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
