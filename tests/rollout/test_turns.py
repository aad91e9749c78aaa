"""Where more trials are on than a tick judges, they take turns."""

from pathlib import Path

import httpx2
import pytest

import rollout.loops
from rollout.routes import Route
from rollout.state import Proposed
from rollout.stores import open_stores
from rollout.versions import Version
from tests.rollout.house import LONG_AGO, House
from tests.stub_engine import StubEngine

pytestmark = pytest.mark.anyio


async def test_every_trial_is_judged_within_as_many_ticks_as_there_are_turns(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout.loops, "_JUDGED_IN_A_TICK", 2)
    async with (
        open_stores(redis_url) as stores,
        StubEngine(base="base") as engine,
        httpx2.AsyncClient() as client,
    ):
        controller = await House(stores, engine, client, tmp_path).leader()
        trials: list[tuple[str, str]] = []
        for number in range(5):
            name = f"route-{number}"
            await stores.rollouts.put_route(Route(name, "main"), by="t", at=LONG_AGO, base="base")
            draft = Version(name, 0, "main", "base", LONG_AGO, adapter="a" * 64)
            version = await stores.rollouts.register(draft)
            before = await stores.rollouts.get(name)
            done = await stores.rollouts.commit(before, Proposed(version.number, LONG_AGO, "t"))
            assert done.rollout.trial is not None
            trials.append((name, done.rollout.trial.id))
        for judged in (2, 4, 5, 5):
            await controller.tick()
            verdicts = await stores.evidence.verdicts_many(trials)
            assert sum(bool(each) for each in verdicts) == judged
