"""A replica that is brought to hold what is required, and what it was proved to serve."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import httpx2

from rollout.engines import Engine, Residency
from rollout.errors import EngineUnavailableError, UnservableError
from rollout.serving.api import Listing, ReplicaApi, SlowError, Waits
from rollout.serving.plan import ResidencyPlan, idle_adapters, residency_plan
from rollout.versions import Version

log = logging.getLogger(__name__)

# Of what an engine says of itself; some of it repeats a whole traceback.
_LONGEST_REASON = 300
_PENDING = "it is being loaded"
_QUEUED = "it waits until an adapter that nothing needs any more has drained"


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
        except SlowError as exc:
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
