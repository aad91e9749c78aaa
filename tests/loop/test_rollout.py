"""A version goes from its proposal to promotion and back while an application asks."""

import hashlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import openai
import pytest

from rollout.client import ControlClient
from rollout.errors import UnavailableError
from rollout.state import RolledBack
from tests.loop.conftest import ROUTE, Load, ask
from tests.system import RunningSluice, eventually

pytestmark = pytest.mark.vllm
WAIT = 120.0


@pytest.fixture
def candidate(control: ControlClient, tiny_adapters: Mapping[str, Path]) -> str:
    """A registered version with an adapter."""
    version = control.register(ROUTE, adapter_path=str(tiny_adapters["first"]), note="first")
    return version.name


def test_from_shadow_to_promotion_and_back_by_command_without_a_failed_request(
    running_sluice: RunningSluice, client: openai.OpenAI, control: ControlClient, candidate: str
) -> None:
    sluice = running_sluice.sluice
    stable = control.rollout(ROUTE).stable
    with Load(client) as load:
        sluice("rollout", "propose", ROUTE, candidate, "--reason", "try it")
        eventually(lambda: _pairs(control) >= 5, WAIT, "five pairs from the shadow")
        assert set(load.answered) == {"stable"}

        sluice("rollout", "canary", ROUTE, "50", "--reason", "go on", "--wait", "60")
        eventually(lambda: load.answered["candidate"] >= 5, WAIT, "traffic for the candidate")
        sluice("rollout", "hold", ROUTE, "--reason", "lunch")
        assert "held" in sluice("rollout", "status", ROUTE).stdout
        sluice("rollout", "resume", ROUTE, "--reason", "after lunch")

        refused = sluice("rollout", "promote", ROUTE, "--reason", "now", check=False)
        assert refused.returncode == 1
        assert "the gate has not passed" in refused.stderr
        sluice("rollout", "promote", ROUTE, "--reason", "now", "--force", "--wait", "60")
        assert control.rollout(ROUTE).stable == candidate
        before = load.total()
        eventually(lambda: load.total() > before + 5, WAIT, "answers by the new stable")

        back = sluice("rollout", "rollback", ROUTE, "--reason", "enough")
        assert control.rollout(ROUTE).stable == stable
        assert "gateway" in back.stdout
    kinds = [entry.event.kind for entry in control.history(ROUTE, 6)]
    assert kinds == ["rolled_back", "promoted", "resumed", "held", "canary", "proposed"]


def test_assignment_is_sticky_and_nested(
    client: openai.OpenAI, control: ControlClient, candidate: str
) -> None:
    users = [f"customer-{n}" for n in range(40)]
    control.change(ROUTE, "propose", reason="try", version=candidate)
    assigned = {}
    for percent in (20.0, 60.0):
        changed = control.change(ROUTE, "canary", reason="try", percent=percent, patience=WAIT)
        assert not control.wait_until_served(changed.catalog_revision, WAIT).missing
        arms = {user: ask(client, "hello", user=user) for user in users}
        assert {user: ask(client, "again", user=user) for user in users} == arms
        assigned[percent] = {user for user, arm in arms.items() if arm == "candidate"}
    assert assigned[20.0] < assigned[60.0] < set(users)


def test_every_worker_follows_a_change(control: ControlClient, candidate: str) -> None:
    changed = control.change(ROUTE, "propose", reason="try", version=candidate)
    confirmation = control.wait_until_served(changed.catalog_revision, WAIT)
    assert (confirmation.confirmed, confirmation.missing) == (2, ())


def test_a_candidate_that_people_find_worse_is_rolled_back_without_them(
    client: openai.OpenAI, control: ControlClient, candidate: str
) -> None:
    control.change(ROUTE, "propose", reason="try", version=candidate)
    with Load(client):
        eventually(lambda: _label_for_stable(control), WAIT, "the rollback")
    last = control.history(ROUTE, 1)[0].event
    assert isinstance(last, RolledBack)
    assert last.by == "sluice"
    assert "worse than stable" in last.reason
    assert control.rollout(ROUTE).candidate is None


def test_killing_the_store_under_traffic_costs_no_request(
    running_sluice: RunningSluice, client: openai.OpenAI, control: ControlClient, candidate: str
) -> None:
    with Load(client) as load:
        control.change(ROUTE, "propose", reason="try", version=candidate)
        first = running_sluice.processes()["store"]
        os.kill(first, signal.SIGKILL)
        eventually(lambda: running_sluice.processes()["store"] != first, WAIT, "another store")
        before = load.total()
        eventually(lambda: load.total() > before + 20, WAIT, "traffic without the old store")
        eventually(lambda: _rolled_back(control), WAIT, "a rollback on the new store")
    assert [entry.event.kind for entry in control.history(ROUTE, 2)] == ["rolled_back", "proposed"]


def _pairs(control: ControlClient) -> int:
    evidence = control.rollout(ROUTE).evidence
    return evidence.pairs.total if evidence else 0


def _label_for_stable(control: ControlClient) -> bool:
    """Say of some open cases that stable was right. People can't see which one that is; the
    test can, because the order in which a case is shown follows from its id."""
    for case in control.claim(ROUTE, count=20):
        stable_first = hashlib.sha256(f"order:{case.id}".encode()).digest()[0] % 2 == 0
        control.label(case.id, "first" if stable_first else "second")
    return control.rollout(ROUTE).candidate is None


def _rolled_back(control: ControlClient) -> bool:
    try:
        # One whose answer was lost is not asked for again: it would take back stable.
        if control.rollout(ROUTE).candidate is not None:
            control.change(ROUTE, "rollback", reason="the store is back")
    except UnavailableError:
        return False
    return True
