"""`sluice keys`: who may do what."""

import argparse
from dataclasses import fields

from rich.table import Table
from rich.text import Text

from rollout.commands.session import Session, Subparsers, command, noun, table
from rollout.control.views import KeyView, NewKey
from rollout.credentials import SCOPES, KeyLimits

_LIMITS = {
    "requests_per_minute": "{} requests a minute",
    "tokens_per_minute": "{} tokens a minute",
    "concurrency": "{} at once",
    "monthly_tokens": "{} tokens a month",
}


def add(parsers: Subparsers) -> None:
    below = noun(parsers, "keys", "create, list, limit and revoke API keys")
    create = command(below, "create", _create, "make a key; it is shown once", reads=True)
    create.add_argument("name", help="who it is for; labels and changes carry this name")
    create.add_argument(
        "--scope", action="append", choices=sorted(SCOPES), help="may be repeated; default: infer"
    )
    create.add_argument("--route", action="append", help="only this route; may be repeated")
    for each in fields(KeyLimits):
        create.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=int,
            metavar="N",
            help=f"at most {_LIMITS[each.name].format('N')}; default: no limit",
        )
    command(below, "list", _list, "list the keys", reads=True)
    limit = command(below, "limit", _limit, "change the limits of a key", reads=True)
    limit.add_argument("id")
    for each in fields(KeyLimits):
        limit.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=_number_or_none,
            metavar="N",
            default=argparse.SUPPRESS,
            help=f"at most {_LIMITS[each.name].format('N')}; `none` lifts it",
        )
    revoke = command(below, "revoke", _revoke, "revoke a key, everywhere within a second")
    revoke.add_argument("id")


def _create(session: Session) -> int:
    options = session.options
    limits = KeyLimits(**{limit.name: getattr(options, limit.name) for limit in fields(KeyLimits)})
    made = session.client.create_key(
        options.name, options.scope or ["infer"], options.route, limits
    )
    if session.wants_json:
        session.show(NewKey, made, table)
        return 0
    session.say(made.secret)
    session.errors.print(Text(f"{made.key.id} for {made.key.name}. It is not shown again."))
    return 0


def _number_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)


def _limit(session: Session) -> int:
    given = vars(session.options)
    limits = {each.name: given[each.name] for each in fields(KeyLimits) if each.name in given}
    if not limits:
        session.errors.print("say which limit, as in --requests-per-minute 60")
        return 2
    changed = session.client.limit_key(session.options.id, limits)
    session.show(KeyView, changed, lambda: _table([changed]))
    return 0


def _list(session: Session) -> int:
    rows = session.client.keys()
    session.show(list[KeyView], rows, lambda: _table(rows))
    return 0


def _table(rows: list[KeyView]) -> Table:
    made = table("ID", "NAME", "SCOPES", "ROUTES", "LIMITS", "MADE")
    for row in rows:
        made.add_row(
            row.id,
            Text(row.name),
            ", ".join(row.scopes),
            Text("all" if row.routes is None else ", ".join(row.routes)),
            _said(row.limits),
            f"{row.created_at:%Y-%m-%d %H:%M}",
        )
    return made


def _said(limits: KeyLimits) -> str:
    said = [
        text.format(value)
        for name, text in _LIMITS.items()
        if (value := getattr(limits, name)) is not None
    ]
    return ", ".join(said) or "none"


def _revoke(session: Session) -> int:
    session.client.revoke_key(session.options.id)
    session.say(f"{session.options.id} is revoked")
    return 0
