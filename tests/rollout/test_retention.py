"""The leading controller erases what routes keep no longer, and shows how far labelers agree."""

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from rollout.cases import Label, LabelledCase
from rollout.metrics import ControllerMetrics
from tests.rollout.house import LONG_AGO, Clock, House
from tests.rollout.test_cases import case

pytestmark = pytest.mark.anyio


def labelled(name: str, *labelers: str) -> LabelledCase:
    """A case of a day ago on which these people agreed."""
    asked = replace(case(name), labels_needed=len(labelers))
    *others, last = (Label(name, "triage", "both", each, LONG_AGO) for each in labelers)
    return LabelledCase(asked, last, tuple(others))


async def left(house: House) -> list[str]:
    return [found.id for found, _ in await house.stores.cases.list("triage")]


async def test_the_leader_sweeps_once_an_hour_and_writes_it_down(house: House) -> None:
    clock = Clock()
    controller = await house.leader(clock, retention_days=0.5)
    await house.stores.cases.put_labelled([labelled("old", "ann")])
    await controller.sweep()
    assert await left(house) == []
    entry = (await house.stores.audit.list())[0]
    assert (entry.action, entry.subject, entry.by) == ("cases.expire", "triage", "sluice")
    assert entry.after is not None
    assert '"cases":1,"labels":1' in entry.after

    await house.stores.cases.put_labelled([labelled("later", "ann")])
    await controller.sweep()
    assert await left(house) == ["later"]
    clock.turn(3600)
    await controller.hold_lease()
    await controller.sweep()
    assert await left(house) == []


@pytest.mark.parametrize("days", [0.0, 30.0])
async def test_what_is_kept_longer_or_for_ever_stays(house: House, days: float) -> None:
    controller = await house.leader(retention_days=days)
    await house.stores.cases.put_labelled([labelled("old", "ann")])
    await controller.sweep()
    assert await left(house) == ["old"]


async def test_who_does_not_lead_erases_nothing(house: House) -> None:
    await house.leader(retention_days=0.5)
    other = house.controller(retention_days=0.5)
    await other.tick()
    await house.stores.cases.put_labelled([labelled("old", "ann")])
    await other.sweep()
    assert await left(house) == ["old"]


async def test_the_agreement_of_labelers_is_shown_once_there_is_any(house: House) -> None:
    registry = CollectorRegistry()
    controller = house.controller(metrics=ControllerMetrics(registry))
    await controller.hold_lease()
    await controller.tick()
    await controller.observe()
    labels = {"route": "triage"}
    assert registry.get_sample_value("sluice_labelers_alpha", labels) is None
    first = labelled("c1", "ann", "ben")
    chosen = tuple(replace(label, choice="neither") for label in labelled("c2", "x", "y").labels)
    second = LabelledCase(labelled("c2", "x", "y").case, chosen[1], chosen[:1])
    await house.stores.cases.put_labelled([first, second])
    await controller.observe()
    assert registry.get_sample_value("sluice_labelers_alpha", labels) == 1.0
    disputed = labels | {"state": "disputed"}
    assert registry.get_sample_value("sluice_cases", disputed) == 0
