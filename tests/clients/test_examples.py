"""The examples for other clients work, wherever their client is installed beside them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.loop.conftest import ROUTE
from tests.system import ROOT, RunningSluice

pytestmark = pytest.mark.vllm
EXAMPLES = ROOT / "examples" / "clients"


def interpreter(example: Path) -> str | None:
    """What runs it, or None where its client is not installed."""
    if example.suffix == ".mjs":
        return shutil.which("node") if (EXAMPLES / "node_modules" / "openai").exists() else None
    python = EXAMPLES / ".venv" / "bin" / "python"
    return str(python) if python.exists() else None


@pytest.mark.parametrize(
    "example", sorted(EXAMPLES.glob("with_*")), ids=lambda path: path.stem.removeprefix("with_")
)
def test_the_client_works_unchanged(example: Path, running_sluice: RunningSluice) -> None:
    program = interpreter(example)
    if program is None:
        # In CI too: no dependency of ours brings it along.
        pytest.skip(f"its client is not installed: see {EXAMPLES / 'README.md'}")
    ran = subprocess.run(
        [program, str(example)],
        env=os.environ | {"GATEWAY": running_sluice.gateway_url, "KEY": running_sluice.key}
        | {"ROUTE": ROUTE},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
