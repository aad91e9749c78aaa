"""What is installed is what was written down: pins without addresses, and every file in the wheel."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)", (ROOT / "constraints" / "sluice.txt").read_text(), re.MULTILINE
    )
}


def required() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    lists = [PROJECT["project"]["dependencies"], *extras]
    return [Requirement(text) for texts in lists for text in texts]


@pytest.mark.parametrize("requirement", required(), ids=str)
def test_every_dependency_is_pinned_to_a_version_that_it_accepts(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("path", sorted((ROOT / "constraints").iterdir()), ids=lambda p: p.name)
def test_pins_name_no_address(path: Path) -> None:
    text = path.read_text()

    assert "://" not in text
    assert "-index" not in text


def test_the_wheel_holds_every_file_that_is_no_module() -> None:
    """Scripts, pages and styles that only a checkout has would be missed after `pip install`."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "gateway", "rollout", "trainer"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = {line for line in listed.stdout.splitlines() if not line.endswith(".py")}
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    packed = {
        str(path.relative_to(ROOT))
        for package, globs in patterns.items()
        for pattern in globs
        for path in (ROOT / package).glob(pattern)
    }

    assert files <= packed
