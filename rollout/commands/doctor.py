"""`sluice doctor`: what would keep Sluice from working here, and what to do about it."""

import asyncio
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import httpx2
from rich.table import Table
from rich.text import Text

from rollout.commands.session import Session, Subparsers, command, table
from rollout.discovery import Discovery
from rollout.engines import Engine
from rollout.errors import SluiceError, StoreUnavailableError
from rollout.settings import Settings

_TIMEOUT_SECONDS = 3.0
# A small model, its adapters and the store's log fit into it for a while.
_WANTED_GIB = 5
_MARKS = {"good": ("✓", "green"), "note": ("–", "yellow"), "bad": ("✗", "red")}


@dataclass(frozen=True, slots=True)
class Finding:
    """`advice` says what to do where it is not good."""

    what: str
    state: Literal["good", "note", "bad"]
    said: str
    advice: str = ""


def add(parsers: Subparsers) -> None:
    command(parsers, "doctor", _doctor, "look for what would keep Sluice from working", reads=True)


def _doctor(session: Session) -> int:
    findings = list(_look(session))
    session.show(list[Finding], findings, lambda: _table(findings))
    return 1 if any(finding.state == "bad" for finding in findings) else 0


def _look(session: Session) -> Iterator[Finding]:
    try:
        settings = session.settings
        settings.route_list()
    except SluiceError as exc:
        yield Finding("configuration", "bad", exc.message, "mend the file")
        return
    yield Finding("configuration", "good", str(settings.source or "the defaults"))
    running = _control_api(session)
    yield running
    yield from _data(settings)
    yield _store(settings)
    if settings.engines:
        for engine in settings.engine_list():
            yield from _engine(engine)
    else:
        yield from _own_engine(settings)
    if running.state != "good":
        yield from _ports(settings)


def _control_api(session: Session) -> Finding:
    try:
        gateways = session.client.gateways()
    except SluiceError as exc:
        return Finding("control API", "note", exc.message, "start it with `sluice up`")
    count = len(gateways)
    if count == 0:
        return Finding("control API", "note", "answers; no gateway is alive", "start a gateway")
    return Finding("control API", "good", f"answers; gateway workers alive: {count}")


def _data(settings: Settings) -> Iterator[Finding]:
    folder = settings.data_path
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    if free < _WANTED_GIB:
        yield Finding(
            "disk", "bad", f"{free:.1f} GiB free at {existing}", f"free {_WANTED_GIB} GiB"
        )
    else:
        yield Finding("disk", "good", f"{free:.0f} GiB free at {existing}")
    key = folder / "bootstrap.key"
    if key.exists() and key.stat().st_mode & 0o077:
        yield Finding("key file", "bad", f"{key} can be read by others", f"chmod 600 {key}")


def _store(settings: Settings) -> Finding:
    url = settings.store.url
    if url is None:
        return Finding("store", "good", f"embedded, kept in {settings.data_path / 'store'}")
    try:
        asyncio.run(_ping(url))
    except StoreUnavailableError as exc:
        return Finding("store", "bad", f"{url}: {exc.message}", "start it, or mend [store] url")
    except SluiceError as exc:
        return Finding("store", "bad", exc.message, "mend [store] url")
    return Finding("store", "good", f"{url} answers")


async def _ping(url: str) -> None:
    # Other commands must not wait until all that speaks to the store is loaded.
    from rollout.stores import open_stores

    async with open_stores(url) as stores:
        await stores.ping()


def _engine(engine: Engine) -> Iterator[Finding]:
    headers = {"authorization": f"Bearer {engine.api_key}"} if engine.api_key else {}
    name = f"engine {engine.name}"
    discovery = Discovery([engine])
    asyncio.run(_refresh(discovery))
    if discovery.unresolved:
        urls = ", ".join(engine.urls)
        yield Finding(name, "bad", f"{urls}: no such name", "run it where the name is known")
    for url in discovery.engines[0].urls:
        try:
            response = httpx2.get(
                f"{url}/v1/models", headers=headers, timeout=_TIMEOUT_SECONDS, trust_env=False
            )
            response.raise_for_status()
            served = {str(model["id"]) for model in response.json()["data"]}
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as exc:
            yield Finding(name, "bad", f"{url}: {exc}", "start it, or mend its urls")
            continue
        if engine.base in served:
            yield Finding(name, "good", f"{url} serves {engine.base}")
        else:
            yield Finding(
                name,
                "bad",
                f"{url} serves {', '.join(sorted(served)) or 'nothing'}, not {engine.base!r}",
                "set base to the name under which it serves its base model",
            )


async def _refresh(discovery: Discovery) -> None:
    await discovery.refresh()


def _own_engine(settings: Settings) -> Iterator[Finding]:
    python = settings.folder / settings.vllm.python
    if python.exists():
        yield Finding("vLLM", "good", str(python))
    else:
        yield Finding(
            "vLLM", "bad", f"{python} is not there", "run `make engine`, or configure [[engines]]"
        )
    model = settings.vllm.model or settings.data_path / "models" / settings.vllm.served_name
    path = settings.folder / model
    if (path / "config.json").is_file():
        yield Finding("model", "good", str(path))
    else:
        yield Finding(
            "model", "bad", f"{path} holds no model", "run `make model`, or mend [vllm] model"
        )


def _ports(settings: Settings) -> Iterator[Finding]:
    gateway = settings.gateway
    wanted = [
        ("[gateway]", str(gateway.get("host", "127.0.0.1")), int(gateway.get("port", 8000))),
        ("[controller]", settings.controller.host, settings.controller.port),
    ]
    if not settings.engines:
        first = settings.vllm.port
        ports = range(first, first + settings.vllm.replicas)
        wanted += [("[vllm]", settings.vllm.host, port) for port in ports]
    for section, host, port in wanted:
        if _free(host, port):
            yield Finding("port", "good", f"{host}:{port} is free for {section}")
        else:
            advice = f"stop what listens there, or set another port under {section}"
            yield Finding("port", "bad", f"{host}:{port} is in use", advice)


def _free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _table(findings: list[Finding]) -> Table:
    made = table("", "WHAT", "FOUND", "WHAT TO DO")
    for finding in findings:
        mark, colour = _MARKS[finding.state]
        made.add_row(Text(mark, colour), finding.what, Text(finding.said), Text(finding.advice))
    return made
