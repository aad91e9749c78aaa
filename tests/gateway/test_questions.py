"""Gateways tell what they remember of a request, to whoever asks where an answer came from."""

from pathlib import Path

import pytest

from rollout.assignment import unit_of
from rollout.exchanges import Receipt
from rollout.routes import Route
from rollout.stores import open_stores
from tests.gateway.serving import KEY, catalog, serving, settings
from tests.gateway.shadowing import until
from tests.stub_engine import StubEngine

pytestmark = pytest.mark.anyio
ADAPTER = "cd" * 32


@pytest.mark.parametrize("session", [None, "anna"])
async def test_who_answered_a_request_says_so(
    redis_url: str, tmp_path: Path, session: str | None
) -> None:
    async with (
        open_stores(redis_url) as stores,
        StubEngine(any_model=True) as engine,
        serving(settings(tmp_path / "one", engine.url, store=redis_url)) as one,
        serving(settings(tmp_path / "two", engine.url, store=redis_url)) as two,
    ):
        for gateway in (one, two):
            known = catalog(engine.url, candidate=ADAPTER, route=Route("r", "main"))
            gateway.app._parts.snapshot.adopt(known)  # type: ignore[union-attr]
        sticky = {} if session is None else {"x-sluice-session": session}
        assert (await one.ask(**{"x-request-id": "mine", **sticky})).status == 200

        async def told() -> bool:
            # A gateway that has just started listens to what is asked from then on.
            return bool(await stores.questions.ask("mine", 2, 1.0))

        await until(told, "an answer")
        (receipt,) = await stores.questions.ask("mine", 2, 5.0)
        unit = unit_of(KEY.id, session or "mine")
        assert receipt == Receipt("r", 2, "candidate", "r@2.2", unit)
        assert await stores.questions.ask("nobodys", 2, 5.0) == []
