"""What every command gets: where to print, and a client that is made when it is first used."""

import argparse
import getpass
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rollout.client import ControlClient
from rollout.errors import AuthenticationError, ConfigError
from rollout.settings import Settings, load_settings

Command: TypeAlias = Callable[["Session"], int]
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# What `sluice up` keeps in the data directory.
KEY_FILE = "bootstrap.key"
STORE_PORT_FILE = "store.port"
_UNFOLDED = 10_000


@dataclass
class Session:
    """One run of the command line."""

    options: argparse.Namespace
    out: Console = field(default_factory=lambda: _console(sys.stdout))
    errors: Console = field(default_factory=lambda: _console(sys.stderr))

    @cached_property
    def settings(self) -> Settings:
        return load_settings(self.options.config)

    @cached_property
    def client(self) -> ControlClient:
        return ControlClient(self._url(), self._key())

    def close(self) -> None:
        if "client" in self.__dict__:
            self.client.close()

    @property
    def wants_json(self) -> bool:
        return bool(getattr(self.options, "json", False))

    def say(self, text: str) -> None:
        """A line for people; plain, so that brackets in names are no markup."""
        self.out.print(Text(text))

    def warn(self, text: str) -> None:
        """A line about what went wrong, on standard error."""
        self.errors.print(Text(f"sluice: {text}"))

    def show(self, kind: Any, value: Any, table: Callable[[], Table]) -> None:
        """The value as JSON where that was asked for, else as a table."""
        if self.wants_json:
            text = TypeAdapter(kind).dump_json(value, indent=2).decode()
            self.out.print(Text(text))
        else:
            self.out.print(table())

    def reason(self) -> str:
        given: str | None = self.options.reason
        return given if given is not None else f"by {self.user()} on the command line"

    def user(self) -> str:
        try:
            return getpass.getuser()
        except (KeyError, OSError):
            # In a container the user's number often has no name.
            return f"user {os.getuid()}"

    def store_url(self) -> str | None:
        """The store that belongs to the control API, where this machine knows it."""
        if self.options.url or os.environ.get("SLUICE_URL"):
            return None
        if self.settings.store.url is not None:
            return self.settings.store.url
        try:
            port = int((self.settings.data_path / STORE_PORT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return f"redis://127.0.0.1:{port}/0"

    def _url(self) -> str:
        if url := self.options.url or os.environ.get("SLUICE_URL"):
            return str(url)
        controller = self.settings.controller
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(controller.host, controller.host)  # noqa: S104  # read, not bound
        return f"http://{host}:{controller.port}"

    def _key(self) -> str:
        if key := self.options.key or os.environ.get("SLUICE_KEY"):
            return str(key)
        if key := os.environ.get("SLUICE_BOOTSTRAP_KEY"):
            return key
        return _read_key(self.settings.data_path / KEY_FILE)


def _console(stream: TextIO) -> Console:
    # What is read by a program must not be folded to fit a screen.
    width = None if stream.isatty() else _UNFOLDED
    return Console(file=stream, highlight=False, soft_wrap=True, width=width)


def _read_key(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError as exc:
        raise AuthenticationError(
            f"no API key: give --key or SLUICE_KEY (`sluice up` keeps its own in {path})"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"cannot read the key in {path}: {exc.strerror}") from exc


def table(*columns: str, title: str | None = None) -> Table:
    made = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
    made.header_style = "bold"
    for column in made.columns:
        column.overflow = "fold"
    return made


def command(
    parsers: Subparsers, name: str, run: Command, help_text: str, *, reads: bool = False
) -> argparse.ArgumentParser:
    """Add a command that talks to the control API; one that `reads` can print JSON."""
    parser = parsers.add_parser(name, help=help_text, description=help_text)
    add_connection(parser)
    if reads:
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)
    return parser


def add_connection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("connection")
    group.add_argument("--config", type=Path, metavar="FILE", help="sluice.toml or SLUICE_CONFIG")
    group.add_argument("--url", help="the control API; else SLUICE_URL, else from the file")
    group.add_argument("--key", help="an API key; else SLUICE_KEY, else the data directory's")


def noun(parsers: Subparsers, name: str, help_text: str) -> Subparsers:
    """Add a command that only has others below it."""
    parser = parsers.add_parser(name, help=help_text, description=help_text)
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
