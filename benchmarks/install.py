"""Peers are installed on first use, each into a folder of its own under `.cache/bench`."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Survives runs; ignored by git.
CACHE = Path(".cache/bench")
INSTALL_SECONDS = 900


class SkipTarget(Exception):
    """This target cannot be had here; the message says why."""


def install_from_pypi(name: str, requirement: str, command: str) -> Path:
    """Install `requirement` into a virtual environment; return its `command`.

    Peers pin what Sluice pins otherwise, so each has an environment of its own.
    """
    folder = CACHE.absolute() / name
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-qq", requirement]
    steps = ([sys.executable, "-m", "venv", "--clear", str(folder)], pip)
    return _install(folder, requirement, steps, folder / "bin" / command)


def install_from_npm(name: str, requirement: str, script: str) -> Path:
    """Install `requirement` below a folder; return its `script`, which node runs."""
    npm = shutil.which("npm")
    if npm is None:
        raise SkipTarget("npm is not installed (`apt-get install npm`)")
    folder = CACHE.absolute() / name
    folder.mkdir(parents=True, exist_ok=True)
    step = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund"]
    step += ["--prefix", str(folder), requirement]
    return _install(folder, requirement, [step], folder / "node_modules" / script)


def _install(folder: Path, requirement: str, steps: Sequence[list[str]], wanted: Path) -> Path:
    # The mark is written last: without it, an install that was cut short is done again.
    mark = folder / ".installed"
    if mark.exists() and mark.read_text() == requirement and wanted.exists():
        return wanted
    print(f"bench: installing {requirement} into {CACHE}/{folder.name}", flush=True)
    try:
        for step in steps:
            subprocess.run(step, check=True, capture_output=True, timeout=INSTALL_SECONDS)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise SkipTarget(f"{requirement} could not be installed: {' '.join(said)}") from error
    except subprocess.TimeoutExpired as error:
        raise SkipTarget(f"{requirement} took over {INSTALL_SECONDS} s to install") from error
    if not wanted.exists():
        raise SkipTarget(f"{requirement} brought no {wanted.name}")
    mark.write_text(requirement)
    return wanted
