"""`sluice route`: the public names."""

import tomllib
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rollout.client import ControlClient
from rollout.commands import files
from rollout.commands.plans import read_plan
from rollout.commands.session import Session, Subparsers, command, noun, table
from rollout.control.views import RouteView
from rollout.errors import InvalidInputError

_SECTIONS = ("policy", "slo", "json_rules", "semantic", "judge", "evaluation", "retrain")
_OTHERS = ", ".join(_SECTIONS[1:])
_OPTIONAL = ("semantic", "judge", "retrain")


def add(parsers: Subparsers) -> None:
    below = noun(parsers, "route", "list, show and configure routes")
    command(below, "list", _list, "list the routes with what they serve", reads=True)
    show = command(below, "show", _show, "show a route's configuration", reads=True)
    show.add_argument("route")
    change = command(below, "set", _set, "create a route, or change some of its configuration")
    change.add_argument("route")
    change.add_argument("--engine", help="needed for a new route")
    change.add_argument("--comparator", choices=("text", "json", "tools", "judge"))
    change.add_argument("--capture", type=float, help="chance that an exchange is kept, 0 to 1")
    change.add_argument(
        "--capture-idle", type=float, help="the same while no version is on trial, for replays"
    )
    change.add_argument(
        "--schema", metavar="FILE", type=Path, help="a JSON schema that answers should satisfy"
    )
    change.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"a key of {_OTHERS} or policy, as in policy.alpha=0.01 or "
        'judge.engine="main"; judge=none takes the judge away',
    )
    change.add_argument(
        "--retrain",
        choices=("on", "off"),
        help="whether runs begin without a person, by the rules under retrain.",
    )
    change.add_argument(
        "--plan", metavar="FILE", type=Path, help="the steps of its rollouts, as TOML"
    )
    change.add_argument("--reason", default="", help="why, for the audit")


def _list(session: Session) -> int:
    rows = session.client.routes()
    session.show(list[RouteView], rows, lambda: _table(rows))
    return 0


def _table(rows: list[RouteView]) -> Table:
    made = table("ROUTE", "ENGINE", "STABLE", "CANDIDATE", "STAGE", "WEIGHT")
    for row in rows:
        trial = row.rollout.trial
        name = row.route.name
        made.add_row(
            Text(name),
            Text(row.route.engine),
            Text(f"{name}@{row.rollout.stable}"),
            Text(f"{name}@{trial.candidate}" if trial else "–"),
            trial.stage if trial else "–",
            f"{trial.weight:g} %" if trial else "–",
        )
    return made


def _show(session: Session) -> int:
    row = session.client.route(session.options.route)
    session.show(RouteView, row, lambda: _details(row))
    return 0


def _details(row: RouteView) -> Table:
    made = table("KEY", "VALUE", title=row.route.name)
    for key, value in _configuration(row).items():
        if isinstance(value, dict):
            for inner, number in value.items():
                made.add_row(f"{key}.{inner}", Text(str(number)))
        else:
            made.add_row(key, Text(str(value)))
    return made


def _set(session: Session) -> int:
    options = session.options
    body = _present(session.client, options.route)
    given = {
        "engine": options.engine,
        "comparator": options.comparator,
        "capture": options.capture,
        "capture_idle": options.capture_idle,
        "schema": files.read_text(options.schema) if options.schema else None,
    }
    body |= {key: value for key, value in given.items() if value is not None}
    for pair in options.set:
        _put(body, pair)
    if options.retrain is not None:
        if body.get("retrain") is None:
            raise InvalidInputError(
                f"{options.route} has no rules that start a run: set one beside it, as in "
                "--set retrain.new_labels=200"
            )
        body["retrain"] = {**body["retrain"], "enabled": options.retrain == "on"}
    plan = None if options.plan is None else read_plan(options.plan)
    if plan is not None:
        body["policy"] = body.get("policy", {}) | plan.plan
    if "engine" not in body:
        raise InvalidInputError(f"{options.route} is a new route: say its --engine")
    with nullcontext() if plan is None else plan.blamed("policy"):
        view = session.client.put_route(options.route, {**body, "reason": options.reason})
    session.say(f"{view.route.name} is set; {view.route.name}@{view.rollout.stable} is stable")
    return 0


def _present(client: ControlClient, name: str) -> dict[str, Any]:
    found = next((row for row in client.routes() if row.route.name == name), None)
    return {} if found is None else _configuration(found)


def _configuration(row: RouteView) -> dict[str, Any]:
    """The body of PUT that would leave the route as it is."""
    body = asdict(row.route)
    del body["name"]
    return body


def _put(body: dict[str, Any], pair: str) -> None:
    key, equals, text = pair.partition("=")
    section, _, name = key.partition(".")
    if equals and key in _OPTIONAL and text == "none":
        body[key] = None
        return
    if not equals or section not in _SECTIONS or not name:
        raise InvalidInputError(f"--set {pair}: write policy.NAME=VALUE, or {_OTHERS} likewise")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as exc:
        raise InvalidInputError(
            f'--set {pair}: {text!r} is no number, true, false, list or "text" in quotes'
        ) from exc
    body[section] = {**(body.get(section) or {}), name: value}
