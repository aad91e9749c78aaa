"""`sluice version`, and what people are told of a version that is not resident."""

from dataclasses import replace

from rollout.engines import Residency
from rollout.stores import Stores
from tests.api.house import ADAPTED, REPLICA, make_resident
from tests.api.live import LiveApi
from tests.cli.conftest import Sluice

OTHER = "http://127.0.0.1:8101"


async def refuse(stores: Stores) -> None:
    """The other replica says why it does not serve the version."""
    await make_resident(stores)
    name = (await stores.rollouts.version(ADAPTED)).served_name
    why = {name: "rank 64 > max_lora_rank 16"}
    await stores.catalog.put_residency([Residency("main", OTHER, True, missing=why)])


def test_status_and_show_say_why_it_waits(sluice: Sluice, api: LiveApi) -> None:
    api.with_stores(refuse)
    sluice("rollout", "propose", "triage", ADAPTED)
    shown = sluice("version", "show", ADAPTED).stdout
    assert f"not on {OTHER}" in shown
    assert "rank 64 > max_lora_rank 16" in shown
    assert "1 of 2" in sluice("version", "list", "triage").stdout
    status = sluice("rollout", "status", "triage").stdout
    waits = f"waits until {ADAPTED} is resident: replica {OTHER}: rank 64 > max_lora_rank 16"
    assert waits in " ".join(status.split())
    refused = sluice("rollout", "canary", "triage", "10")
    assert refused.returncode == 1
    assert "rank 64 > max_lora_rank 16" in refused.stderr
    assert sluice("rollout", "canary", "triage", "10", "--force").returncode == 0


def test_a_way_back_that_no_replica_serves_is_asked_about(sluice: Sluice, api: LiveApi) -> None:
    async def two_adapted(stores: Stores) -> str:
        adapted = await stores.rollouts.version(ADAPTED)
        other = await stores.rollouts.register(replace(adapted, number=0, adapter="cd" * 32))
        served = frozenset({"tiny", adapted.served_name, other.served_name})
        await stores.catalog.put_residency([Residency("main", REPLICA, True, served)])
        return other.name

    async def lose_the_first(stores: Stores) -> None:
        await make_resident(stores, second)

    second = api.with_stores(two_adapted)
    for version in (ADAPTED, second):
        sluice("rollout", "propose", "triage", version)
        assert sluice("rollout", "promote", "triage", "--force").returncode == 0
    api.with_stores(lose_the_first)
    refused = sluice("rollout", "rollback", "triage")
    assert refused.returncode == 1
    assert f"no replica serves {ADAPTED} now" in refused.stderr
    assert sluice("rollout", "rollback", "triage", "--force").returncode == 0
