"""Rollouts are committed whole or not at all, and everyone is told."""

import asyncio
from typing import get_args

import pytest

from rollout.credentials import ApiKey
from rollout.engines import Residency
from rollout.errors import NotFoundError, RefusedError, StaleRevisionError, StoreUnavailableError
from rollout.policy import Policy, plan_of
from rollout.routes import Route
from rollout.state import (
    CanarySet,
    Event,
    Held,
    Promoted,
    Proposed,
    Queued,
    Resumed,
    RolledBack,
    Rollout,
    Withdrawn,
)
from rollout.stores import GatewayPresence, Stores, open_stores
from rollout.stores.codec import decode
from rollout.versions import Prompt, Version
from tests.stores.conftest import AT

pytestmark = pytest.mark.anyio


def draft(**fields: object) -> Version:
    values = {"route": "triage", "number": 0, "engine": "main", "base": "tiny", "created_at": AT}
    return Version(**(values | fields))  # type: ignore[arg-type]


async def test_a_new_route_begins_with_the_bare_base_as_stable(stores: Stores) -> None:
    assert await stores.rollouts.get("triage") == Rollout("triage", revision=1, stable=1)
    version = await stores.rollouts.version("triage@1")
    assert (version.base, version.adapter, version.served_name) == ("tiny", None, "tiny")


async def test_putting_a_route_again_changes_its_configuration_and_not_its_rollout(
    stores: Stores,
) -> None:
    await stores.rollouts.register(draft())
    before = await stores.rollouts.get("triage")
    await stores.rollouts.commit(before, Proposed(version=2, at=AT, by="test"))
    route = Route(name="triage", engine="main", capture=0.5)
    assert not await stores.rollouts.put_route(route, by="test", at=AT, base="other")
    assert (await stores.rollouts.route("triage")).capture == 0.5
    assert (await stores.rollouts.get("triage")).trial is not None


async def test_versions_are_numbered_in_order_and_read_back_whole(stores: Stores) -> None:
    prompt = Prompt(messages=({"role": "system", "content": "Be brief."},), mode="replace_system")
    second = await stores.rollouts.register(draft(prompt=prompt, sampling={"temperature": 0}))
    third = await stores.rollouts.register(draft(adapter="ab" * 32, adapter_path="/x", parent=2))
    assert [second.name, third.name] == ["triage@2", "triage@3"]
    assert await stores.rollouts.version("triage@2") == second
    assert await stores.rollouts.versions("triage") == [
        await stores.rollouts.version("triage@1"),
        second,
        third,
    ]


async def test_unknown_routes_and_versions_are_not_found(stores: Stores) -> None:
    with pytest.raises(NotFoundError, match="no route 'nope'"):
        await stores.rollouts.get("nope")
    with pytest.raises(NotFoundError, match="no version 'triage@9'"):
        await stores.rollouts.version("triage@9")
    with pytest.raises(NotFoundError):
        await stores.rollouts.register(draft(route="nope"))


async def test_a_commit_changes_state_history_audit_and_revision_together(stores: Stores) -> None:
    before = await stores.rollouts.get("triage")
    revision = await stores.catalog.revision()
    event = Proposed(version=2, at=AT, by="ann", reason="looks good")
    commit = await stores.rollouts.commit(before, event)
    assert commit.catalog_revision == revision + 1
    assert await stores.rollouts.get("triage") == commit.rollout
    (entry,) = await stores.rollouts.history("triage")
    assert (entry.event, entry.before, entry.after) == (event, before, commit.rollout)
    assert (await stores.audit.list())[0].action == "rollout.proposed"


async def test_of_two_commits_on_one_revision_only_the_first_counts(stores: Stores) -> None:
    before = await stores.rollouts.get("triage")
    await stores.rollouts.commit(before, Proposed(version=2, at=AT, by="ann"))
    with pytest.raises(StaleRevisionError):
        await stores.rollouts.commit(before, Proposed(version=3, at=AT, by="bob"))
    assert len(await stores.rollouts.history("triage")) == 1


async def test_the_same_commit_sent_twice_is_one_commit(stores: Stores) -> None:
    before = await stores.rollouts.get("triage")
    event = Proposed(version=2, at=AT, by="ann")
    first = await stores.rollouts.commit(before, event)
    assert await stores.rollouts.commit(before, event) == first
    assert len(await stores.rollouts.history("triage")) == 1


async def test_a_commit_whose_answer_was_lost_is_known_again_though_others_went_on(
    stores: Stores,
) -> None:
    before = await stores.rollouts.get("triage")
    event = Proposed(version=2, at=AT, by="ann")
    first = await stores.rollouts.commit(before, event)
    await stores.rollouts.commit(first.rollout, CanarySet(percent=10, at=AT, by="bob"))
    again = await stores.rollouts.commit(before, event)
    assert again.rollout == first.rollout
    kinds = [entry.event.kind for entry in await stores.rollouts.history("triage")]
    assert kinds == ["canary", "proposed"]


async def test_a_refused_event_leaves_nothing_behind(stores: Stores) -> None:
    before = await stores.rollouts.get("triage")
    with pytest.raises(RefusedError):
        await stores.rollouts.commit(before, Promoted(at=AT, by="ann"))
    assert await stores.rollouts.history("triage") == []


