"""A small furnished house: a route with three versions, an engine, cases that wait."""

from dataclasses import replace
from datetime import UTC, datetime

from rollout.cases import Case
from rollout.credentials import ApiKey, Scope, digest_secret
from rollout.engines import Residency
from rollout.evidence import Verdict
from rollout.exchanges import Answer, Comparison, Exchange
from rollout.routes import Route
from rollout.settings import EngineSection, Settings
from rollout.stores import Stores
from rollout.versions import Prompt, Version

ADMIN = "sk-sluice-bootstrap"
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
REPLICA = "http://127.0.0.1:8100"
PROMPTED = "triage@2"
ADAPTED = "triage@3"


def settings() -> Settings:
    return Settings(
        engines=(EngineSection(name="main", urls=(REPLICA,), base="tiny", max_rank=16),)
    )


async def furnish(stores: Stores) -> None:
    """Route `triage` with the bare base, a prompted version and one with an adapter."""
    await stores.rollouts.put_route(
        Route(name="triage", engine="main"), by="test", at=AT, base="tiny"
    )
    base = Version(route="triage", number=0, engine="main", base="tiny", created_at=AT)
    prompt = Prompt(messages=({"role": "system", "content": "Be brief."},))
    await stores.rollouts.register(replace(base, prompt=prompt, note="with a prompt"))
    adapted = replace(base, adapter="ab" * 32, adapter_path="/adapters/ab", note="tuned")
    await stores.rollouts.register(adapted)


async def make_resident(stores: Stores, name: str = ADAPTED) -> None:
    version = await stores.rollouts.version(name)
    served = frozenset({"tiny", version.served_name})
    await stores.catalog.put_residency([Residency("main", REPLICA, ready=True, served=served)])


async def add_key(
    stores: Stores, name: str, *scopes: Scope, routes: frozenset[str] | None = None
) -> dict[str, str]:
    """The header of a new key."""
    secret = f"sk-sluice-{name}"
    key = ApiKey(name, name, digest_secret(secret), frozenset(scopes), AT, routes)
    await stores.credentials.add(key, by="test")
    return {"authorization": f"Bearer {secret}"}


async def pass_gate(stores: Stores) -> None:
    """Let the gates pass that every plan asks for unless it says otherwise."""
    rollout = await stores.rollouts.get("triage")
    assert rollout.trial is not None
    verdicts = [
        Verdict(gate, "pass", 31.0, 20.0, 40, "not worse than the margin")
        for gate in ("pairs", "errors")
    ]
    await stores.evidence.put_verdicts("triage", rollout.trial.id, verdicts)


def case(case_id: str, prompt: str = "", *, priority: float = 1.0) -> Case:
    return Case(
        id=case_id,
        route="triage",
        trial="triage@2.2",
        request_id=f"of-{case_id}",
        messages=({"role": "user", "content": prompt or f"What of {case_id}?"},),
        stable=Answer(version=1, status=200, text="stable says yes"),
        candidate=Answer(version=2, status=200, text="candidate says no"),
        agreement=0.0,
        kind="text",
        inclusion=1.0,
        priority=priority,
        created_at=AT,
    )


async def offer(stores: Stores, *cases: Case) -> None:
    """Put cases into the queue the way the shadow does."""
    for offered in cases:
        await stores.captures.append([_exchange(offered)])
        (taken,) = await stores.captures.take("test", 1, 1.0)
        settled = await stores.captures.settle(taken, _comparison(offered), offered, 1000)
        assert settled.offered


def _exchange(offered: Case) -> Exchange:
    return Exchange(
        request_id=offered.request_id,
        route=offered.route,
        trial=offered.trial,
        arm="stable",
        unit="u",
        path="/v1/chat/completions",
        request="{}",
        answer=offered.stable,
        captured_at=AT,
    )


def _comparison(offered: Case) -> Comparison:
    return Comparison(
        request_id=offered.request_id,
        route=offered.route,
        trial=offered.trial,
        stable=offered.stable,
        candidate=offered.candidate,
        agreement=0.0,
        kind="text",
    )
