"""`sluice rollout replay`, `replays`, `explain` and `judge`, against a real control API."""

import asyncio
import json
import threading
from datetime import UTC, datetime

from rollout.exchanges import Answer, Comparison, Exchange
from rollout.replays import Difference, Replay
from rollout.stores import Stores
from rollout.stores.captures import Taken
from tests.api.live import LiveApi
from tests.cli.conftest import Sluice


def test_a_replay_is_asked_for_looked_at_and_ended(sluice: Sluice) -> None:
    asked = sluice("rollout", "replay", "triage", "2", "--since", "90m", "--no-wait")
    assert asked.returncode == 0
    replay = asked.stdout.split()[0]
    assert "queued" in sluice("rollout", "replays", "triage").stdout
    shown = json.loads(sluice("rollout", "replays", "triage", "--id", replay, "--json").stdout)
    assert shown["replay"]["version"] == 2
    assert "compared  0" in sluice("rollout", "replays", "triage", "--id", replay).stdout
    ended = sluice("rollout", "replays", "triage", "--cancel", replay)
    assert ended.stdout == f"{replay} is cancelled\n"


def test_a_replay_that_is_nonsense_is_refused(sluice: Sluice) -> None:
    assert "as in 24h" in sluice("rollout", "replay", "triage", "2", "--since", "soon").stderr
    assert "no version 'triage@9'" in sluice("rollout", "replay", "triage", "9").stderr
    assert "is no version of triage" in sluice("rollout", "replay", "triage", "other@2").stderr
    assert "no replay 'x'" in sluice("rollout", "replays", "triage", "--id", "x").stderr


def test_a_replay_is_watched_until_it_ends(sluice: Sluice, api: LiveApi) -> None:
    async def shadow(stores: Stores) -> None:
        """What a shadow process would do of it."""
        async with asyncio.timeout(30):
            while not (asked := await stores.replays.list("triage")):
                await asyncio.sleep(0.05)
        await stores.replays.change(asked[0].id, state="running")
        answer = Answer(1, 200, "yes")
        compared = Comparison("r1", "triage", asked[0].id, answer, answer, 0.0, "text")
        exchange = Exchange(
            "r1", "triage", None, "stable", "u", "/v1/completions", "{}", answer, asked[0].asked_at
        )
        told = Difference("r1", 0.0, "text", "Yes or no?", 1, "yes", "no")
        await stores.replays.settle(asked[0], Taken("1-1", exchange), (compared, told))
        await stores.replays.settle(asked[0], Taken("1-2", exchange), "client_error")
        await stores.replays.change(asked[0].id, state="done", found=2)

    working = threading.Thread(target=api.with_stores, args=(shadow,))
    working.start()
    shown = sluice("rollout", "replay", "triage", "2")
    working.join()
    assert shown.returncode == 0
    assert "compared  1: 0 agree (0.0%), 1 disagree" in shown.stdout
    assert "left out  client_error 1" in shown.stdout
    assert "Yes or no?" in shown.stdout


def test_a_replay_belongs_to_its_route(sluice: Sluice, api: LiveApi) -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)

    async def other(stores: Stores) -> None:
        await stores.replays.ask(Replay("replay-1", "other", 1, at, 1, "test", at))

    api.with_stores(other)
    assert "no replay 'replay-1' of triage" in (
        sluice("rollout", "replays", "triage", "--id", "replay-1").stderr
    )


def test_a_version_is_explained_and_a_judge_reported(sluice: Sluice) -> None:
    assert sluice("rollout", "propose", "triage", "3", "--reason", "try it").returncode == 0
    shown = sluice("rollout", "explain", "triage", "--version", "3").stdout
    assert "sha256 abab" in shown
    assert "proposed by" in shown
    assert "try it" in shown
    refused = sluice("rollout", "explain", "triage", "--request-id", "x")
    assert refused.returncode == 1
    assert "nothing is known of a request 'x'" in refused.stderr
    assert "Cohen's kappa" in sluice("rollout", "judge", "triage").stdout
