"""The gateway as an ASGI application: the only place where its parts are put together."""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from uuid import uuid4

import msgspec

from gateway import health
from gateway.accounts import Accounts
from gateway.attempts import Attempts
from gateway.auth import Authenticator
from gateway.call import Receive, Scope, Send
from gateway.capture import Captures
from gateway.control import ControllerDoor, controller_url, is_controllers
from gateway.errors import (
    EndpointNotFoundError,
    MethodNotAllowedError,
    NotReadyError,
    OverloadedError,
)
from gateway.evidence import Evidence
from gateway.fast import FastPath
from gateway.feedback import FeedbackDesk, read_body
from gateway.health import Fleet
from gateway.limits import Admission
from gateway.metrics import Metrics
from gateway.protocol import Exchange
from gateway.questions import answer_questions
from gateway.receipts import Receipts
from gateway.relay import Relay, find_lane, request_name, send_error
from gateway.routing import View
from gateway.settings import GatewaySettings
from gateway.shares import Shares
from gateway.snapshot import FILE_NAME, Options, Snapshot
from gateway.upstream import UpstreamPool
from gateway.wire import INFERENCE_PATHS, passes
from rollout.credentials import ApiKey
from rollout.discovery import Discovery, Lookup, look_up
from rollout.errors import SluiceError
from rollout.redaction import Redactor
from rollout.settings import Settings, bootstrap_key, check_section
from rollout.stores import GatewayPresence, Keeping, Stores, open_stores

_log = logging.getLogger(__name__)
_OBSERVE_SECONDS: Final = 0.5
_FLUSH_SECONDS: Final = 3.0
_READ_PATHS: Final = frozenset({"/v1/models", "/healthz", "/readyz", "/metrics"})
_WRITE_PATHS: Final = INFERENCE_PATHS | {"/v1/feedback"}
# What a reload leaves as it was.
_AT_START: Final = (
    "host", "port", "workers", "backlog", "keep_alive_seconds", "stall_seconds", "poll_seconds",
    "controller_url", "capture", "feedback",
)  # fmt: skip
_EXPOSITION: Final = b"text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class _Parts:
    """What requests are answered with, while the gateway runs."""

    relay: Relay
    fast: FastPath
    snapshot: Snapshot
    metrics: Metrics
    authenticator: Authenticator
    feedback: FeedbackDesk
    controller: ControllerDoor
    discovery: Discovery


