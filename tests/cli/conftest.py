"""`sluice` as a process of its own, against a real control API."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.api.house import furnish
from tests.api.live import LiveApi, live_api

Sluice = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def api(redis_url: str) -> Iterator[LiveApi]:
    with live_api(redis_url) as live:
        live.with_stores(furnish)
        yield live


@pytest.fixture
def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}


@pytest.fixture
def sluice(api: LiveApi, clean_environment: dict[str, str], tmp_path: Path) -> Sluice:
    def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        known = {"SLUICE_URL": api.url, "SLUICE_KEY": api.key}
        return subprocess.run(
            [sys.executable, "-m", "rollout.cli", *arguments],
            env={**clean_environment, **known, "PYTHONPATH": str(Path.cwd()), **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run
