"""`sluice dataset` against a real control API and a real trainer."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.house import furnish, settings
from tests.api.live import LiveApi, live_api
from tests.cli.conftest import Sluice
from tests.trainer.samples import labelled, sentences


@pytest.fixture
def api(redis_url: str, tmp_path: Path) -> Iterator[LiveApi]:
    """An API and a trainer that share an artifact store."""
    here = settings().model_copy(update={"data_dir": tmp_path / "data"})
    config = tmp_path / "sluice.toml"
    config.write_text(
        f'data_dir = "{here.data_dir}"\n[store]\nurl = "{redis_url}"\n'
        "[trainer]\npoll_seconds = 0.05\n"
    )
    with live_api(redis_url, here) as live:
        live.with_stores(furnish)
        command = [sys.executable, "-m", "trainer.worker", "--config", str(config)]
        with subprocess.Popen(command, cwd=Path.cwd()) as trainer:
            try:
                yield live
            finally:
                trainer.terminate()
                trainer.wait(30)


def test_datasets_are_built_shown_compared_exported_and_imported(
    sluice: Sluice, api: LiveApi, tmp_path: Path
) -> None:
    rows = sentences(12)
    repeat = labelled(90, rows[0].case.messages[0]["content"], "warm")
    api.with_stores(lambda stores: stores.cases.put_labelled([*rows[:10], repeat]))
    done = sluice("dataset", "build", "triage")
    assert done.returncode == 0, done.stderr
    assert "left out: repeats another" in done.stdout
    contrary = labelled(91, rows[1].case.messages[0]["content"], "warm")
    api.with_stores(lambda stores: stores.cases.put_labelled([*rows[10:], contrary]))
    after = json.loads(sluice("dataset", "build", "triage", "--json").stdout)
    (_, before) = json.loads(sluice("dataset", "list", "triage", "--json").stdout)

    assert after["asked_again"] == 1
    shown = sluice("dataset", "show", after["digest"][:10]).stdout
    assert "1, of which 1 went back to the queue" in shown
    dropped = sluice("dataset", "show", after["digest"], "--dropped", "repeats").stdout
    assert "c00090" in dropped
    assert "c00091" not in dropped
    assert "cold" in sluice("dataset", "show", after["digest"], "--contradictions").stdout
    changes = sluice("dataset", "diff", before["digest"], after["digest"]).stdout
    assert "2 added, 1 removed" in changes
    assert "labels contradict each other" in changes

    out = tmp_path / "chats.jsonl"
    export = ("dataset", "export", after["digest"], "--format", "openai-chat", "-o", str(out))
    assert sluice(*export).returncode == 0
    assert len(out.read_text().splitlines()) == after["rows"] == 11
    brought = json.loads(sluice("dataset", "import", "triage", str(out), "--json").stdout)
    assert brought["rows"] == 11
    assert "chats.jsonl" in brought["source"]
    out.write_text(out.read_text() + '{"messages": []}\n')
    refused = sluice("dataset", "import", "triage", str(out))
    assert refused.returncode == 1
    assert refused.stderr.startswith("sluice: line 12: messages: there is no message in it")
    wrong = sluice("dataset", "build", "triage", "--set", "heldout=3")
    assert wrong.returncode == 1
    assert "config.heldout" in wrong.stderr or "less than or equal to 0.9" in wrong.stderr
