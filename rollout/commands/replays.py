"""`sluice rollout replay` and `replays`: past captures put through a version, watched from here."""

import re
import time
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rollout.commands.session import Session, Subparsers, command, table
from rollout.errors import InvalidInputError
from rollout.replays import Replay, ReplayReport

_POLL_SECONDS: Final = 0.5
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SHOWN: Final = 20


def add(below: Subparsers) -> None:
    start = command(below, "replay", _replay, "put past captures through a version", reads=True)
    start.add_argument("route")
    start.add_argument("version", metavar="VERSION", help="ROUTE@NUMBER, or the number")
    start.add_argument("--since", default="24h", metavar="TIME", help="as in 90m, 24h or 7d")
    start.add_argument("--limit", type=int, default=1000, help="the newest so many")
    start.add_argument("--no-wait", action="store_true", help="ask for it, and watch nothing")
    look = command(below, "replays", _replays, "list replays, show one, or end one", reads=True)
    look.add_argument("route")
    look.add_argument("--id", metavar="REPLAY", help="show this one with its differences")
    look.add_argument("--cancel", metavar="REPLAY", help="end this one; what it found stays")


def _replay(session: Session) -> int:
    options = session.options
    asked = session.client.replay(
        options.route, options.version, since_seconds=_seconds(options.since), limit=options.limit
    )
    if options.no_wait:
        session.say(f"{asked.id} is queued: `{_look(asked)}` shows how far it is")
        return 0
    report = _watch(session, asked)
    session.show(ReplayReport, report, table) if session.wants_json else session.out.print(
        _described(report)
    )
    return 0 if report.replay.state == "done" else 1


def _watch(session: Session, asked: Replay) -> ReplayReport:
    last, shown = None, None
    try:
        while True:
            report = session.client.replay_report(asked.route, asked.id)
            if report.replay.ended:
                return report
            now = (report.replay.state, report.settled)
            if now != last and not session.wants_json:
                shown = f"{asked.id} {now[0]}: {now[1]} of at most {asked.limit}"
                session.say(shown)
            last = now
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        session.warn(f"it goes on: `{_look(asked)}` shows how far it is, --cancel ends it")
        raise


def _replays(session: Session) -> int:
    options = session.options
    if options.cancel:
        ended = session.client.cancel_replay(options.route, options.cancel)
        session.say(f"{ended.id} is {ended.state}")
        return 0
    if options.id:
        report = session.client.replay_report(options.route, options.id)
        if session.wants_json:
            session.show(ReplayReport, report, table)
        else:
            session.out.print(_described(report))
        return 0
    rows = session.client.replays(options.route)
    session.show(list[Replay], rows, lambda: _listed(rows))
    return 0


def _listed(rows: list[Replay]) -> Table:
    made = table("REPLAY", "VERSION", "STATE", "ASKED", "BY", "WHY")
    for row in rows:
        made.add_row(
            row.id,
            Text(f"{row.route}@{row.version}"),
            row.state,
            f"{row.asked_at:%Y-%m-%d %H:%M}",
            Text(row.by),
            Text(row.reason),
        )
    return made


def _described(report: ReplayReport) -> RenderableType:
    replay, pairs = report.replay, report.pairs
    lines: list[RenderableType] = [
        Text(f"{replay.id}  {replay.route}@{replay.version}  {replay.state}", style="bold")
    ]
    if replay.reason:
        lines.append(Text(f"  {replay.reason}"))
    share = f" ({pairs.agree / pairs.total:.1%})" if pairs.total else ""
    lines.append(
        Text(
            f"  compared  {pairs.total}: {pairs.agree} agree{share}, {pairs.disagree} disagree, "
            f"{pairs.failed} failed; {pairs.wins} better, {pairs.losses} worse, {pairs.ties} even"
        )
    )
    if report.kinds:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(report.kinds.items()))
        lines.append(Text(f"  settled by {kinds}"))
    if report.skipped:
        skipped = ", ".join(f"{why} {count}" for why, count in sorted(report.skipped.items()))
        lines.append(Text(f"  left out  {skipped}"))
    lines.append(Text(f"  cases     {report.offered} were offered to people"))
    if report.replay.state == "done" and not report.settled:
        lines.append(
            Text(
                "  no exchange of that time was captured: `sluice route set "
                f"{replay.route} --capture-idle 0.05` keeps some while no version is on trial"
            )
        )
    if report.differences:
        lines.append(_differences(report))
    return Group(*lines)


def _differences(report: ReplayReport) -> Table:
    rest = len(report.differences) - _SHOWN
    title = "differences" + (f" ({rest} more with --json)" if rest > 0 else "")
    made = table("REQUEST", "AGREEMENT", "ASKED", "THEN", "NOW", "CASE", title=title)
    for row in report.differences[:_SHOWN]:
        made.add_row(
            Text(row.request_id),
            f"{row.agreement:.2f} {row.kind}",
            Text(_short(row.asked)),
            Text(_short(row.then)),
            Text(_short(row.now)),
            row.case or "–",
        )
    return made


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line[:60] + ("…" if len(one_line) > 60 else "")


def _look(replay: Replay) -> str:
    return f"sluice rollout replays {replay.route} --id {replay.id}"


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if found is None:
        raise InvalidInputError(f"--since {text}: write a number with s, m, h or d, as in 24h")
    return float(found[1]) * _UNITS[found[2]]
