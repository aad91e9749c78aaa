"""Adapters on engines: what must be resident, and loading, probing, admitting, unloading it.

A version's adapter gets traffic on a replica only after it answered a real request there under its
own served name. Losing one is the other way round: first gateways stop sending, then it is unloaded.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import httpx2

from rollout.catalog import Catalog
from rollout.engines import Engine, Placement, Residency, placement
from rollout.errors import EngineUnavailableError, UnservableError
from rollout.state import Rollout
from rollout.stores import Stores
from rollout.versions import Version

log = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{20}")
# Of what an engine says of itself; some of it repeats a whole traceback.
_LONGEST_REASON = 300
_PENDING = "it is being loaded"
_QUEUED = "it waits until an adapter that nothing needs any more has drained"


@dataclass(frozen=True, slots=True)
class Waits:
    """How long things may take, in seconds.

    answer: a replica, to say what it serves. load, probe: an adapter, to be loaded, and to answer.
    drain: an adapter that nothing needs any more, before gateways are told to leave it alone.
    notice: from there until it is unloaded. retry, longest_retry: after a load or probe that
    failed, doubling from the one to the other. `patience` is the number of looks in a row that may
    run out of time before a replica counts as down: a busy one is slow, and not gone.
    """

    answer: float = 5.0
    load: float = 120.0
    probe: float = 60.0
    drain: float = 30.0
    notice: float = 5.0
    retry: float = 2.0
    longest_retry: float = 120.0
    patience: int = 3


@dataclass(frozen=True, slots=True)
class ResidencyPlan:
    """Served names to load and to unload on one replica, and those that it has no slot for."""

    load: tuple[str, ...] = ()
    unload: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pass:
    """What a replica was proved to serve, and whether there is more to do at once."""

    residency: Residency
    unfinished: bool = False


@dataclass(slots=True)
class _Failure:
    """Why an adapter could not be admitted, and when to try again."""

    reason: str
    attempts: int
    retry_at: float


def required_versions(
    catalog: Catalog, wanted: Collection[str]
) -> Mapping[str, tuple[Version, ...]]:
    """The versions with an adapter that each engine must hold, the most important first.

    That is by what would suffer, over all routes: every stable, for it has the traffic; then the
    candidates; then what somebody wants to look at, for a while; then the last stables, each route's
    way back. Versions that share weights are one.
    """
    required: dict[str, dict[str, Version]] = {}
    for name in _needed(list(catalog.rollouts.values()), wanted):
        version = catalog.versions.get(name)
        if version is not None and version.adapter is not None:
            required.setdefault(version.engine, {}).setdefault(version.served_name, version)
    return {engine: tuple(versions.values()) for engine, versions in required.items()}


def _needed(rollouts: Sequence[Rollout], wanted: Collection[str]) -> Iterator[str]:
    yield from (f"{rollout.route}@{rollout.stable}" for rollout in rollouts)
    yield from (f"{r.route}@{r.trial.candidate}" for r in rollouts if r.trial is not None)
    yield from sorted(wanted)
    yield from (f"{r.route}@{r.previous}" for r in rollouts if r.previous is not None)


def residency_plan(
    adapters: Set[str],
    required: Sequence[str],
    drained: Set[str],
    *,
    base: str,
    max_adapters: int,
) -> ResidencyPlan:
    """What to do on a replica that holds `adapters`, so that it comes to hold `required`.

    `required` is in the order of importance. Only names of our own scheme are unloaded, and only
    those in `drained`. Adapters that somebody else loaded keep their slots. Never plans for more
    than `max_adapters` at a time.
    """
    slots = _slots(adapters, base, max_adapters)
    missing = [name for name in required[:slots] if name not in adapters]
    idle = idle_adapters(adapters, required, base=base, max_adapters=max_adapters)
    return ResidencyPlan(
        load=tuple(missing[: max(0, max_adapters - len(adapters))]),
        unload=tuple(sorted(idle & drained)),
        refused=tuple(required[slots:]),
    )


def idle_adapters(
    adapters: Set[str], required: Sequence[str], *, base: str, max_adapters: int
) -> frozenset[str]:
    """Those of our adapters that nothing needs, or that must make room for more important ones."""
    kept = required[: _slots(adapters, base, max_adapters)]
    return _ours(adapters, base) - frozenset(kept)


def is_ours(name: str, base: str) -> bool:
    """Whether `name` follows our scheme for adapters, `base-<20 hex digits>`."""
    prefix, _, digest = name.rpartition("-")
    return prefix == base and _DIGEST.fullmatch(digest) is not None


def _ours(adapters: Set[str], base: str) -> frozenset[str]:
    return frozenset(name for name in adapters if is_ours(name, base))


def _slots(adapters: Set[str], base: str, max_adapters: int) -> int:
    """How many of our adapters there is room for."""
    return max(0, max_adapters - len(adapters - _ours(adapters, base)))


async def wait_resident(
    stores: Stores, version: Version, timeout_seconds: float, *, poll_seconds: float = 0.2
) -> Placement:
    """Wait until every ready replica serves the version; returns at once where that is so.

    Something must need it: a rollout that names it, or `stores.catalog.want`. Raises
    EngineUnavailableError with what is missing when the time is over.
    """

    async def look() -> Placement:
        return placement(version, (await stores.catalog.load()).residency.values())

    # Before the time begins, so that what is missing is known whatever the time.
    found = await look()
    try:
        async with asyncio.timeout(timeout_seconds):
            while not found.everywhere:
                await asyncio.sleep(poll_seconds)
                found = await look()
    except TimeoutError:
        raise EngineUnavailableError(
            f"{version.name} is not resident after {timeout_seconds:g} s: {found.reason}"
        ) from None
    return found


class _SlowError(EngineUnavailableError):
    """It may be busy and not gone: ask again before you give it up."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The names of the adapters that a replica holds, and where it has its base from."""

    adapters: frozenset[str]
    root: str = ""


