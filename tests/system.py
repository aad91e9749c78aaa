"""A whole Sluice, started by `sluice up` as an operator would, for tests of everything together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0
STOP_SECONDS = 60.0
KEY = "sk-sluice-test"


class RunningSluice:
    """`sluice up` on ports of its own; a context manager.

    `engines` are the tables of `[[engines]]`, `routes` those of `[[routes]]`; `models` says where
    the trainer finds the base that an engine serves under a name.
    """

    def __init__(
        self,
        folder: Path,
        *,
        engines: list[Mapping[str, Any]],
        routes: list[Mapping[str, Any]],
        models: Mapping[str, Path] | None = None,
        workers: int = 1,
    ) -> None:
        self.key = KEY
        self.folder = folder
        self.data = folder / "data"
        self.config = folder / "sluice.toml"
        self.log = folder / "up.log"
        gateway, controller = free_port(), free_port()
        self.gateway_url = f"http://127.0.0.1:{gateway}"
        self.control_url = f"http://127.0.0.1:{controller}"
        self._process: subprocess.Popen[bytes] | None = None
        lines = [f"data_dir = {json.dumps(str(self.data))}"]
        lines += ["[gateway]", f"port = {gateway}", f"workers = {workers}"]
        lines += ["[controller]", f"port = {controller}", "tick_seconds = 0.2"]
        lines += ["[trainer.models]"]
        lines += [f"{name} = {json.dumps(str(path))}" for name, path in (models or {}).items()]
        for name, tables in (("engines", engines), ("routes", routes)):
            for table in tables:
                lines += [f"[[{name}]]"]
                lines += [f"{key} = {_toml(value)}" for key, value in table.items()]
        self.config.write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        """Start it and return once it says that it is up. Raises RuntimeError with its output."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollout.up", "--config", str(self.config)],
                cwd=ROOT,
                env=self.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        before = self.log.read_text().count("Sluice is up")
        deadline = time.monotonic() + START_SECONDS
        while self.log.read_text().count("Sluice is up") <= before:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"sluice up did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)

    def stop(self) -> int | None:
        """Press Ctrl-C and wait; returns the exit status. A second call does nothing."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(STOP_SECONDS)
        finally:
            process.kill()

    @property
    def pid(self) -> int:
        """Of `sluice up` itself, which starts again whatever ends."""
        assert self._process is not None, "not started"
        return self._process.pid

    def environment(self) -> dict[str, str]:
        """For commands that speak to it."""
        ours = {name: value for name, value in os.environ.items() if name[:7] != "SLUICE_"}
        return ours | {"SLUICE_BOOTSTRAP_KEY": self.key, "SLUICE_KEY": self.key}

    def sluice(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a `sluice` command against it."""
        return subprocess.run(
            [sys.executable, "-m", "rollout.cli", *arguments, "--config", str(self.config)],
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=600,
            check=check,
        )

    def get(self, path: str) -> Any:
        """The JSON that the control API answers."""
        request = urllib.request.Request(
            f"{self.control_url}/api/v1{path}", headers={"authorization": f"Bearer {self.key}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def processes(self) -> Mapping[str, int]:
        """Process ids by service."""
        return {
            name: pid
            for name, (pid, _) in json.loads(
                (self.data / "run" / "processes.json").read_text()
            ).items()
        }

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def eventually(condition: Callable[[], bool], seconds: float = 60.0, what: str = "it") -> None:
    """Wait for a condition, with a limit."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(0.05)


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value)