async def test_every_kind_of_event_is_read_back_as_itself(stores: Stores) -> None:
    rollout = await stores.rollouts.get("triage")
    events: list[Event] = [
        Proposed(version=2, at=AT, by="a"),
        Queued(version=3, at=AT, by="a", plan=plan_of(Policy())),
        Queued(version=4, at=AT, by="a"),
        Withdrawn(version=4, at=AT, by="a"),
        CanarySet(percent=10, at=AT, by="a"),
        Held(at=AT, by="a"),
        Resumed(at=AT, by="a"),
        Promoted(at=AT, by="a"),
        RolledBack(at=AT, by="a"),
        Proposed(version=3, at=AT, by="a", plan=plan_of(Policy())),
    ]
    assert {type(event) for event in events} == set(get_args(Event))
    for event in events:
        rollout = (await stores.rollouts.commit(rollout, event)).rollout
    history = await stores.rollouts.history("triage")
    assert [entry.event for entry in reversed(history)] == events
    assert await stores.rollouts.get("triage") == rollout


def test_what_an_older_release_stored_is_read_back() -> None:
    text = """{"route": "triage", "revision": 6, "stable": 2, "previous": 1, "trial": {"id": "triage@3.6",
        "candidate": 3, "stage": "canary", "weight": 10.0, "started_at": "2026-01-02T03:04:05Z",
        "stage_since": "2026-01-02T03:04:05Z"}}"""
    rollout = decode(Rollout, text)
    assert rollout.queued == ()
    assert rollout.trial is not None
    assert rollout.trial.plan is None
    policy = '{"alpha": 0.01, "steps": [5.0, 25.0], "automatic": true}'
    assert plan_of(decode(Policy, policy)).steps[1].percent == 5.0


async def test_the_catalog_holds_everything_of_one_revision(stores: Stores) -> None:
    key = ApiKey("k1", "app", "d" * 64, frozenset({"infer"}), AT)
    await stores.credentials.add(key, by="test")
    residency = Residency("main", "http://e:1", ready=True, served=frozenset({"tiny"}))
    await stores.catalog.put_residency([residency])
    catalog = await stores.catalog.load()
    assert catalog.revision == await stores.catalog.revision()
    assert set(catalog.routes) == set(catalog.rollouts) == {"triage"}
    assert catalog.keys == {"d" * 64: key}
    assert catalog.residency == {"http://e:1": residency}


async def test_residency_is_announced_only_where_it_changed(stores: Stores) -> None:
    def residency(**missing: str) -> Residency:
        served = frozenset({"a", "b", "c"})
        return Residency("main", "http://e:1", ready=True, served=served, missing=missing)

    await stores.catalog.put_residency([residency(d="rank", e="no room")])
    revision = await stores.catalog.revision()
    await stores.catalog.put_residency([residency(e="no room", d="rank")])
    assert await stores.catalog.revision() == revision
    await stores.catalog.put_residency([residency(e="no room")])
    assert await stores.catalog.revision() > revision


async def test_a_replica_that_is_gone_is_forgotten_once(stores: Stores) -> None:
    await stores.catalog.put_residency([Residency("main", "http://e:1", ready=True)])
    before = await stores.catalog.revision()
    await stores.catalog.forget_residency(["http://e:1", "http://e:2"])
    catalog = await stores.catalog.load()
    assert catalog.residency == {}
    assert catalog.revision == before + 1
    await stores.catalog.forget_residency(["http://e:1"])
    await stores.catalog.forget_residency([])
    assert await stores.catalog.revision() == before + 1


async def test_announcements_begin_with_the_present_and_follow_each_change(stores: Stores) -> None:
    announcements = stores.catalog.announcements()
    first = await anext(announcements)
    assert first == await stores.catalog.revision()
    following = asyncio.ensure_future(anext(announcements))
    before = await stores.rollouts.get("triage")
    commit = await stores.rollouts.commit(before, Proposed(version=2, at=AT, by="ann"))
    assert await asyncio.wait_for(following, 60) == commit.catalog_revision


async def test_a_revoked_key_is_gone_from_the_catalog(stores: Stores) -> None:
    await stores.credentials.add(ApiKey("k1", "app", "d", frozenset({"infer"}), AT), by="test")
    await stores.credentials.revoke("k1", by="test")
    assert (await stores.catalog.load()).keys == {}
    with pytest.raises(NotFoundError):
        await stores.credentials.revoke("k1", by="test")


async def test_gateways_are_live_until_they_leave(stores: Stores) -> None:
    presence = GatewayPresence("i1", "host", 1, revision=7, started_at=AT)
    await stores.presence.report(presence)
    assert await stores.presence.live() == [presence]
    await stores.presence.leave("i1")
    assert await stores.presence.live() == []


async def test_wanted_versions_expire(stores: Stores) -> None:
    await stores.catalog.want("triage@2", 60)
    await stores.catalog.want("triage@3", -1)
    assert await stores.catalog.wanted() == {"triage@2"}


async def test_a_lease_has_one_holder_and_a_growing_fence(stores: Stores) -> None:
    first = await stores.leases.acquire("controller", "a", 10)
    assert first is not None
    assert await stores.leases.acquire("controller", "b", 10) is None
    assert await stores.leases.acquire("controller", "a", 10) == first
    assert not await stores.leases.renew("controller", "b", 10)
    await stores.leases.release("controller", "b")
    assert await stores.leases.renew("controller", "a", 10)
    await stores.leases.release("controller", "a")
    second = await stores.leases.acquire("controller", "b", 10)
    assert second is not None
    assert second > first


async def test_a_store_that_is_not_there_is_said_to_be_unavailable() -> None:
    async with open_stores("redis://127.0.0.1:1/0") as stores:
        with pytest.raises(StoreUnavailableError, match="does not answer"):
            await stores.catalog.load()
        with pytest.raises(StoreUnavailableError):
            await anext(stores.catalog.announcements())