class ReplicaApi:
    """One replica's HTTP API, as vLLM speaks it; every request has a time limit."""

    def __init__(self, client: httpx2.AsyncClient, engine: Engine, url: str, waits: Waits) -> None:
        self._client = client
        self._engine = engine
        self._url = url
        self._waits = waits

    async def check_health(self) -> None:
        """Raises EngineUnavailableError unless `/health` answers 200."""
        answer = await self._send("GET", "/health", self._waits.answer)
        if answer.status_code != 200:
            raise EngineUnavailableError(f"{self._url}/health answers {answer.status_code}")

    async def list_served(self) -> "Listing":
        """What it says that it holds. Raises EngineUnavailableError where it does not say."""
        answer = await self._send("GET", "/v1/models", self._waits.answer)
        if answer.status_code in (401, 403):
            raise EngineUnavailableError(
                f"{self._url} refuses the key: set `api_key` of engine {self._engine.name!r}"
            )
        if answer.status_code != 200:
            raise EngineUnavailableError(f"{self._url}/v1/models answers {answer.status_code}")
        try:
            cards = answer.json()["data"]
            adapters = frozenset(str(card["id"]) for card in cards if card.get("parent"))
            base = (card for card in cards if card["id"] == self._engine.base)
            root = next((card.get("root") for card in base), None)
            return Listing(adapters, str(root or ""))
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise EngineUnavailableError(
                f"{self._url}/v1/models is no list of models: is that an OpenAI-compatible server?"
            ) from exc

    async def load(self, served_name: str, path: str) -> None:
        """Load an adapter; one that is there already is fine.

        Raises UnservableError where the engine refuses it, EngineUnavailableError where it does
        not answer.
        """
        body = {"lora_name": served_name, "lora_path": path}
        answer = await self._send("POST", "/v1/load_lora_adapter", self._waits.load, body)
        if answer.status_code == 200 or _already_loaded(answer):
            return
        if answer.status_code == 404 and _no_such_endpoint(answer):
            raise UnservableError(
                f"{self._url} loads no adapters at run time: start vLLM with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )
        if answer.status_code == 404:
            raise UnservableError(
                f"{self._url} finds no adapter at {path}: the engine must be able to read the "
                f"artifact store under that very path ({_reason(answer)})"
            )
        if answer.status_code in (502, 503, 504):
            raise EngineUnavailableError(f"{self._url} answers {answer.status_code} to a load")
        raise UnservableError(
            f"{self._url} cannot serve {served_name} ({answer.status_code}): {_reason(answer)}"
        )

    async def unload(self, served_name: str) -> None:
        """Unload an adapter; one that is gone already is fine."""
        body = {"lora_name": served_name}
        answer = await self._send("POST", "/v1/unload_lora_adapter", self._waits.load, body)
        if answer.status_code not in (200, 404):
            raise EngineUnavailableError(
                f"{self._url} did not unload {served_name} ({answer.status_code}): {_reason(answer)}"
            )

    async def probe(self, served_name: str) -> None:
        """Have it answer one token under that name.

        Raises UnservableError where it refuses, EngineUnavailableError where it does not answer.
        """
        body = {"model": served_name, "prompt": "Hi", "max_tokens": 1, "temperature": 0}
        answer = await self._send("POST", "/v1/completions", self._waits.probe, body)
        if answer.status_code != 200:
            raise UnservableError(
                f"{self._url} lists {served_name} and answers {answer.status_code} to it: "
                f"{_reason(answer)}"
            )

    async def _send(
        self, method: str, path: str, seconds: float, body: Mapping[str, Any] | None = None
    ) -> httpx2.Response:
        key = self._engine.api_key
        try:
            return await self._client.request(
                method,
                f"{self._url}{path}",
                json=body,
                headers={"authorization": f"Bearer {key}"} if key else None,
                timeout=seconds,
            )
        except httpx2.TimeoutException as exc:
            raise _SlowError(f"{self._url}{path} took more than {seconds:g} s") from exc
        except httpx2.RequestError as exc:
            raise EngineUnavailableError(f"{self._url} does not answer: {exc}") from exc


class Replica:
    """Brings one replica to hold what is required, and knows what it was proved to serve.

    Call `reconcile` again and again, from one task.
    """

    def __init__(
        self,
        client: httpx2.AsyncClient,
        engine: Engine,
        url: str,
        waits: Waits | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.url = url
        self._waits = waits or Waits()
        self._api = ReplicaApi(client, engine, url, self._waits)
        self._monotonic = monotonic
        self._ready = False
        self._slow_looks = 0
        self._proved: set[str] = set()
        self._idle_since: dict[str, float] = {}
        self._failures: dict[str, _Failure] = {}
        self._refused: tuple[str, ...] = ()
        self._queued: frozenset[str] = frozenset()
        self._root = ""
        self._down = ""

    @property
    def failures(self) -> Mapping[str, str]:
        """Why adapters that should be here could not be admitted, by served name."""
        return {name: failure.reason for name, failure in self._failures.items()}

    def remember(self, published: Residency | None) -> None:
        """Begin with what was last made known of this replica, by whoever looked after it.

        Proving everything anew would take traffic away from adapters that serve it well. What the
        engine has lost since is found at the first look.
        """
        self._slow_looks = 0
        self._ready = published is not None and published.ready
        self._proved = set(published.served) if published is not None else set()
        self._down = published.down if published is not None else ""
        self._root = published.root if published is not None else ""

    async def reconcile(self, required: Sequence[Version]) -> Pass:
        """Look, unload what nobody needs, and admit one adapter that is missing.

        One at a time, so that what is proved can be made known before the next one is loaded.
        """
        versions = {version.served_name: version for version in required}
        try:
            listing = await self._look()
        except _SlowError as exc:
            gone = self._slow_looks + 1 >= self._waits.patience
            return self._not_answering(exc, tuple(versions), gone=gone)
        except EngineUnavailableError as exc:
            return self._not_answering(exc, tuple(versions), gone=True)
        self._ready, self._slow_looks, self._down = True, 0, ""
        self._root, adapters = listing.root, listing.adapters
        self._proved &= adapters
        if self.engine.kind != "vllm":
            return self._pass(())
        plan = self._plan(adapters, tuple(versions))
        await self._unload(plan.unload)
        self._failures = {n: f for n, f in self._failures.items() if n in versions}
        admissible = (set(versions) & adapters | set(plan.load)) - self._proved - set(plan.refused)
        due = [v for name, v in versions.items() if name in admissible and self._is_due(name)]
        if due:
            await self._admit(due[0], loaded=due[0].served_name in adapters)
        return self._pass(tuple(versions), unfinished=len(due) > 1)

    async def _look(self) -> Listing:
        if self.engine.kind == "vllm":
            # Either may answer while the other fails: a dead engine process lists its models still.
            await self._api.check_health()
        return await self._api.list_served()

    def _not_answering(
        self, why: EngineUnavailableError, required: Sequence[str], *, gone: bool
    ) -> Pass:
        self._slow_looks += 1
        if self._ready and gone:
            log.warning("replica %s is out: %s", self.url, why.message)
        if gone:
            self._ready = False
            self._proved.clear()
            # The first reason stays: each change is announced to every gateway.
            self._down = self._down or self._said(why.message)
        return self._pass(required)

    def _plan(self, adapters: Set[str], required: Sequence[str]) -> ResidencyPlan:
        plan = residency_plan(
            adapters,
            required,
            self._drained(adapters, required),
            base=self.engine.base,
            max_adapters=self.engine.max_adapters,
        )
        if plan.refused and plan.refused != self._refused:
            log.warning(
                "replica %s has %d adapter slots and no room for %s: raise max_adapters (and vLLM's "
                "--max-cpu-loras), or end a trial",
                self.url,
                self.engine.max_adapters,
                ", ".join(plan.refused),
            )
        self._refused = plan.refused
        self._queued = frozenset(required) - adapters - {*plan.load, *plan.refused}
        return plan

    def _drained(self, adapters: Set[str], required: Sequence[str]) -> frozenset[str]:
        """Names to unload now. On the way there, those that gateways must leave alone first."""
        now = self._monotonic()
        idle = idle_adapters(
            adapters, required, base=self.engine.base, max_adapters=self.engine.max_adapters
        )
        self._idle_since = {name: self._idle_since.get(name, now) for name in idle}
        for name, since in self._idle_since.items():
            if now - since >= self._waits.drain:
                self._proved.discard(name)
        patience = self._waits.drain + self._waits.notice
        return frozenset(n for n, since in self._idle_since.items() if now - since >= patience)

    async def _unload(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                await self._api.unload(name)
            except EngineUnavailableError as exc:
                log.warning("%s; trying again at the next pass", exc.message)
            else:
                log.info("replica %s: unloaded %s", self.url, name)

    async def _admit(self, version: Version, *, loaded: bool) -> None:
        name = version.served_name
        try:
            _check_base(version, self.engine)
            if not loaded:
                await self._api.load(name, _path_of(version))
            await self._api.probe(name)
        except (UnservableError, EngineUnavailableError) as exc:
            self._failed(name, exc.message)
        else:
            self._failures.pop(name, None)
            self._proved.add(name)
            log.info("replica %s: %s serves %s", self.url, name, version.name)

    def _failed(self, name: str, message: str) -> None:
        reason = self._said(message)
        before = self._failures.get(name)
        attempts = 1 if before is None else before.attempts + 1
        wait = min(self._waits.longest_retry, self._waits.retry * 2.0 ** min(attempts - 1, 30))
        self._failures[name] = _Failure(reason, attempts, self._monotonic() + wait)
        if before is None or before.reason != reason:
            log.error("%s; trying again in %g s", message, wait)

    def _said(self, message: str) -> str:
        """What a replica said, for a place where its url stands beside it."""
        text = " ".join(message.removeprefix(self.url).split())
        return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"

    def _is_due(self, name: str) -> bool:
        failure = self._failures.get(name)
        return failure is None or self._monotonic() >= failure.retry_at

    def _pass(self, required: Sequence[str], *, unfinished: bool = False) -> Pass:
        if not self._ready:
            return Pass(Residency(self.engine.name, self.url, ready=False, down=self._down))
        missing = {name: self._why_not(name) for name in required if name not in self._proved}
        return Pass(
            Residency(
                self.engine.name,
                self.url,
                ready=True,
                served=frozenset({self.engine.base, *self._proved}),
                missing=missing,
                root=self._root,
            ),
            unfinished,
        )

    def _why_not(self, name: str) -> str:
        if name in self._refused:
            return (
                f"no room: its {self.engine.max_adapters} adapter slots hold what matters more; raise "
                "max_adapters (and vLLM's --max-cpu-loras), or end a trial"
            )
        if name in self._queued:
            return _QUEUED
        failure = self._failures.get(name)
        return failure.reason if failure is not None else _PENDING


def _check_base(version: Version, engine: Engine) -> None:
    """Other weights below an adapter are another version, though the engine would not notice."""
    asked, there = version.base_revision, engine.base_revision
    if version.base != engine.base:
        raise UnservableError(
            f"{version.name} was made for base {version.base!r}, and the engine serves {engine.base!r}"
        )
    if asked is not None and there is not None and asked != there:
        raise UnservableError(
            f"{version.name} was made for revision {asked} of the base, and the engine serves {there}: "
            "register it anew for that, or bring the engine back"
        )


def _path_of(version: Version) -> str:
    if version.adapter_path is None:
        raise UnservableError(
            f"{version.name} has an adapter and no path to read it from: register it again"
        )
    return version.adapter_path


def _already_loaded(answer: httpx2.Response) -> bool:
    return answer.status_code == 400 and "already been loaded" in answer.text


def _no_such_endpoint(answer: httpx2.Response) -> bool:
    """FastAPI's own 404, in place of one in OpenAI's shape."""
    return bool(_json(answer) == {"detail": "Not Found"})


def _reason(answer: httpx2.Response) -> str:
    """The engine's own words, at most a few lines of them."""
    match _json(answer):
        case {"error": {"message": str(message)}} | {"message": str(message)}:
            return message[:500]
        case _:
            return answer.text[:500].strip() or "no reason given"


def _json(answer: httpx2.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None
