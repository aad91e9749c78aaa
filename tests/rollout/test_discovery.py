"""Replicas behind a name in DNS: they come, go, and outlive a resolver that fails."""

import asyncio
from collections.abc import Collection

import pytest

from rollout.discovery import Discovery, look_up
from rollout.engines import Engine

pytestmark = pytest.mark.anyio
PLAIN = Engine("plain", ("http://a:1",), "base")
NAMED = Engine("named", ("dns+http://engine:8100",), "base")


class Zone:
    """Names with their addresses; one that is not in it can't be resolved."""

    def __init__(self, **names: tuple[str, ...]) -> None:
        self.names = names

    async def look_up(self, host: str, port: int) -> Collection[str]:
        try:
            return self.names[host]
        except KeyError:
            raise OSError(f"no such name: {host}:{port}") from None


def urls(discovery: Discovery) -> dict[str, tuple[str, ...]]:
    return {engine.name: engine.urls for engine in discovery.engines}


async def test_a_name_stands_for_its_addresses() -> None:
    discovery = Discovery([PLAIN, NAMED], lookup=Zone(engine=("10.0.0.2", "10.0.0.1")).look_up)
    assert urls(discovery) == {"plain": PLAIN.urls, "named": ()}
    assert discovery.unresolved == {"named"}
    assert await discovery.refresh()
    assert urls(discovery)["named"] == ("http://10.0.0.1:8100", "http://10.0.0.2:8100")
    assert not discovery.unresolved
    assert not await discovery.refresh()


async def test_replicas_come_and_go() -> None:
    zone = Zone(engine=("10.0.0.1",))
    discovery = Discovery([NAMED], lookup=zone.look_up)
    await discovery.refresh()
    zone.names["engine"] = ("fd00::1", "10.0.0.3")
    assert await discovery.refresh()
    assert urls(discovery)["named"] == ("http://10.0.0.3:8100", "http://[fd00::1]:8100")


@pytest.mark.parametrize("empty", [True, False])
async def test_the_last_addresses_stay_where_the_resolver_fails(empty: bool) -> None:
    zone, failures = Zone(engine=("10.0.0.1",)), list[str]()
    discovery = Discovery([NAMED], lookup=zone.look_up, on_failure=failures.append)
    await discovery.refresh()
    zone.names = {"engine": ()} if empty else {}
    assert not await discovery.refresh()
    assert urls(discovery)["named"] == ("http://10.0.0.1:8100",)
    assert failures == ["named"]


async def test_one_name_that_fails_keeps_no_other_from_being_found() -> None:
    other = Engine("other", ("dns+http://nowhere:1",), "base")
    discovery = Discovery([other, NAMED], lookup=Zone(engine=("10.0.0.1",)).look_up)
    await discovery.refresh()
    assert urls(discovery) == {"other": (), "named": ("http://10.0.0.1:8100",)}
    assert discovery.unresolved == {"other"}


async def test_another_configuration_is_followed_at_once() -> None:
    discovery = Discovery([PLAIN], seconds=3600, lookup=Zone(engine=("10.0.0.1",)).look_up)
    changed = asyncio.Event()
    task = asyncio.create_task(discovery.follow(changed.set))
    discovery.configure([NAMED])
    async with asyncio.timeout(60):
        await changed.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert urls(discovery) == {"named": ("http://10.0.0.1:8100",)}


async def test_the_systems_resolver_is_asked() -> None:
    assert "127.0.0.1" in await look_up("localhost", 80)
    failures = list[str]()
    invalid = Engine("e", ("dns+http://" + "x" * 64 + ".invalid:80",), "base")
    await Discovery([invalid], on_failure=failures.append).refresh()
    assert failures == ["e"]