class Gateway:
    """Serves between the two ends of the lifespan. One for each worker process."""

    def __init__(
        self, settings: Settings, incarnation: str | None = None, *, lookup: Lookup = look_up
    ) -> None:
        self._settings = settings
        self._lookup = lookup
        self.own = check_section(GatewaySettings, settings.gateway, "gateway")
        # Said before anything is started: without a store nothing can ever be served.
        self._store_url = settings.store_url
        self._incarnation = incarnation or uuid4().hex
        self._admission = Admission(self.own.maximum_inflight)
        self.evidence = Evidence(self._incarnation)
        self._parts: _Parts | None = None
        self.draining = False

    @property
    def inflight(self) -> int:
        """Requests for inference under way."""
        return self._admission.inflight

    def serves(self, model: str) -> bool:
        """Whether a client may ask for it now."""
        return self._parts is not None and model in self._parts.snapshot.view.lanes

    def drain(self) -> None:
        """Turn readiness red and close connections after their answers; what runs goes on."""
        self.draining = True
        if self._parts is not None:
            self._parts.relay.draining = True
            self._parts.snapshot.drain()

    def reload(self, read: Callable[[], Settings]) -> None:
        """Go by the configuration as it is now; one that is refused changes nothing."""
        parts = self._parts
        if parts is None:
            return
        try:
            settings = read()
            own = check_section(GatewaySettings, settings.gateway, "gateway")
        except SluiceError as error:
            parts.metrics.reloaded("refused")
            _log.error("kept the configuration that was read before: %s", error.message)
            return
        left = sorted(name for name in _AT_START if getattr(own, name) != getattr(self.own, name))
        if left:
            _log.warning("a restart is needed for changes of %s", ", ".join(left))
        self.own = own
        parts.relay.configure(own)
        parts.discovery.configure(settings.engine_list(), own.health.resolve_seconds)
        parts.metrics.reloaded("applied")
        _log.info("read the configuration anew")

    def refuse_new(self) -> None:
        """Answer 503 to inference from now on; what runs goes on."""
        if self._parts is not None:
            self._parts.relay.refusing = True

    def take(self, exchange: Exchange) -> bool:
        """Answer a whole request without a task, if it is one that can be; else it comes to
        `__call__`."""
        return self._parts is not None and self._parts.fast.take(exchange)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        parts = self._parts
        if parts is None:
            await send_error(send, NotReadyError("the gateway is starting"), uuid4().hex)
            return
        if scope["path"] in INFERENCE_PATHS and scope["method"] == "POST":
            await parts.relay(scope, receive, send)
            return
        try:
            await self._answer(parts, scope, receive, send)
        except SluiceError as error:
            request_id = request_name(scope["headers"]) or uuid4().hex
            await send_error(send, error, request_id, close=self.draining)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        async with AsyncExitStack() as stack:
            try:
                self._parts = await stack.enter_async_context(self._running())
            except SluiceError as error:
                _log.exception("the gateway cannot start")
                await send({"type": "lifespan.startup.failed", "message": error.message})
                return
            await send({"type": "lifespan.startup.complete"})
            await receive()
        self._parts = None
        await send({"type": "lifespan.shutdown.complete"})

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[_Parts]:
        """Everything that runs beside the requests, for as long as they are served."""
        own = self.own
        metrics, evidence = Metrics(), self.evidence
        captures = Captures(own.capture, metrics)
        receipts = Receipts(own.feedback.maximum_known)
        feedback = FeedbackDesk(
            own.feedback,
            receipts,
            Redactor(**dict(own.capture.redaction)),
            metrics,
            self._incarnation,
        )
        fleet = Fleet(own.health, own.admission.maximum_waiting)
        discovery = Discovery(
            self._settings.engine_list(),
            seconds=own.health.resolve_seconds,
            lookup=self._lookup,
            on_failure=metrics.discovery_failed,
        )
        shares = Shares(self._incarnation, own.workers, metrics)

        def changed(view: View) -> None:
            metrics.serves(view)
            shares.adopt(view)
            evidence.forget({lane.trial.id for lane in view.lanes.values() if lane.trial})

        snapshot = Snapshot(
            self._presence(),
            Options(self._settings.data_path / FILE_NAME, own.poll_seconds),
            on_change=changed,
            on_store=lambda up: metrics.store_up.set(1 if up else 0),
        )

        def moved() -> None:
            fleet.adopt(discovery.engines)
            snapshot.move(discovery.engines)

        await discovery.refresh()
        moved()
        store = self._settings.store
        keeping = Keeping(store.captures, store.captures_hours)
        async with (
            open_stores(self._store_url, keeping) as stores,
            UpstreamPool(own.upstream) as pool,
            ControllerDoor(controller_url(own, self._settings.controller), own) as controller,
        ):
            await snapshot.start(stores)
            await shares.start(stores.quotas)
            authenticator = Authenticator(bootstrap_key())
            attempts = Attempts(own, fleet, pool, metrics)
            accounts = Accounts(metrics, evidence, captures, receipts)
            relay = Relay(
                settings=own,
                snapshot=snapshot,
                authenticator=authenticator,
                admission=self._admission,
                attempts=attempts,
                accounts=accounts,
                shares=shares,
                incarnation=self._incarnation,
            )
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(snapshot.run(stores)),
                    tasks.create_task(evidence.report(stores.evidence, metrics.units_dropped)),
                    tasks.create_task(captures.run(stores.captures)),
                    tasks.create_task(feedback.run(stores)),
                    tasks.create_task(answer_questions(stores.questions, receipts)),
                    tasks.create_task(shares.run(stores.quotas)),
                    tasks.create_task(discovery.follow(moved)),
                    tasks.create_task(health.watch(fleet, pool)),
                    tasks.create_task(metrics.watch_lag()),
                    tasks.create_task(self._observe(metrics, fleet)),
                ]
                fast = FastPath(relay, attempts, accounts)
                yield _Parts(
                    relay, fast, snapshot, metrics, authenticator, feedback, controller, discovery
                )
                fast.end()
                for task in background:
                    task.cancel()
            metrics.flush()
            await self._say_goodbye(stores, snapshot, evidence, captures, shares, feedback)

    async def _say_goodbye(
        self,
        stores: Stores,
        snapshot: Snapshot,
        evidence: Evidence,
        captures: Captures,
        shares: Shares,
        feedback: FeedbackDesk,
    ) -> None:
        """Write what was counted since the last report; a store that is gone must not hold us."""
        try:
            async with asyncio.timeout(_FLUSH_SECONDS):
                await evidence.flush(stores.evidence)
                await captures.flush(stores.captures)
                await shares.settle(stores.quotas)
                await feedback.flush(stores.feedback)
                await snapshot.leave(stores)
        except (SluiceError, TimeoutError) as error:
            _log.warning("the last counts could not be written: %s", error)

    def _presence(self) -> GatewayPresence:
        return GatewayPresence(
            incarnation=self._incarnation,
            host=socket.gethostname(),
            pid=os.getpid(),
            revision=0,
            started_at=datetime.now(UTC),
        )

    async def _observe(self, metrics: Metrics, fleet: Fleet) -> None:
        """Set the gauges that nothing else sets, for ever."""
        loop = asyncio.get_running_loop()
        shown = set[tuple[str, str]]()
        while True:
            metrics.inflight.set(self._admission.inflight)
            before, shown = shown, set()
            for url, replica in fleet.replicas.items():
                up = replica.available(loop.time())
                metrics.replica_up(replica.engine.name, url, up=up)
                shown.add((replica.engine.name, url))
            for gone in before - shown:
                metrics.replica_gone(*gone)
            await asyncio.sleep(_OBSERVE_SECONDS)

    async def _answer(self, parts: _Parts, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if is_controllers(path):
            await self._hand_on(parts.controller, scope, receive, send)
            return
        known_models = path.startswith("/v1/models/")
        if path not in _READ_PATHS and path not in _WRITE_PATHS and not known_models:
            if method == "POST" and passes(path):
                await parts.relay(scope, receive, send)
                return
            raise EndpointNotFoundError(f"there is no {path} here: docs/api.md lists what there is")
        if method != ("POST" if path in _WRITE_PATHS else "GET"):
            raise MethodNotAllowedError(f"{path} does not take {method}")
        match path:
            case "/healthz":
                await _send_json(scope, send, 200, {"status": "ok"})
            case "/readyz":
                await self._ready(parts, scope, send)
            case "/metrics":
                parts.metrics.inflight.set(self._admission.inflight)
                await _send(send, 200, await parts.metrics.render(), _EXPOSITION)
            case "/v1/models":
                await self._models(parts, scope, send)
            case "/v1/feedback":
                await self._feedback(parts, scope, receive, send)
            case _:
                await self._model(parts, scope, send, path.removeprefix("/v1/models/"))

    async def _hand_on(
        self, controller: ControllerDoor, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._admission.inflight += 1
        try:
            if self._admission.full:
                raise OverloadedError("the gateway has as many requests as it can hold: try again")
            await controller(scope, receive, send)
        finally:
            self._admission.inflight -= 1

    async def _feedback(self, parts: _Parts, scope: Scope, receive: Receive, send: Send) -> None:
        key = self._key(parts, scope)
        limits = self.own
        body = await read_body(
            receive, scope["headers"], limits.feedback.maximum_bytes, limits.body_seconds
        )
        first = parts.feedback.take(key, body)
        status = {"object": "feedback", "status": "accepted" if first else "repeated"}
        await _send_json(scope, send, 202 if first else 200, status)

    async def _ready(self, parts: _Parts, scope: Scope, send: Send) -> None:
        if self.draining:
            status, why = 503, "draining"
        elif not parts.snapshot.ready:
            status, why = 503, "no routes are known yet: the store is not there"
        else:
            status, why = 200, "ready"
        await _send_json(
            scope, send, status, {"status": why, "revision": parts.snapshot.view.revision}
        )

    async def _models(self, parts: _Parts, scope: Scope, send: Send) -> None:
        key = self._key(parts, scope)
        lanes = parts.snapshot.view.lanes
        # Routes first, then their versions: most people want a route.
        names = sorted(
            (name for name, lane in lanes.items() if key.allows_route(lane.route.name)),
            key=lambda name: (lanes[name].pinned, name.partition("@")[0], lanes[name].number),
        )
        data = [_model(name, parts.snapshot.view) for name in names]
        await _send_json(scope, send, 200, {"object": "list", "data": data})

    async def _model(self, parts: _Parts, scope: Scope, send: Send, name: str) -> None:
        find_lane(parts.snapshot.view, self._key(parts, scope), name)
        await _send_json(scope, send, 200, _model(name, parts.snapshot.view))

    def _key(self, parts: _Parts, scope: Scope) -> ApiKey:
        if not parts.snapshot.ready:
            raise NotReadyError("the gateway does not know its routes yet: the store is not there")
        authorization = next((v for n, v in scope["headers"] if n == b"authorization"), None)
        return parts.authenticator.authenticate(authorization, parts.snapshot.view.keys)


def _model(name: str, view: View) -> dict[str, object]:
    created = view.lanes[name].stable.version.created_at
    return {
        "id": name,
        "object": "model",
        "created": int(created.timestamp()),
        "owned_by": "sluice",
    }


async def _send_json(scope: Scope, send: Send, status: int, value: object) -> None:
    request_id = request_name(scope["headers"]) or uuid4().hex
    named = (b"x-request-id", request_id.encode())
    await _send(send, status, msgspec.json.encode(value), b"application/json", named)


async def _send(
    send: Send, status: int, body: bytes, content_type: bytes, *more: tuple[bytes, bytes]
) -> None:
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
