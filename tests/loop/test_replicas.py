"""Two real replicas with real adapters: what dies in the middle of a rollout costs no request."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import openai
import pytest
from safetensors.numpy import load_file, save_file

from rollout.adapters import CONFIG_FILE, WEIGHTS_FILE
from rollout.artifacts import describe
from rollout.client import ControlClient
from rollout.errors import EngineUnavailableError, SluiceError
from tests.engines import VllmServer
from tests.loop.conftest import ROUTE, Load
from tests.system import RunningSluice, eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
WAIT = 120.0
WORKERS = 4


@pytest.fixture(scope="module")
def replicas(
    vllm_installed: None, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sequence[VllmServer]]:
    """Of an engine of their own: whoever looks after one unloads what somebody else has loaded."""
    logs = tmp_path_factory.mktemp("pair")
    pair = [VllmServer(tiny_model_dir, logs / f"{n}.log", base="pair") for n in range(2)]
    with ExitStack() as stack:
        for replica in pair:
            replica.launch()
            # Nobody asks them any more, so that there is nothing to wait for.
            stack.callback(replica.kill)
        for replica in pair:
            replica.wait()
        yield pair


@pytest.fixture(scope="module")
def house(
    replicas: Sequence[VllmServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningSluice]:
    """A whole Sluice with four gateway workers before the pair."""
    urls = [replica.url for replica in replicas]
    with RunningSluice(
        tmp_path_factory.mktemp("replicas"),
        # Larger than what the engine accepts, so that it is the one to refuse.
        engines=[{"name": "main", "urls": urls, "base": "pair", "max_rank": 64}],
        routes=[{"name": ROUTE, "engine": "main", "capture": 1.0}],
        workers=WORKERS,
    ) as running:
        yield running


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Puts a figure into the report of a run, also where the test passes."""

    def write(text: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{text}\n")

    return write


def test_a_rollout_survives_the_death_of_a_replica_and_of_the_store(
    house: RunningSluice,
    replicas: Sequence[VllmServer],
    client: openai.OpenAI,
    control: ControlClient,
    tiny_adapters: Mapping[str, Path],
    tell: Callable[[str], None],
) -> None:
    stable = control.rollout(ROUTE).stable
    candidate = _register(house, control, tiny_adapters["first"])
    second = replicas[1]
    with Load(client) as load:
        control.change(ROUTE, "propose", reason="try it", version=candidate)
        eventually(lambda: _resident_on(control, candidate) == 2, WAIT, "both replicas")
        eventually(lambda: _pairs(control) >= 5, WAIT, "five pairs from the shadow")
        assert set(load.answered) == {"stable"}
        control.change(ROUTE, "canary", reason="go on", percent=50.0, patience=WAIT)
        eventually(lambda: load.answered["candidate"] >= 5, WAIT, "traffic for the candidate")

        second.kill()
        eventually(lambda: not _ready(control, second), WAIT, "notice of the replica's death")
        assert set(control.version(candidate).down) == {second.url}
        _goes_on(load, "on one replica")
        second.launch()

        store = house.processes()["store"]
        os.kill(store, signal.SIGKILL)
        _goes_on(load, "without a store")
        eventually(lambda: house.processes()["store"] != store, WAIT, "another store")
        eventually(lambda: _answers(control), WAIT, "the controller on the new store")

        second.wait()
        eventually(lambda: _resident_on(control, candidate) == 2, WAIT, "its adapter again")
        eventually(lambda: second.generated() > 50, WAIT, "traffic on the replica again")

        house.sluice("rollout", "promote", ROUTE, "--reason", "now", "--force", "--wait", "60")
        assert control.rollout(ROUTE).stable == candidate
        _goes_on(load, "with the new stable")
        back = house.sluice("rollout", "rollback", ROUTE, "--reason", "enough")
        assert control.rollout(ROUTE).stable == stable
        _goes_on(load, "with the old stable")
    tell(f"{back.stdout.strip()}; {load.total()} requests, none failed: {dict(load.answered)}")
    assert _confirmed(back.stdout) == WORKERS
    kinds = [entry.event.kind for entry in control.history(ROUTE, 4)]
    assert kinds == ["rolled_back", "promoted", "canary", "proposed"]


def test_a_rollback_needs_no_controller(
    house: RunningSluice,
    client: openai.OpenAI,
    control: ControlClient,
    tiny_adapters: Mapping[str, Path],
    tell: Callable[[str], None],
) -> None:
    candidate = _register(house, control, tiny_adapters["second"])
    with Load(client) as load:
        control.change(ROUTE, "propose", reason="try it", version=candidate)
        control.change(ROUTE, "canary", reason="go", percent=50.0, patience=WAIT)
        eventually(lambda: load.answered["candidate"] >= 5, WAIT, "traffic for the candidate")
        with _without_controller(house):
            back = house.sluice("rollout", "rollback", ROUTE, "--reason", "enough")
            taken = load.answered["candidate"]
            _goes_on(load, "without a controller")
        eventually(lambda: _answers(control), WAIT, "another controller")
    tell(f"{back.stdout.strip()}; {load.total()} requests, none failed")
    assert "by the store itself" in back.stderr
    assert _confirmed(back.stdout) == WORKERS
    # What was on its way when the gateways confirmed may still come in.
    assert load.answered["candidate"] - taken <= 3
    assert control.rollout(ROUTE).candidate is None


def test_what_the_engine_refuses_is_told_in_its_words(
    house: RunningSluice, control: ControlClient, tiny_adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    candidate = _register(house, control, _widened(tiny_adapters["first"], tmp_path / "wide"))
    control.change(ROUTE, "propose", reason="try it", version=candidate)
    eventually(lambda: "rank" in str(control.version(candidate).missing), WAIT, "the refusal")
    assert len(control.version(candidate).missing) == 2
    status = " ".join(house.sluice("rollout", "status", ROUTE).stdout.split())
    assert f"waits until {candidate} is resident: replica http://" in status
    assert "LoRA rank 32 is greater than max_lora_rank 16" in status
    with pytest.raises(EngineUnavailableError, match="greater than max_lora_rank"):
        control.change(ROUTE, "canary", reason="go", percent=50.0)


def _widened(adapter: Path, target: Path) -> Path:
    """The same adapter at four times its rank."""
    target.mkdir()
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (target / CONFIG_FILE).write_text(json.dumps(config | {"r": config["r"] * 4}))
    weights = load_file(adapter / WEIGHTS_FILE)
    wide = {
        name: np.concatenate([each] * 4, int("lora_B" in name)) for name, each in weights.items()
    }
    save_file(wide, target / WEIGHTS_FILE)
    return target


def _register(house: RunningSluice, control: ControlClient, adapter: Path) -> str:
    """From a URL, with the digest of its weights; returns the version's name."""
    digest = describe(adapter).files[WEIGHTS_FILE]
    house.sluice("version", "register", ROUTE, "--adapter", adapter.as_uri(), "--sha256", digest)
    return max(control.versions(ROUTE), key=lambda each: each.version.number).name


@contextmanager
def _without_controller(house: RunningSluice) -> Iterator[None]:
    """Dead, and nobody starts another until the block ends."""
    os.kill(house.pid, signal.SIGSTOP)
    try:
        os.kill(house.processes()["controller"], signal.SIGKILL)
        yield
    finally:
        os.kill(house.pid, signal.SIGCONT)


def _goes_on(load: Load, how: str) -> None:
    before = load.total()
    eventually(lambda: load.total() > before + 20, WAIT, f"traffic {how}")


def _resident_on(control: ControlClient, version: str) -> int:
    return len(control.version(version).resident_on)


def _ready(control: ControlClient, replica: VllmServer) -> bool:
    (engine,) = control.engines()
    return next(each.ready for each in engine.replicas if each.url == replica.url)


def _pairs(control: ControlClient) -> int:
    evidence = control.rollout(ROUTE).evidence
    return evidence.pairs.total if evidence else 0


def _answers(control: ControlClient) -> bool:
    try:
        control.rollout(ROUTE)
    except SluiceError:
        return False
    return True


def _confirmed(said: str) -> int:
    found = re.search(r"(\d+) gateway workers? confirmed in [\d.]+ s", said)
    return int(found[1]) if found else 0
