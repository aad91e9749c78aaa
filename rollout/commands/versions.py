"""`sluice version`: pinned weights and prompts."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rollout.commands import files
from rollout.commands.session import Session, Subparsers, command, noun, table
from rollout.control.views import VersionView
from rollout.errors import InvalidInputError


def add(parsers: Subparsers) -> None:
    below = noun(parsers, "version", "list, show and register versions")
    listing = command(below, "list", _list, "list the versions", reads=True)
    listing.add_argument("route", nargs="?")
    show = command(below, "show", _show, "show one version and where it answers", reads=True)
    show.add_argument("version", metavar="ROUTE@NUMBER")
    register = command(below, "register", _register, "register a version; it takes no traffic yet")
    register.add_argument("route")
    register.add_argument(
        "--adapter", metavar="DIRECTORY|URL", help="where a LoRA adapter is, as PEFT saves it"
    )
    register.add_argument(
        "--sha256", metavar="HEX", help="what adapter_model.safetensors must have, or all of it"
    )
    register.add_argument(
        "--prompt", metavar="FILE", help="JSON messages, or text for a system one"
    )
    register.add_argument(
        "--replace-system", action="store_true", help="put the prompt in place of the client's own"
    )
    register.add_argument("--sampling", metavar="JSON", help='defaults, as in {"temperature": 0}')
    register.add_argument("--note", default="")


def _list(session: Session) -> int:
    rows = session.client.versions(session.options.route)
    session.show(list[VersionView], rows, lambda: _table(rows))
    return 0


def _table(rows: list[VersionView]) -> Table:
    made = table("VERSION", "SERVED AS", "ON", "MADE", "BY", "NOTE")
    for row in rows:
        version = row.version
        made.add_row(
            Text(row.name),
            Text(row.served_name),
            _on(row),
            f"{version.created_at:%Y-%m-%d %H:%M}",
            Text(version.created_by),
            Text(version.note),
        )
    return made


def _on(row: VersionView) -> str:
    count = len(row.resident_on)
    return f"{count} of {count + len(row.missing)}" if count and row.missing else str(count)


def _show(session: Session) -> int:
    row = session.client.version(session.options.version)
    session.show(VersionView, row, lambda: _details(row))
    return 0


def _details(row: VersionView) -> Table:
    version = row.version
    made = table("KEY", "VALUE", title=row.name)
    values: dict[str, Any] = {
        "served as": row.served_name,
        "answers on": ", ".join(row.resident_on) or "no replica now",
        **{f"not on {url}": why for url, why in row.missing.items()},
        **{f"down: {url}": why for url, why in row.down.items()},
        "engine": version.engine,
        "base": version.base,
        "base revision": version.base_revision,
        "adapter": version.adapter,
        "prompt": None if version.prompt is None else json.dumps(list(version.prompt.messages)),
        "sampling": json.dumps(dict(version.sampling)) if version.sampling else None,
        "parent": None if version.parent is None else f"{version.route}@{version.parent}",
        "dataset": version.dataset,
        "run": version.run,
        "report": row.report,
        "made": f"{version.created_at:%Y-%m-%d %H:%M:%S} by {version.created_by}",
        "note": version.note,
    }
    for key, value in values.items():
        if value not in (None, ""):
            made.add_row(key, Text(str(value)))
    return made


def _register(session: Session) -> int:
    options = session.options
    remote = options.adapter if options.adapter and "://" in options.adapter else None
    local = str(Path(options.adapter).resolve()) if options.adapter and not remote else None
    row = session.client.register(
        options.route,
        adapter_path=local,
        adapter_url=remote,
        sha256=options.sha256.lower() if options.sha256 else None,
        prompt=_prompt(Path(options.prompt), replace=options.replace_system)
        if options.prompt
        else None,
        sampling=_object(options.sampling) if options.sampling else None,
        note=options.note,
    )
    session.say(f"registered {row.name}")
    session.say(f"try it in the shadow: sluice rollout propose {options.route} {row.name}")
    return 0


def _prompt(path: Path, *, replace: bool) -> dict[str, Any]:
    text = files.read_text(path)
    messages: Any = [{"role": "system", "content": text.strip()}]
    if path.suffix == ".json":
        try:
            messages = json.loads(text)
        except ValueError as exc:
            raise InvalidInputError(f"{path} is no JSON: {exc}") from exc
    if not isinstance(messages, list):
        raise InvalidInputError(f"{path} must hold a list of messages")
    return {"messages": messages, "mode": "replace_system" if replace else "prepend"}


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise InvalidInputError(f"--sampling is no JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise InvalidInputError('--sampling must be an object, as in {"temperature": 0}')
    return value
