"""The catalog as a gateway follows it: what did not change is not read anew."""

from dataclasses import replace

import pytest

from rollout.policy import Policy
from rollout.routes import Route
from rollout.state import Proposed
from rollout.stores import Stores, open_stores
from rollout.versions import Version
from tests.stores.conftest import AT

pytestmark = pytest.mark.anyio


async def test_what_changed_is_read_and_the_rest_kept(stores: Stores, redis_url: str) -> None:
    await stores.rollouts.put_route(Route("other", "main"), by="t", at=AT, base="tiny")
    before = await stores.catalog.load()
    async with open_stores(redis_url) as elsewhere:
        route = replace(before.routes["triage"], policy=Policy(alpha=0.01))
        await elsewhere.rollouts.put_route(route, by="t", at=AT, base="tiny")
        version = await elsewhere.rollouts.register(Version("triage", 0, "main", "tiny", AT))
        proposed = Proposed(version.number, AT, "t")
        rollout = await elsewhere.rollouts.get("triage")
        commit = await elsewhere.rollouts.commit(rollout, proposed)
        fresh = await elsewhere.catalog.load()
    after = await stores.catalog.load()
    assert after == fresh
    assert after.routes["triage"] == route
    assert after.rollouts["triage"] == commit.rollout
    assert after.versions["triage@2"] == version
    assert after.routes["other"] is before.routes["other"]
    assert after.versions["other@1"] is before.versions["other@1"]


async def test_what_is_gone_is_gone(stores: Stores, redis_url: str) -> None:
    assert "triage" in (await stores.catalog.load()).routes
    await stores._link.run("FLUSHALL")
    assert (await stores.catalog.load()).routes == {}
