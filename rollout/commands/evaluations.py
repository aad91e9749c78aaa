"""`sluice eval`, `sluice suite` and `sluice report`: how good a version is, on what, and the result."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rollout.commands import files
from rollout.commands.session import Session, Subparsers, command, noun, table
from rollout.commands.training import show_progress
from rollout.errors import InvalidInputError, NotFoundError
from rollout.evidence import Report, RowResult, Score
from rollout.runs import TrainingRun
from rollout.suites import KINDS, Scorer, SuiteManifest, SuiteStanding

_WAYS = ("base", "prompt", "larger")
_SHOWN_ROWS = 50
_LONGEST_SHOWN = 60
# Of these the value is a file's text.
_FROM_FILES: Mapping[str, str] = {"python": "code", "json_valid": "schema"}


def add(parsers: Subparsers) -> None:
    judge = command(parsers, "eval", _eval, "evaluate a version beside another one", reads=True)
    judge.add_argument("target", metavar="ROUTE|VERSION", help="a route is its candidate")
    judge.add_argument("--against", metavar="VERSION", help="else the stable version")
    judge.add_argument(
        "--suite", metavar="SUITE|FILE", help="else the route's; a file is registered first"
    )
    _add_scorers(judge)
    judge.add_argument("--rows", type=int, default=0, help="so many of its rows; 0 is all")
    judge.add_argument(
        "--ways",
        metavar="WAY,…",
        help=f"what else is asked, of {', '.join(_WAYS)}; none is nothing else",
    )
    judge.add_argument("--fresh", action="store_true", help="ask again what was answered before")
    judge.add_argument(
        "--promotion", action="store_true", help="it decides a promotion: opens a vault"
    )
    judge.add_argument("--reason", default="", help="why the vault is opened, for the audit")
    judge.add_argument("--gate", action="store_true", help="exit with 1 unless it passes")
    judge.add_argument("--detach", action="store_true", help="only queue it and print its run")

    below = noun(parsers, "suite", "register, list and show what is evaluated on")
    adding = command(below, "add", _add, "register a suite of rows", reads=True)
    adding.add_argument("route")
    adding.add_argument("file", type=Path, help="JSON lines; - is standard input")
    _add_scorers(adding)
    adding.add_argument("--vault", action="store_true", help="opened for promotions alone")
    adding.add_argument("--note", default="", help="what it is for")
    listing = command(below, "list", _list, "list the suites", reads=True)
    listing.add_argument("route", nargs="?")
    show = command(below, "show", _show, "a suite, and each look at it", reads=True)
    show.add_argument("suite", help="its digest, the first digits of it, or its name")
    show.add_argument("--rows", action="store_true", help="write its rows as lines of JSON")

    below = noun(parsers, "report", "list and show reports of evaluations")
    listing = command(below, "list", _reports, "list the reports", reads=True)
    listing.add_argument("route", nargs="?")
    listing.add_argument("--version", help="only those on this version")
    show = command(below, "show", _report, "show one report", reads=True)
    show.add_argument("report", metavar="REPORT|VERSION", help="a version's is its newest")
    show.add_argument("--rows", action="store_true", help="what was answered, row by row")


def _add_scorers(parser: Any) -> None:
    parser.add_argument(
        "--scorer",
        action="append",
        default=[],
        metavar="KIND[:…]",
        help=f"how answers are marked, the first decides: {', '.join(KINDS)}; with values as in "
        "similarity:threshold=0.8, judge:engine=main, python:FILE, json_valid:FILE",
    )


def _eval(session: Session) -> int:
    options = session.options
    version = _version(session, options.target)
    wish: dict[str, Any] = {
        "against": options.against,
        "suite": _suite(session, version.partition("@")[0]),
        "rows": options.rows,
        "fresh": options.fresh,
        "promotion": options.promotion,
        "reason": options.reason,
    }
    if options.ways is not None:
        wish["ways"] = [each for each in options.ways.split(",") if each not in ("", "none")]
    run = session.client.evaluate(version, **wish)
    if options.detach:
        session.say(run.id)
        return 0
    ended = _follow(session, run)
    if ended is None:
        return 130
    if ended.report is None:
        session.warn(f"{run.id} {ended.state}: {ended.reason or 'no reason given'}")
        return 1
    found = session.client.report(ended.report)
    _print(session, found)
    return 0 if found.outcome == "pass" or not options.gate else 1


def _follow(session: Session, run: TrainingRun) -> TrainingRun | None:
    """Watch to the end. Ctrl-C stops the watching, never the run."""
    try:
        return show_progress(session, run.id, quiet=session.wants_json)
    except KeyboardInterrupt:
        session.say(f"\n{run.id} goes on without you: `sluice runs follow {run.id}`")
        return None


def _version(session: Session, target: str) -> str:
    if "@" in target:
        return target
    rollout = session.client.route(target).rollout
    return f"{target}@{rollout.trial.candidate if rollout.trial else rollout.stable}"


def _suite(session: Session, route: str) -> str | None:
    named = session.options.suite
    if named is None or not Path(named).is_file():
        if session.options.scorer:
            raise InvalidInputError("--scorer is for rows of a file: a suite has its scorers")
        return None if named is None else str(named)
    return _register(session, route, Path(named)).digest


def _register(session: Session, route: str, path: Path, **more: Any) -> SuiteManifest:
    scorers = [scorer(text) for text in session.options.scorer]
    return session.client.add_suite(route, files.read(path), scorers, **more)


def scorer(text: str) -> dict[str, Any]:
    """`similarity:threshold=0.8` as the API takes it; values are TOML, or texts."""
    kind, _, rest = text.partition(":")
    values: dict[str, Any] = {"kind": kind}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals and kind in _FROM_FILES:
            name, value = _FROM_FILES[kind], files.read_text(Path(part))
        elif not equals:
            raise InvalidInputError(f"--scorer {text}: write KIND:NAME=VALUE")
        values[name] = _value(name, value)
    return values


def _value(name: str, text: str) -> Any:
    if name in ("labels", "passing"):
        return text.split("|")
    if name in ("threshold", "seconds", "memory_mb"):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            return text
    return text


def _add(session: Session) -> int:
    options = session.options
    made = _register(session, options.route, options.file, vault=options.vault, note=options.note)
    session.show(SuiteManifest, made, lambda: _manifest(made))
    return 0


def _list(session: Session) -> int:
    rows = session.client.suites(session.options.route)
    session.show(list[SuiteManifest], rows, lambda: _suites(rows))
    return 0


def _suites(rows: list[SuiteManifest]) -> Table:
    made = table("SUITE", "ROUTE", "ROWS", "SCORERS", "VAULT", "MADE", "NOTE")
    for row in rows:
        made.add_row(
            row.digest[:20],
            Text(row.route),
            f"{row.rows:,}",
            ", ".join(each.kind for each in row.scorers),
            "yes" if row.vault else "–",
            f"{row.created_at:%Y-%m-%d %H:%M}",
            Text(row.note),
        )
    return made


def _show(session: Session) -> int:
    if session.options.rows:
        files.write([session.client.suite_rows(session.options.suite)], None)
        return 0
    found = session.client.suite(session.options.suite)
    if session.wants_json:
        session.show(SuiteStanding, found, lambda: _manifest(found.manifest))
        return 0
    session.out.print(_manifest(found.manifest))
    session.say("")
    session.out.print(_looks(found))
    if found.worn:
        session.say("It has judged more versions than the route allows: register a new suite.")
    return 0


def _manifest(row: SuiteManifest) -> Table:
    made = table("KEY", "VALUE", title=row.digest)
    values = {
        "route": row.route,
        "rows": f"{row.rows:,}",
        "vault": "opened for promotions alone" if row.vault else "",
        "slices": ", ".join(f"{tag} ({count:,})" for tag, count in sorted(row.tags.items())),
        "made": f"{row.created_at:%Y-%m-%d %H:%M:%S} by {row.created_by or '–'}",
        "note": row.note,
    }
    for place, each in enumerate(row.scorers):
        values[f"scorer {place + 1}"] = _described(each)
    for key, value in values.items():
        if value:
            made.add_row(key, Text(value))
    return made


def _described(each: Scorer) -> str:
    parts = [each.kind, f"right from {each.threshold:g}"]
    parts += [
        f"{name} {getattr(each, name)}" for name in ("engine", "model") if getattr(each, name)
    ]
    return ", ".join(parts)


def _looks(found: SuiteStanding) -> Table:
    title = f"{found.judged} versions judged, {found.allowed} allowed"
    made = table("VERSION", "FOR", "WHEN", "BY", "RUN", title=title)
    for look in found.looks:
        made.add_row(
            look.version, look.purpose, f"{look.at:%Y-%m-%d %H:%M}", Text(look.by), look.run
        )
    return made


def _reports(session: Session) -> int:
    options = session.options
    rows = session.client.reports(options.route, version=options.version)
    session.show(list[Report], rows, lambda: _table(rows))
    return 0


def _table(rows: list[Report]) -> Table:
    made = table("REPORT", "VERSION", "AGAINST", "OUTCOME", "SCORE", "PARENT", "ROWS", "MADE")
    for row in rows:
        ours, parents = row.scores[0], row.scores[1]
        made.add_row(
            row.id[:12],
            row.version,
            row.parent,
            row.outcome,
            f"{ours.mean:.1%}",
            f"{parents.mean:.1%}",
            f"{ours.total:,}",
            f"{row.created_at:%Y-%m-%d %H:%M}",
        )
    return made


def _report(session: Session) -> int:
    options = session.options
    named = options.report
    if "@" in named:
        newest = session.client.reports(named.partition("@")[0], 1, named)
        if not newest:
            raise NotFoundError(f"{named} was never evaluated: `sluice eval {named}` does it")
        named = newest[0].id
    if options.rows:
        rows = session.client.report_rows(named)
        session.show(list[RowResult], rows, lambda: _row_table(rows))
        return 0
    _print(session, session.client.report(named))
    return 0


def _row_table(rows: list[RowResult]) -> Table:
    counts = {kind: sum(row.change == kind for row in rows) for kind in ("lost", "gained", "same")}
    title = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    made = table("ROW", "CHANGE", "MARK", "ANSWER", "MARK", "PARENT'S", "ERROR", title=title)
    for row in rows[:_SHOWN_ROWS]:
        made.add_row(
            Text(row.row),
            row.change,
            f"{row.mark:.2g}",
            Text(_short(row.answer)),
            f"{row.parent_mark:.2g}",
            Text(_short(row.parent_answer)),
            Text(_short(row.error or "–")),
        )
    if len(rows) > _SHOWN_ROWS:
        made.add_row("…", f"{len(rows) - _SHOWN_ROWS:,} more: --json", "", "", "", "", "")
    return made


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _LONGEST_SHOWN else f"{flat[: _LONGEST_SHOWN - 1]}…"


def _print(session: Session, found: Report) -> None:
    if session.wants_json:
        session.show(Report, found, lambda: _scores(found))
        return
    parts: list[Any] = [_scores(found)]
    if found.verdicts:
        parts.append(_verdicts(found))
    if found.slices:
        parts.append(_slices(found))
    if found.beside:
        parts.append(_beside(found))
    session.out.print(Group(*(each for part in parts for each in (part, Text("")))))
    for note in found.notes:
        session.say(f"note: {note}")
    for error in found.errors[:5]:
        session.say(f"error: {error.version}, row {error.row}: {error.error}")
    detectable = "no gain" if found.detectable is None else f"a gain of {found.detectable:.1%}"
    session.say(
        f"said beforehand: so many rows show {detectable}; the suite has judged {found.looks or '–'} "
        "versions"
    )
    session.say(f"{found.outcome}: {found.reason}")


def _scores(found: Report) -> Table:
    title = f"{found.id[:12]}: {found.version} against {found.parent} on {found.suite}"
    made = table(
        "WAY", "VERSION", found.metric.upper(), "95 %", "RIGHT", "P50", "P99", "COST", title=title
    )
    for each in found.scores:
        made.add_row(
            each.way or "–",
            each.version,
            f"{each.mean:.1%}",
            f"{each.low:.1%} – {each.high:.1%}",
            f"{each.correct:,} of {each.total:,}",
            f"{each.p50_seconds:.3g} s",
            f"{each.p99_seconds:.3g} s",
            _cost(each),
        )
    return made


def _cost(each: Score) -> str:
    if each.cost_per_success is None:
        return "–"
    return f"{each.cost_per_success:,.4g} {each.cost_unit}"


def _verdicts(found: Report) -> Table:
    made = table("DEMAND", "OUTCOME", "WHY", "MORE ROWS")
    for each in found.verdicts:
        needed = "–" if each.needed is None else f"{each.needed:,}"
        made.add_row(Text(each.gate), each.outcome, Text(each.reason), needed)
    return made


def _slices(found: Report) -> Table:
    made = table("SLICE", "ROWS", "SCORE", "PARENT", "DIFFERENCE", "P", "P (HOLM)")
    for each in found.slices:
        made.add_row(
            Text(each.tag),
            f"{each.rows:,}",
            f"{each.score:.1%}",
            f"{each.parent_score:.1%}",
            f"{each.low:+.1%} – {each.high:+.1%}",
            f"{each.p_value:.2g}",
            f"{each.adjusted_p:.2g}",
        )
    return made


def _beside(found: Report) -> Table:
    made = table("BESIDE", "VERSION", "DIFFERENCE", "95 %", "GAINED", "LOST", "P")
    for each in found.beside:
        made.add_row(
            each.way,
            each.version,
            f"{each.difference:+.1%}",
            f"{each.low:+.1%} – {each.high:+.1%}",
            f"{each.gained:,}",
            f"{each.lost:,}",
            f"{each.p_value:.2g}",
        )
    return made
