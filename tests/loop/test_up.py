"""`sluice up` starts everything, keeps everything, stops everything, and says what stands in its way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.client import ControlClient
from tests.engines import VllmServer
from tests.system import ROOT, RunningSluice, eventually, free_port, reachable

pytestmark = pytest.mark.vllm


def start_again(running: RunningSluice) -> None:
    assert running.stop() == 0
    running.start()


@pytest.fixture
def sluice(tmp_path: Path, vllm_engine: VllmServer) -> RunningSluice:
    return RunningSluice(
        tmp_path,
        engines=[{"name": "main", "urls": [vllm_engine.url], "base": vllm_engine.base}],
        routes=[{"name": "triage", "engine": "main"}],
    )


def test_what_was_committed_is_there_after_a_restart(sluice: RunningSluice) -> None:
    with sluice:
        with ControlClient(sluice.control_url, sluice.key) as control:
            version = control.register("triage", prompt=_prompt())
            control.change("triage", "propose", reason="try", version=version.name)
            before = control.rollout("triage")
        start_again(sluice)
        with ControlClient(sluice.control_url, sluice.key) as control:
            assert control.rollout("triage").rollout == before.rollout
            assert control.history("triage")[0].event.reason == "try"


def test_ctrl_c_stops_every_process(sluice: RunningSluice) -> None:
    with sluice:
        pids = sluice.processes()
        assert set(pids) == {"store", "controller", "gateway", "shadow", "trainer"}
        assert sluice.stop() == 0
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.values()))
    assert not reachable(f"{sluice.gateway_url}/healthz")


def test_a_second_one_on_the_same_data_is_refused(sluice: RunningSluice) -> None:
    with sluice:
        second = _up(sluice.config)
    assert second.returncode == 1
    assert "another `sluice up` already runs" in second.stderr


def test_a_port_in_use_is_named_with_its_setting(sluice: RunningSluice, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    with sluice:
        text = sluice.config.read_text()
        data = f"data_dir = {json.dumps(str(tmp_path / 'other'))}"
        other.write_text("\n".join([data, *text.splitlines()[1:]]))
        second = _up(other)
    assert second.returncode == 1
    assert "cannot listen on 127.0.0.1:" in second.stderr
    assert "[gateway] port" in second.stderr


def test_a_missing_model_and_a_missing_engine_are_explained(tmp_path: Path) -> None:
    config = tmp_path / "sluice.toml"
    ports = f"[gateway]\nport = {free_port()}\n[controller]\nport = {free_port()}\n"
    config.write_text(f'data_dir = "{tmp_path}/data"\n{ports}')
    assert "run `make model`" in _up(config).stderr
    config.write_text(f'data_dir = "{tmp_path}/data"\n{ports}[vllm]\npython = "nowhere/python"\n')
    assert "run `make engine`" in _up(config).stderr


def test_a_broken_configuration_is_explained(tmp_path: Path) -> None:
    config = tmp_path / "sluice.toml"
    config.write_text("[gateway\n")
    assert "no valid TOML" in _up(config).stderr
    config.write_text("[controller]\nprot = 8001\n")
    assert "controller.prot" in _up(config).stderr
    assert "cannot read the configuration" in _up(tmp_path / "nowhere.toml").stderr


def _up(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rollout.up", "--config", str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _prompt() -> dict[str, object]:
    return {"messages": [{"role": "system", "content": "Be brief."}], "mode": "replace_system"}
