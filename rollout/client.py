"""A client of the control API, for the command line and for programs that drive a rollout."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2
from pydantic import TypeAdapter, ValidationError

from rollout.advice import Advice
from rollout.cases import Choice, Label
from rollout.control.views import (
    CaseView,
    Changed,
    DatasetDifference,
    EngineView,
    ErasureView,
    Explanation,
    Imported,
    JudgeView,
    KeyView,
    NewKey,
    Recorded,
    RolloutView,
    RouteView,
    Verb,
    VersionView,
)
from rollout.credentials import NO_LIMITS, KeyLimits
from rollout.datasets import Contradiction, Dropped, Manifest
from rollout.errors import (
    AuthenticationError,
    EngineUnavailableError,
    SluiceError,
    UnavailableError,
)
from rollout.evidence import Report, RowResult
from rollout.formats import Format
from rollout.records import AuditEntry, CaseStats, GatewayPresence, HistoryEntry
from rollout.replays import Replay, ReplayReport
from rollout.runs import RunEvent, TrainingRun
from rollout.suites import SuiteManifest, SuiteStanding

T = TypeVar("T")
JSON = Mapping[str, Any]

_POLL_SECONDS = 0.02
_RETRY_SECONDS = 0.5
# A million cases are looked through in less.
_ERASURE_SECONDS = 600.0
_REGISTER_SECONDS = 3600.0
# How long a stream of progress may be interrupted by a controller that restarts.
_RECONNECT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Confirmation:
    """`missing` are the live gateways that had not confirmed when the time was over."""

    confirmed: int
    missing: tuple[GatewayPresence, ...]


class ControlClient:
    """Speaks to one control API as one key. Every method raises the SluiceError that the API
    answered with, or UnavailableError where nobody answered."""

    def __init__(self, url: str, key: str, *, timeout: float = 30.0) -> None:
        self._url = url.rstrip("/")
        self._http = httpx2.Client(
            base_url=f"{self._url}/api/v1",
            headers={"authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(timeout, connect=5.0),
            # The control plane is inside the house: a proxy for the outside is in the way.
            trust_env=False,
            # Over plain http nobody reads the certificates, and reading them in takes a while.
            verify=not self._url.startswith("http://"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # Routes and rollouts

    def routes(self) -> list[RouteView]:
        return self._get(list[RouteView], "/routes")

    def route(self, name: str) -> RouteView:
        return self._get(RouteView, f"/routes/{name}")

    def put_route(self, name: str, configuration: JSON) -> RouteView:
        """Create or configure a route; `configuration` is the body of PUT /routes/{route}."""
        return self._send(RouteView, "PUT", f"/routes/{name}", configuration)

    def rollout(self, route: str) -> RolloutView:
        return self._get(RolloutView, f"/routes/{route}/rollout")

    def history(self, route: str, limit: int = 100) -> list[HistoryEntry]:
        return self._get(list[HistoryEntry], f"/routes/{route}/history", limit=limit)

    def change(
        self,
        route: str,
        verb: Verb,
        *,
        reason: str,
        version: str | None = None,
        percent: float | None = None,
        revision: int | None = None,
        force: bool = False,
        plan: JSON | None = None,
        queue: bool = False,
        patience: float = 0.0,
        timeout: float | None = None,
    ) -> Changed:
        """Move a rollout. For `patience` seconds it waits for an engine to serve the candidate.

        `timeout` is for whoever can do it without an API that hangs.
        """
        options = {} if timeout is None else {"timeout": timeout}
        body = {
            "reason": reason,
            "version": version,
            "percent": percent,
            "revision": revision,
            "force": force,
            "plan": plan,
            "queue": queue or None,
        }
        body = {name: value for name, value in body.items() if value is not None}
        until = time.monotonic() + patience
        while True:
            try:
                return self._send(
                    Changed, "POST", f"/routes/{route}/rollout/{verb}", body, **options
                )
            except EngineUnavailableError:
                if time.monotonic() >= until:
                    raise
            time.sleep(_RETRY_SECONDS)

    def wait_until_served(self, catalog_revision: int, seconds: float) -> Confirmation:
        """Wait until every live gateway serves that revision, at most so long.

        A gateway that drains takes no new requests, so nobody waits for it.
        """
        until = time.monotonic() + seconds
        while True:
            live = [gateway for gateway in self.gateways() if not gateway.draining]
            missing = tuple(each for each in live if each.revision < catalog_revision)
            if not missing or time.monotonic() >= until:
                return Confirmation(len(live) - len(missing), missing)
            time.sleep(_POLL_SECONDS)

    # Replays

    def replay(
        self, route: str, version: str, *, since_seconds: float = 86_400, limit: int = 1000
    ) -> Replay:
        """Ask for past captures of the route to be put through a version."""
        body = {"version": version, "since_seconds": since_seconds, "limit": limit}
        return self._send(Replay, "POST", f"/routes/{route}/replays", body)

    def replays(self, route: str) -> list[Replay]:
        return self._get(list[Replay], f"/routes/{route}/replays")

    def replay_report(self, route: str, replay: str) -> ReplayReport:
        return self._get(ReplayReport, f"/routes/{route}/replays/{replay}")

    def cancel_replay(self, route: str, replay: str) -> Replay:
        return self._send(Replay, "POST", f"/routes/{route}/replays/{replay}/cancel", {})

    def explain(
        self, route: str, *, request_id: str | None = None, version: str | None = None
    ) -> Explanation:
        """Where an answer, or a version, came from."""
        return self._get(
            Explanation, f"/routes/{route}/explain", request_id=request_id, version=version
        )

    def advice(self, route: str) -> Advice:
        return self._get(Advice, f"/routes/{route}/advice")

    def judge(self, route: str) -> JudgeView:
        return self._get(JudgeView, f"/routes/{route}/judge")

    # Versions and engines

    def versions(self, route: str | None = None) -> list[VersionView]:
        return self._get(list[VersionView], "/versions", route=route)

    def version(self, name: str) -> VersionView:
        return self._get(VersionView, f"/versions/{name}")

    def register(
        self,
        route: str,
        *,
        prompt: JSON | None = None,
        sampling: JSON | None = None,
        adapter_path: str | None = None,
        adapter_url: str | None = None,
        sha256: str | None = None,
        note: str = "",
    ) -> VersionView:
        """`prompt` is {"messages": […], "mode": "prepend" | "replace_system"}."""
        body = {
            "route": route,
            "prompt": prompt,
            "sampling": sampling or {},
            "adapter_path": adapter_path,
            "adapter_url": adapter_url,
            "sha256": sha256,
            "note": note,
        }
        # The controller has limits of its own for what it fetches and hashes.
        response = self._request("POST", "/versions", json=body, timeout=_REGISTER_SECONDS)
        return self._read(VersionView, response)

    def engines(self) -> list[EngineView]:
        return self._get(list[EngineView], "/engines")

    def gateways(self) -> list[GatewayPresence]:
        return self._get(list[GatewayPresence], "/gateways")

    # Cases

    def cases(
        self, route: str | None = None, state: str | None = None, limit: int = 100
    ) -> list[CaseView]:
        return self._get(list[CaseView], "/cases", route=route, state=state, limit=limit)

    def case_stats(self, route: str | None = None) -> list[CaseStats]:
        return self._get(list[CaseStats], "/cases/stats", route=route)

    def claim(
        self, route: str | None = None, count: int = 1, lease_seconds: int = 600
    ) -> list[CaseView]:
        body = {"route": route, "count": count, "lease_seconds": lease_seconds}
        return self._send(list[CaseView], "POST", "/cases/claim", body)

    def label(
        self, case: str, choice: Choice, *, correction: str | None = None, comment: str = ""
    ) -> Recorded:
        body = {"choice": choice, "correction": correction, "comment": comment}
        return self._send(Recorded, "POST", f"/cases/{case}/label", body)

    def labels(self, case: str) -> list[Label]:
        return self._get(list[Label], f"/cases/{case}/labels")

    def release(self, case: str) -> None:
        self._request("POST", f"/cases/{case}/release")

    def export_cases(self, route: str | None = None) -> Iterator[bytes]:
        """The labelled cases as lines of JSON, in pieces of any length."""
        try:
            with self._http.stream("GET", "/cases/export", params=_params(route=route)) as response:
                if response.is_error:
                    response.read()
                self._check(response)
                yield from response.iter_bytes()
        except httpx2.TransportError as exc:
            raise self._unreachable(exc) from exc

    def erase_cases(
        self,
        *,
        unit: str | None = None,
        user: str | None = None,
        request_id: str | None = None,
        older_than_days: float | None = None,
        route: str | None = None,
        reason: str = "",
    ) -> ErasureView:
        """By whose they are, or by age; `user` is KEY_ID/STICKY. It looks at all that is kept."""
        params = _params(
            unit=unit,
            user=user,
            request_id=request_id,
            older_than_days=older_than_days,
            route=route,
            reason=reason,
        )
        response = self._request("DELETE", "/cases", params=params, timeout=_ERASURE_SECONDS)
        return self._read(ErasureView, response)

    def import_cases(self, lines: bytes) -> Imported:
        return self._read(Imported, self._request("POST", "/cases/import", content=lines))

    # Training

    def start_run(
        self,
        route: str,
        config: JSON | None = None,
        dataset: str | None = None,
        *,
        propose: bool = True,
    ) -> TrainingRun:
        body = {"route": route, "config": config or {}, "dataset": dataset, "propose": propose}
        return self._send(TrainingRun, "POST", "/runs", body)

    def runs(self, route: str | None = None, limit: int = 50) -> list[TrainingRun]:
        return self._get(list[TrainingRun], "/runs", route=route, limit=limit)

    def run(self, run_id: str) -> TrainingRun:
        return self._get(TrainingRun, f"/runs/{run_id}")

    def cancel_run(self, run_id: str) -> TrainingRun:
        return self._send(TrainingRun, "POST", f"/runs/{run_id}/cancel", {})

    def pause_run(self, run_id: str) -> TrainingRun:
        return self._send(TrainingRun, "POST", f"/runs/{run_id}/pause", {})

    def resume_run(self, run_id: str) -> TrainingRun:
        return self._send(TrainingRun, "POST", f"/runs/{run_id}/resume", {})

    def follow_run(self, run_id: str) -> Iterator[RunEvent | TrainingRun]:
        """Each line of progress as it comes, from the first one on; last the ended run."""
        after = "0"
        lost_at: float | None = None
        while True:
            try:
                for event in self._events(run_id, after):
                    lost_at = None
                    if event.event == "end":
                        yield _decode(TrainingRun, event.data)
                        return
                    after = event.id
                    yield _decode(RunEvent, event.data)
            except UnavailableError:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > _RECONNECT_SECONDS:
                    raise
            time.sleep(_RETRY_SECONDS)

    def build_dataset(self, route: str, config: JSON | None = None) -> TrainingRun:
        """Queue a run that ends in a dataset; `follow_run` watches it."""
        body = {"route": route, "config": config or {}}
        return self._send(TrainingRun, "POST", "/datasets", body)

    def import_dataset(
        self,
        route: str,
        content: bytes,
        *,
        file: str,
        format: Format | None = None,  # the name in the API
        config: JSON | None = None,
    ) -> TrainingRun:
        params = _params(route=route, file=file[:200], format=format, **(config or {}))
        response = self._request("POST", "/datasets/import", params=params, content=content)
        return self._read(TrainingRun, response)

    def datasets(self, route: str | None = None) -> list[Manifest]:
        return self._get(list[Manifest], "/datasets", route=route)

    def manifest(self, digest: str) -> Manifest:
        return self._get(Manifest, f"/datasets/{digest}/manifest")

    def dataset(self, digest: str, format: Format = "rows", split: str | None = None) -> bytes:
        """Its rows as lines of JSON."""
        params = _params(format=format, split=split)
        return self._request("GET", f"/datasets/{digest}", params=params).content

    def dropped(self, digest: str, reason: str | None = None) -> list[Dropped]:
        return self._get(list[Dropped], f"/datasets/{digest}/dropped", reason=reason)

    def contradictions(self, digest: str) -> list[Contradiction]:
        return self._get(list[Contradiction], f"/datasets/{digest}/contradictions")

    def compare_datasets(self, before: str, after: str) -> DatasetDifference:
        return self._get(DatasetDifference, f"/datasets/{before}/diff", after=after)

    # Evaluation

    def add_suite(
        self,
        route: str,
        rows: bytes,
        scorers: Sequence[Mapping[str, Any]] = (),
        *,
        vault: bool = False,
        note: str = "",
    ) -> SuiteManifest:
        """Register rows, as lines of JSON, with the scorers that mark them."""
        content = json.dumps({"scorers": list(scorers)}).encode() + b"\n" + rows
        params = _params(route=route, vault=str(vault).lower(), note=note)
        response = self._request("POST", "/suites", params=params, content=content)
        return self._read(SuiteManifest, response)

    def suites(self, route: str | None = None) -> list[SuiteManifest]:
        return self._get(list[SuiteManifest], "/suites", route=route)

    def suite(self, digest: str) -> SuiteStanding:
        return self._get(SuiteStanding, f"/suites/{digest}")

    def suite_rows(self, digest: str) -> bytes:
        """Its scorers and its rows as lines of JSON."""
        return self._request("GET", f"/suites/{digest}/rows").content

    def evaluate(self, version: str, **wish: Any) -> TrainingRun:
        """Ask a trainer for a report; the run's `report` names it in the end."""
        return self._send(TrainingRun, "POST", "/reports", {"version": version, **wish})

    def report_rows(self, report_id: str) -> list[RowResult]:
        return self._get(list[RowResult], f"/reports/{report_id}/rows")

    def reports(
        self, route: str | None = None, limit: int = 50, version: str | None = None
    ) -> list[Report]:
        return self._get(list[Report], "/reports", route=route, limit=limit, version=version)

    def report(self, report_id: str) -> Report:
        return self._get(Report, f"/reports/{report_id}")

    # Keys

    def create_key(
        self,
        name: str,
        scopes: Sequence[str],
        routes: Sequence[str] | None = None,
        limits: KeyLimits = NO_LIMITS,
    ) -> NewKey:
        body = {
            "name": name,
            "scopes": list(scopes),
            "routes": None if routes is None else list(routes),
            "limits": asdict(limits),
        }
        return self._send(NewKey, "POST", "/keys", body)

    def keys(self) -> list[KeyView]:
        return self._get(list[KeyView], "/keys")

    def limit_key(self, key_id: str, limits: Mapping[str, int | None]) -> KeyView:
        return self._send(KeyView, "PATCH", f"/keys/{key_id}/limits", dict(limits))

    def revoke_key(self, key_id: str) -> None:
        self._request("DELETE", f"/keys/{key_id}")

    def audit(self, limit: int = 100) -> list[AuditEntry]:
        return self._get(list[AuditEntry], "/audit", limit=limit)

    # How it speaks

    def _get(self, kind: type[T], path: str, **params: object) -> T:
        return self._read(kind, self._request("GET", path, params=_params(**params)))

    def _send(self, kind: type[T], method: str, path: str, body: JSON, **options: Any) -> T:
        return self._read(kind, self._request(method, path, json=body, **options))

    def _request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx2.TransportError as exc:
            raise self._unreachable(exc) from exc
        self._check(response)
        return response

    def _events(self, run_id: str, after: str) -> Iterator[httpx2.ServerSentEvent]:
        headers = {"last-event-id": after}
        try:
            with self._http.stream("GET", f"/runs/{run_id}/events", headers=headers) as response:
                if response.is_error:
                    response.read()
                self._check(response)
                yield from httpx2.EventSource(response)
        except httpx2.TransportError as exc:
            raise self._unreachable(exc) from exc

    def _read(self, kind: type[T], response: httpx2.Response) -> T:
        try:
            return _decode(kind, response.content)
        except ValidationError as exc:
            raise UnavailableError(
                f"what {self._url} answers is no answer of this version of Sluice: is it the control "
                "API, and as new as this command?"
            ) from exc

    def _check(self, response: httpx2.Response) -> None:
        if not response.is_error:
            return
        try:
            body = response.json()["error"]
            message, code, param = str(body["message"]), str(body["code"]), body["param"]
        except (ValueError, KeyError, TypeError):
            raise UnavailableError(
                f"{self._url} answered {response.status_code} and is not the control API: set "
                "--url or SLUICE_URL"
            ) from None
        if code == AuthenticationError.code:
            message += ". Give another with --key or SLUICE_KEY"
        error = _error_class(code, response.status_code)(message, param=param)
        raise error

    def _unreachable(self, exc: Exception) -> UnavailableError:
        return UnavailableError(
            f"the control API at {self._url} does not answer ({exc}): start Sluice with `sluice up`, "
            "or say where it is with --url or SLUICE_URL"
        )


def _decode(kind: type[T], text: bytes | str) -> T:
    value: T = TypeAdapter(kind).validate_json(text)
    return value


def _params(**params: object) -> dict[str, str]:
    return {name: str(value) for name, value in params.items() if value is not None}


def _error_class(code: str, status: int) -> type[SluiceError]:
    """The class with this code, or failing that the most general one with this status."""
    classes = list(_all_errors(SluiceError))
    for kind in classes:
        if kind.code == code:
            return kind
    return next((kind for kind in classes if kind.status == status), SluiceError)


def _all_errors(kind: type[SluiceError]) -> Iterator[type[SluiceError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _all_errors(child)
