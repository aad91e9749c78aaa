"""`sluice eval`, `suite` and `report` against a real control API, a real trainer and a stand-in gateway."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.house import ADAPTED, furnish, make_resident, settings
from tests.api.live import LiveApi, live_api
from tests.api.test_evaluations import content
from tests.cli.conftest import Sluice
from tests.trainer.answering import answering
from tests.trainer.colours import right


@pytest.fixture
def gateway() -> Iterator[str]:
    """Where the adapted version is always right, and every other one says "warm"."""
    urls: list[str] = []
    there, done = threading.Event(), threading.Event()

    async def serve() -> None:
        def reply(body: dict[str, object]) -> str:
            return right(body) if body["model"] == ADAPTED else "warm"

        async with answering(reply) as engine:
            urls.append(engine.url)
            there.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert there.wait(20)
    yield urls[0]
    done.set()
    thread.join(20)


@pytest.fixture
def api(redis_url: str, tmp_path: Path, gateway: str) -> Iterator[LiveApi]:
    """An API and a trainer that share an artifact store."""
    here = settings().model_copy(update={"data_dir": tmp_path / "data"})
    config = tmp_path / "sluice.toml"
    config.write_text(
        f'data_dir = "{here.data_dir}"\n[store]\nurl = "{redis_url}"\n'
        f'[trainer]\npoll_seconds = 0.05\nkey = "k"\ngateway_url = "{gateway}"\n'
        '[[engines]]\nname = "main"\nurls = ["http://127.0.0.1:9"]\nbase = "tiny"\n'
    )
    with live_api(redis_url, here) as live:
        live.with_stores(furnish)
        live.with_stores(make_resident)
        command = [sys.executable, "-m", "trainer.worker", "--config", str(config)]
        with subprocess.Popen(command, cwd=Path.cwd()) as trainer:
            try:
                yield live
            finally:
                trainer.terminate()
                trainer.wait(30)


def test_a_suite_is_added_a_version_evaluated_and_its_report_shown(
    sluice: Sluice, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(content(30).partition(b"\n")[2])
    code = tmp_path / "grader.py"
    code.write_text("def grade(sample, item):\n    return sample['output_text'] == item['gold']\n")
    scorers = ("--scorer", f"python:{code},seconds=3", "--scorer", "similarity:threshold=0.8")
    added = sluice("suite", "add", "triage", str(rows), *scorers, "--note", "first", "--json")
    assert added.returncode == 0, added.stderr
    suite = json.loads(added.stdout)
    assert [each["kind"] for each in suite["scorers"]] == ["python", "similarity"]
    assert (suite["scorers"][0]["seconds"], suite["scorers"][1]["threshold"]) == (3, 0.8)

    done = sluice("eval", ADAPTED, "--gate", "--ways", "none")
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert "evaluating" in first
    assert "30 rows show a gain of" in done.stdout
    assert last.startswith(f"pass: {ADAPTED} is better than triage@1")
    worse = sluice("eval", "triage@1", "--against", ADAPTED, "--gate", "--ways", "none")
    assert worse.returncode == 1
    assert "fail: triage@1 is worse" in worse.stdout

    (second, report) = json.loads(sluice("report", "list", "triage", "--json").stdout)
    assert (second["version"], report["version"]) == ("triage@1", ADAPTED)
    shown = sluice("report", "show", ADAPTED).stdout
    assert report["id"][:12] in shown
    assert "SLICE" in shown
    differing = sluice("report", "show", report["id"][:12], "--rows").stdout
    assert "0 lost, 20 gained, 10 same" in differing
    looked = sluice("suite", "show", suite["digest"][:12]).stdout
    assert "2 versions judged, 12 allowed" in looked
    assert "similarity, right from 0.8" in looked
    written = sluice("suite", "show", suite["name"], "--rows").stdout
    assert len(written.splitlines()) == 31
    assert suite["digest"][:20] in sluice("suite", "list").stdout


def test_a_file_that_is_evaluated_on_is_registered_first(sluice: Sluice, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(content(12).partition(b"\n")[2])
    done = sluice("eval", ADAPTED, "--suite", str(rows), "--json", "--ways", "none")
    assert done.returncode == 0, done.stderr
    (suite,) = json.loads(sluice("suite", "list", "--json").stdout)
    assert json.loads(done.stdout)["suite_digest"] == suite["digest"]


# In one test, for each has a trainer to start.
REFUSED = {
    ("eval", ADAPTED): "sluice suite add triage",
    ("eval", ADAPTED, "--suite", "ffffff"): "there is no suite",
    ("eval", ADAPTED, "--scorer", "exact"): "a suite has its scorers",
    ("suite", "add", "triage", "nowhere.jsonl"): "cannot read nowhere.jsonl",
    ("report", "show", ADAPTED): "was never evaluated",
    ("report", "show", "ffffff"): "there is no report",
}


def test_what_cannot_be_says_what_to_do(sluice: Sluice) -> None:
    for arguments, why in REFUSED.items():
        done = sluice(*arguments)
        assert done.returncode == 1
        assert why in done.stderr
