"""Each command against a real control API: what it prints, where, and its exit status."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from rollout.assignment import unit_of
from rollout.records import GatewayPresence
from rollout.runs import RunEvent
from rollout.stores import Stores
from tests.api.house import ADAPTED, AT, case, make_resident, offer, pass_gate
from tests.api.live import LiveApi
from tests.cli.conftest import Sluice


def test_a_rollout_from_proposal_to_the_way_back(sluice: Sluice, api: LiveApi) -> None:
    api.with_stores(make_resident)
    assert "triage@3 is in the shadow" in sluice("rollout", "propose", "triage", "3").stdout
    assert "takes 10 % of the traffic" in sluice("rollout", "canary", "triage", "10").stdout
    assert "(held)" in sluice("rollout", "hold", "triage", "--reason", "lunch").stdout
    assert sluice("rollout", "resume", "triage").returncode == 0
    refused = sluice("rollout", "promote", "triage")
    assert refused.returncode == 1
    assert refused.stderr.startswith("sluice: the gate has not passed triage@3")
    assert refused.stderr.count("\n") == 1
    api.with_stores(pass_gate)
    status = sluice("rollout", "status", "triage").stdout
    assert "pairs pass" in status
    assert "shadow > 1 % > [10 %] > 50 % > promotion" in status
    assert "waits for 20 more units" in status
    assert "waits for approval: sluice rollout advance triage" in status
    assert "e-value 31 of 20" in status
    assert "triage@3 takes all" in sluice("rollout", "promote", "triage").stdout
    back = sluice("rollout", "rollback", "triage", "--reason", "it was wrong")
    assert back.returncode == 0
    assert "triage@1 takes all" in back.stdout
    assert "no gateway is alive" in back.stdout
    history = json.loads(sluice("rollout", "history", "triage", "--json").stdout)
    assert history[0]["event"]["kind"] == "rolled_back"
    assert history[0]["event"]["reason"] == "it was wrong"
    assert "rolled back" in sluice("rollout", "history", "triage").stdout


def test_a_plan_comes_with_a_proposal_and_is_refused_with_its_line(
    sluice: Sluice, api: LiveApi, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('automatic = true\n[[steps]]\npercent = 5\ngates = ["ttft"]\n')
    refused = sluice("rollout", "propose", "triage", "2", "--plan", str(plan))
    assert refused.returncode == 1
    assert f"{plan}, line 4: steps.0.gates: `ttft` could never pass" in refused.stderr
    plan.write_text("steps = [\n5,\n]\nautomated = true\n")
    typo = sluice("rollout", "propose", "triage", "2", "--plan", str(plan))
    assert f"{plan}, line 4: automated: " in typo.stderr
    plan.write_text("automatic = true\n[[steps]]\npercent = 5\nminimum_units = 77\n")
    assert sluice("rollout", "propose", "triage", "2", "--plan", str(plan)).returncode == 0
    assert "[shadow] > 5 % > promotion" in sluice("rollout", "status", "triage").stdout
    standing = json.loads(sluice("rollout", "status", "triage", "--json").stdout)["standing"]
    assert standing["plan"]["steps"][1]["minimum_units"] == 77
    assert [wait["kind"] for wait in standing["waits"]] == ["gate", "soak", "residency"]
    # The route may have such a file too, and a trial that runs keeps its own.
    plan.write_text("steps = [30, 20]\n")
    falling = sluice("route", "set", "triage", "--plan", str(plan))
    assert f"{plan}, line 1: steps.1: 20 % comes behind 30 %" in falling.stderr
    plan.write_text("steps = [20, 30]\n")
    assert sluice("route", "set", "triage", "--plan", str(plan)).returncode == 0
    assert "[shadow] > 5 % > promotion" in sluice("rollout", "status", "triage").stdout


def test_a_second_candidate_waits_for_its_turn_or_is_withdrawn(sluice: Sluice) -> None:
    assert sluice("rollout", "propose", "triage", "2").returncode == 0
    refused = sluice("rollout", "propose", "triage", "3")
    assert "let this one wait for its turn (--queue)" in refused.stderr
    assert "its queue: triage@3" in sluice("rollout", "propose", "triage", "3", "--queue").stdout
    assert "queued     triage@3" in sluice("rollout", "status", "triage").stdout
    assert sluice("rollout", "withdraw", "triage", "3", "--reason", "no").returncode == 0
    assert "withdrawn triage@3" in sluice("rollout", "history", "triage").stdout


def test_rollback_waits_for_the_gateways_and_names_those_that_did_not_follow(
    sluice: Sluice, api: LiveApi
) -> None:
    sluice("rollout", "propose", "triage", "2")

    async def behind(stores: Stores) -> None:
        presence = GatewayPresence("g1", "host-a", 4711, revision=1, started_at=AT)
        await stores.presence.report(presence, ttl_seconds=60)

    api.with_stores(behind)
    late = sluice("rollout", "rollback", "triage", "--wait", "0.3")
    assert late.returncode == 1
    assert "host-a (process 4711)" in late.stderr
    sluice("rollout", "propose", "triage", "2")
    stop = threading.Event()
    follower = threading.Thread(target=lambda: api.with_stores(lambda s: _follow(s, stop)))
    follower.start()
    try:
        back = sluice("rollout", "rollback", "triage")
    finally:
        stop.set()
        follower.join()
    assert back.returncode == 0
    assert "1 gateway worker confirmed in" in back.stdout


async def _follow(stores: Stores, stop: threading.Event) -> None:
    """A gateway that serves whatever is announced."""
    while not stop.is_set():
        revision = await stores.catalog.revision()
        presence = GatewayPresence("g1", "host-a", 4711, revision=revision, started_at=AT)
        await stores.presence.report(presence)
        await asyncio.sleep(0.02)


def test_the_command_line_loads_nothing_that_only_servers_need() -> None:
    """Each of these takes as long as a whole command."""
    heavy = ["redis", "numpy", "jsonschema", "fsspec", "fastapi", "torch"]
    loaded = f"import rollout.cli, sys; print(*(set({heavy}) & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.strip() == ""


def test_rollback_waits_for_no_controller_that_hangs(sluice: Sluice, api: LiveApi) -> None:
    sluice("rollout", "propose", "triage", "2")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        back = sluice(
            "rollout", "rollback", "triage", "--wait", "0",
            SLUICE_URL="", SLUICE_CONTROLLER__PORT=str(silent.getsockname()[1]),
            SLUICE_STORE__URL=api.store_url,
        )  # fmt: skip
    assert back.returncode == 0, back.stderr
    assert "triage@1 takes all" in back.stdout
    assert "by the store itself" in back.stderr


def test_status_says_what_happened_last_and_what_the_plan_asks_for(sluice: Sluice) -> None:
    sluice("rollout", "propose", "triage", "2", "--reason", "a shorter prompt")
    shown = sluice("rollout", "status", "triage").stdout
    assert re.search(r"last +proposed triage@2 by \S+, .* UTC: a shorter prompt", shown)
    assert "0 compared pairs" in shown
    sluice("rollout", "rollback", "triage", "--reason", "enough", "--wait", "0")
    shown = sluice("rollout", "status", "triage").stdout
    assert re.search(r"last +rolled back by .* UTC: enough", shown)


def test_rollback_works_while_the_controller_is_down(sluice: Sluice, api: LiveApi) -> None:
    sluice("rollout", "propose", "triage", "2")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = str(closed.getsockname()[1])
        back = sluice(
            "rollout", "rollback", "triage", "--reason", "all is on fire",
            SLUICE_URL="", SLUICE_CONTROLLER__PORT=port, SLUICE_STORE__URL=api.store_url,
        )  # fmt: skip
        elsewhere = sluice("rollout", "rollback", "triage", SLUICE_URL=f"http://127.0.0.1:{port}")
    assert back.returncode == 0, back.stderr
    assert "triage@1 takes all" in back.stdout
    assert "by the store itself" in back.stderr
    assert elsewhere.returncode == 1
    (entry, *_) = api.with_stores(lambda stores: stores.rollouts.history("triage"))
    assert (entry.event.kind, entry.event.reason) == ("rolled_back", "all is on fire")


def test_canary_waits_for_an_engine_when_asked_to(sluice: Sluice, api: LiveApi) -> None:
    sluice("rollout", "propose", "triage", ADAPTED)
    refused = sluice("rollout", "canary", "triage", "10")
    assert refused.returncode == 1
    assert "is not resident yet" in refused.stderr
    loading = threading.Timer(0.5, lambda: api.with_stores(make_resident))
    loading.start()
    assert sluice("rollout", "canary", "triage", "10", "--wait", "30").returncode == 0
    loading.join()


def test_a_stale_revision_is_refused(sluice: Sluice) -> None:
    stale = sluice("rollout", "propose", "triage", "2", "--revision", "77")
    assert stale.returncode == 1
    assert "is at revision 1, not 77" in stale.stderr


def test_routes_are_set_and_shown(sluice: Sluice) -> None:
    made = sluice("route", "set", "new", "--engine", "main", "--set", "policy.alpha=0.01")
    assert made.returncode == 0, made.stderr
    assert sluice("route", "set", "new", "--capture", "0.5").returncode == 0
    shown = json.loads(sluice("route", "show", "new", "--json").stdout)
    assert shown["route"]["policy"]["alpha"] == 0.01
    assert shown["route"]["capture"] == 0.5
    assert "new@1" in sluice("route", "list").stdout
    assert "policy.alpha" in sluice("route", "show", "new").stdout
    assert sluice("route", "set", "other").returncode == 1
    assert sluice("route", "set", "new", "--set", "policy.alpha=2").returncode == 1


def test_versions_are_registered_listed_and_shown(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Say one word.")
    made = sluice("version", "register", "triage", "--prompt", "prompt.txt", "--note", "brief")
    assert made.returncode == 0, made.stderr
    assert "registered triage@4" in made.stdout
    assert "Say one word." in sluice("version", "show", "triage@4").stdout
    listed = json.loads(sluice("version", "list", "triage", "--json").stdout)
    assert [row["name"] for row in listed][-1] == "triage@4"
    assert "triage@4" in sluice("version", "list").stdout
    missing = sluice("version", "register", "triage", "--adapter", "nowhere")
    assert missing.returncode == 1
    assert "adapter_config.json" in missing.stderr


def test_cases_are_claimed_labelled_exported_and_imported(
    sluice: Sluice, api: LiveApi, tmp_path: Path
) -> None:
    api.with_stores(lambda stores: offer(stores, case("c1", priority=2.0), case("c2")))
    assert "c1" in sluice("cases", "list", "triage").stdout
    shown = sluice("cases", "claim", "triage").stdout
    assert "first:" in shown
    assert "version" not in shown
    (claimed,) = json.loads(sluice("cases", "claim", "--json").stdout)
    assert sluice("cases", "release", claimed["id"]).returncode == 0
    assert sluice("cases", "label", "c1", "neither", "--correction", "maybe").returncode == 0
    assert sluice("cases", "label", "c1", "first").returncode == 1
    (said,) = json.loads(sluice("cases", "labels", "c1", "--json").stdout)
    assert (said["choice"], said["correction"]) == ("neither", "maybe")
    done = sluice("cases", "export", "-o", "labels.jsonl")
    assert "1 labelled cases" in done.stdout
    lines = sluice("cases", "export", "triage").stdout
    assert lines == (tmp_path / "labels.jsonl").read_text()
    (tmp_path / "more.jsonl").write_text(lines.replace('"c1"', '"c9"'))
    assert "1 labelled cases were added" in sluice("cases", "import", "more.jsonl").stdout
    (tmp_path / "broken.jsonl").write_text(lines + "oops\n")
    broken = sluice("cases", "import", "broken.jsonl")
    assert broken.returncode == 1
    assert "line 2" in broken.stderr
    stats = json.loads(sluice("cases", "stats", "--json").stdout)
    assert (stats[0]["labelled"], stats[0]["open"]) == (2, 1)
    assert "triage" in sluice("cases", "stats").stdout


def test_a_client_is_erased_and_what_was_erased_is_said(sluice: Sluice, api: LiveApi) -> None:
    hers = replace(case("c1"), unit=unit_of("key-a", "ann"))
    api.with_stores(lambda stores: offer(stores, hers, case("c2")))
    done = sluice("cases", "erase", "--user", "key-a/ann", "key-a/ben", "--reason", "asked")
    assert done.returncode == 0
    first, second = done.stdout.splitlines()
    assert first.startswith("erased 1 cases with 0 labels, 0 captures")
    assert second.startswith("erased 0 cases")
    assert "KEY_ID/STICKY" in sluice("cases", "erase", "--user", "ann").stderr
    assert sluice("cases", "erase").returncode == 2


async def _refuse_the_next_run(stores: Stores) -> None:
    async with asyncio.timeout(30):
        while (run := await stores.runs.take("test", 30)) is None:
            await asyncio.sleep(0.02)
    await stores.runs.note(run.id, RunEvent("training", "step 1", AT, done=1, total=2))
    await stores.runs.update(replace(run, state="refused", reason="it did not beat its parent"))


def test_train_follows_its_run_and_fails_with_its_reason(sluice: Sluice, api: LiveApi) -> None:
    trainer = threading.Thread(target=lambda: api.with_stores(_refuse_the_next_run))
    trainer.start()
    done = sluice("train", "triage", "--set", "epochs=2")
    trainer.join()
    assert done.returncode == 1
    assert "training 1/2: step 1" in done.stdout
    assert "refused: it did not beat its parent" in done.stderr
    (run,) = json.loads(sluice("runs", "list", "--json").stdout)
    assert run["config"] == {"epochs": 2}
    assert "refused" in sluice("runs", "show", run["id"]).stdout
    assert sluice("runs", "cancel", run["id"]).returncode == 1
    queued = sluice("train", "triage", "--detach").stdout.strip()
    assert "is cancelled" in sluice("runs", "cancel", queued).stdout
    assert sluice("runs", "follow", queued).returncode == 1
    assert sluice("dataset", "list").returncode == 0
    assert sluice("dataset", "show", "0" * 64).returncode == 1


def test_keys_are_created_listed_and_revoked(sluice: Sluice) -> None:
    made = sluice("keys", "create", "ann", "--scope", "label", "--route", "triage")
    secret = made.stdout.strip()
    assert secret.startswith("sk-sluice-")
    assert "not shown again" in made.stderr
    refused = sluice("keys", "list", SLUICE_KEY=secret)
    assert refused.returncode == 1
    assert "lacks the scope admin" in refused.stderr
    (listed,) = json.loads(sluice("keys", "list", "--json").stdout)
    assert listed["routes"] == ["triage"]
    assert sluice("keys", "revoke", listed["id"]).returncode == 0
    assert sluice("keys", "revoke", listed["id"]).returncode == 1


def test_the_limits_of_a_key_are_shown(sluice: Sluice) -> None:
    made = sluice("keys", "create", "shop", "--requests-per-minute", "60", "--concurrency", "4")
    assert made.returncode == 0
    assert "60 requests a minute, 4 at once" in sluice("keys", "list").stdout
    (listed,) = json.loads(sluice("keys", "list", "--json").stdout)
    changed = sluice("keys", "limit", listed["id"], "--concurrency", "none")
    assert "60 requests a minute" in changed.stdout
    assert "at once" not in changed.stdout
    assert sluice("keys", "limit", listed["id"]).returncode == 2
    refused = sluice("keys", "create", "shop", "--monthly-tokens", "0")
    assert refused.returncode == 1
    assert "whole number from 1" in refused.stderr


def test_wrong_usage_is_two(sluice: Sluice) -> None:
    assert sluice().returncode == 2
    assert sluice("rollout").returncode == 2
    assert sluice("rollout", "canary", "triage", "many").returncode == 2
    assert sluice("explode").returncode == 2
    assert sluice("--help").returncode == 0


@pytest.mark.parametrize("arguments", [("route", "list"), ("train", "triage")])
def test_an_unreachable_control_api_says_what_to_do(
    sluice: Sluice, arguments: tuple[str, ...]
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        gone = sluice(*arguments, SLUICE_URL=url)
    assert gone.returncode == 1
    assert "sluice up" in gone.stderr
    assert "Traceback" not in gone.stderr


def test_the_key_comes_from_the_data_directory(
    sluice: Sluice, api: LiveApi, tmp_path: Path
) -> None:
    missing = sluice("route", "list", SLUICE_KEY="")
    assert missing.returncode == 1
    assert "bootstrap.key" in missing.stderr
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bootstrap.key").write_text(f"{api.key}\n")
    assert sluice("route", "list", SLUICE_KEY="").returncode == 0
    assert sluice("route", "list", "--key", "wrong").returncode == 1


def test_doctor_names_what_is_wrong_and_what_to_do(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[gatway]\n")
    broken = sluice("doctor", "--config", "bad.toml")
    assert broken.returncode == 1
    assert "gatway" in broken.stdout
    (tmp_path / "far.toml").write_text(
        '[store]\nurl = "redis://127.0.0.1:1/0"\n'
        '[[engines]]\nname = "e"\nurls = ["http://127.0.0.1:1"]\nbase = "b"\n'
    )
    far = json.loads(sluice("doctor", "--config", "far.toml", "--json").stdout)
    states = {row["what"]: row["state"] for row in far}
    assert states["store"] == "bad"
    assert states["engine e"] == "bad"
    assert all(row["advice"] for row in far if row["state"] == "bad")


def test_roles_are_started_by_module_name(sluice: Sluice) -> None:
    assert "--config" in sluice("controller", "--help").stdout


def test_a_route_says_when_it_is_trained_and_whether_it_should_be(sluice: Sluice) -> None:
    assert (
        "has no rules that start a run"
        in sluice("route", "set", "triage", "--retrain", "off").stderr
    )
    assert sluice("route", "set", "triage", "--set", "retrain.new_labels=30").returncode == 0
    assert "retraining waiting: 0 cases are decided" in sluice("rollout", "status").stdout
    assert sluice("route", "set", "triage", "--retrain", "off").returncode == 0
    assert "retraining off: nothing is trained" in sluice("rollout", "status").stdout
    said = sluice("advise", "triage")
    assert said.stdout.startswith("Not yet: label more")
    assert "? Do the people who label agree?" in said.stdout
    assert json.loads(sluice("advise", "triage", "--json").stdout)["verdict"] == "not yet"


def test_a_run_is_paused_and_resumed_from_the_command_line(sluice: Sluice) -> None:
    run = sluice("train", "triage", "--detach", "--no-propose").stdout.strip()
    assert f"{run} is paused" in sluice("runs", "pause", run).stdout
    assert "goes on as soon as a trainer is free" in sluice("runs", "resume", run).stdout
    assert f"{run} is cancelled" in sluice("runs", "cancel", run).stdout
    assert "has ended already" in sluice("runs", "pause", run).stderr
