"""`sluice cases`: what waits for a person, what they said, and erasing it."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rollout.cases import CaseState, Label
from rollout.commands import files
from rollout.commands.session import Session, Subparsers, command, noun, table
from rollout.control.views import AnswerView, CaseView, ErasureView
from rollout.errors import InvalidInputError
from rollout.records import CaseStats
from rollout.tallies import WinRate


def add(parsers: Subparsers) -> None:
    below = noun(parsers, "cases", "list, claim, label, export, import and erase cases")
    listing = command(below, "list", _list, "list cases", reads=True)
    listing.add_argument("route", nargs="?")
    listing.add_argument("--state", choices=CaseState.__args__)  # type: ignore[attr-defined]
    listing.add_argument("--limit", type=int, default=20)
    claim = command(below, "claim", _claim, "take the most telling open cases", reads=True)
    claim.add_argument("route", nargs="?")
    claim.add_argument("--count", type=int, default=1)
    claim.add_argument("--lease", type=int, default=600, metavar="SECONDS")
    label = command(below, "label", _label, "say which answer of a claimed case is right")
    label.add_argument("case")
    label.add_argument("choice", choices=("first", "second", "both", "neither"))
    label.add_argument("--correction", help="the answer that would have been right")
    label.add_argument("--comment", default="")
    labels = command(below, "labels", _labels, "who said what of a case, and when", reads=True)
    labels.add_argument("case")
    release = command(below, "release", _release, "give a claimed case back unlabelled")
    release.add_argument("case")
    export = command(below, "export", _export, "write the labelled cases as lines of JSON")
    export.add_argument("route", nargs="?")
    export.add_argument("--output", "-o", metavar="FILE", type=Path, help="else standard output")
    bring = command(below, "import", _import, "add exported cases; all of them or none")
    bring.add_argument("file", type=Path, help="- is standard input")
    stats = command(
        below, "stats", _stats, "count the cases; how far labelers agree, and whom they prefer",
        reads=True,
    )  # fmt: skip
    stats.add_argument("route", nargs="?")
    erase = command(
        below, "erase", _erase, "erase cases, labels, captures and feedback for good", reads=True
    )
    whose = erase.add_mutually_exclusive_group(required=True)
    whose.add_argument(
        "--user",
        nargs="+",
        metavar="KEY_ID/STICKY",
        help="a client: the id of its key, and its session, user or the like",
    )
    whose.add_argument("--unit", nargs="+", help="a client, by the hash that stands in exports")
    whose.add_argument(
        "--request", nargs="+", metavar="ID", help="one request, by its x-request-id"
    )
    whose.add_argument("--older-than", type=float, metavar="DAYS", help="whatever is older")
    erase.add_argument("--route", help="with --older-than: of this route only")
    erase.add_argument("--reason", help="goes into the audit")


def _list(session: Session) -> int:
    options = session.options
    rows = session.client.cases(options.route, options.state, options.limit)
    session.show(list[CaseView], rows, lambda: _table(rows))
    return 0


def _table(rows: list[CaseView]) -> Table:
    made = table("CASE", "ROUTE", "STATE", "LABELS", "MADE", "REQUEST")
    for row in rows:
        last = str(row.messages[-1].get("content", "")) if row.messages else ""
        made.add_row(
            Text(row.id),
            Text(row.route),
            row.state,
            f"{row.labels}/{row.needed}",
            f"{row.created_at:%Y-%m-%d %H:%M}",
            Text(last[:80] + ("…" if len(last) > 80 else "")),
        )
    return made


def _claim(session: Session) -> int:
    options = session.options
    rows = session.client.claim(options.route, options.count, options.lease)
    if session.wants_json:
        session.show(list[CaseView], rows, table)
        return 0
    for row in rows:
        _print_case(session, row)
    if not rows:
        session.say("nothing is waiting")
    return 0


def _print_case(session: Session, case: CaseView) -> None:
    labels = f"  label {case.labels + 1} of {case.needed}" if case.needed > 1 else ""
    session.out.print(Text(f"{case.id}  {case.route}{labels}", style="bold"))
    for message in case.messages:
        content = message.get("content")
        shown = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        session.say(f"  {message.get('role')}: {shown}")
    session.say(f"  first:  {_shown(case.first)}")
    session.say(f"  second: {_shown(case.second)}")
    session.say(f"  sluice cases label {case.id} first|second|both|neither\n")


def _shown(answer: AnswerView) -> str:
    parts = [answer.text] if answer.text else []
    parts += [json.dumps(call, ensure_ascii=False) for call in answer.tool_calls]
    if answer.error:
        parts.append(f"({answer.error})")
    return "\n          ".join(parts) or "(an empty answer)"


def _label(session: Session) -> int:
    options = session.options
    answer = session.client.label(
        options.case, options.choice, correction=options.correction, comment=options.comment
    )
    if not answer.recorded:
        session.say(f"{options.case} is decided, or has your label already: nothing was changed")
        return 1
    session.say(f"{options.case}: {options.choice}")
    return 0


def _labels(session: Session) -> int:
    rows = session.client.labels(session.options.case)
    session.show(list[Label], rows, lambda: _labels_table(rows))
    return 0


def _labels_table(rows: list[Label]) -> Table:
    made = table("LABELER", "WHEN", "CHOICE", "CORRECTION", "COMMENT")
    for row in rows:
        made.add_row(
            Text(row.labeler),
            f"{row.labelled_at:%Y-%m-%d %H:%M}",
            row.choice,
            Text(row.correction or "–"),
            Text(row.comment or "–"),
        )
    return made


def _release(session: Session) -> int:
    session.client.release(session.options.case)
    session.say(f"{session.options.case} is open again")
    return 0


def _export(session: Session) -> int:
    target: Path | None = session.options.output
    written = files.write(session.client.export_cases(session.options.route), target)
    if target is not None:
        session.say(f"{written} labelled cases are in {target}")
    return 0


def _import(session: Session) -> int:
    answer = session.client.import_cases(files.read(session.options.file))
    known = f"; {answer.known} were known already" if answer.known else ""
    session.say(f"{answer.added} labelled cases were added{known}")
    return 0


def _stats(session: Session) -> int:
    rows = session.client.case_stats(session.options.route)
    session.show(list[CaseStats], rows, lambda: _stats_table(rows))
    return 0


def _stats_table(rows: list[CaseStats]) -> Table:
    made = table(
        "ROUTE", "OPEN", "LEASED", "LABELLED", "DISPUTED", "DROPPED", "OLDEST", "ALPHA", "PREFERRED"
    )
    for row in rows:
        oldest = f"{row.oldest_at:%Y-%m-%d %H:%M}" if row.oldest_at else "–"
        counts = (row.open, row.leased, row.labelled, row.disputed, row.dropped)
        alpha = "–" if row.agreement.alpha is None else f"{row.agreement.alpha:.2f}"
        rates = "\n".join(f"{trial}: {_rate(rate)}" for trial, rate in row.win_rates.items())
        made.add_row(Text(row.route), *map(str, counts), oldest, alpha, Text(rates or "–"))
    return made


def _rate(rate: WinRate) -> str:
    """How often people prefer the candidate among all pairs."""
    return f"{rate.rate:.0%} ({rate.low:.0%} to {rate.high:.0%}, {rate.decided} labelled)"


def _erase(session: Session) -> int:
    options = session.options
    asked: list[dict[str, Any]]
    if options.older_than is not None:
        asked = [{"older_than_days": options.older_than, "route": options.route}]
    elif options.route is not None:
        raise InvalidInputError("--route goes with --older-than: a client is on any route")
    else:
        name, values = next(
            (name, values)
            for name, values in (
                ("user", options.user),
                ("unit", options.unit),
                ("request_id", options.request),
            )
            if values
        )
        asked = [{name: value} for value in values]
    found = [session.client.erase_cases(**each, reason=session.reason()) for each in asked]
    if session.wants_json:
        session.show(list[ErasureView], found, table)
        return 0
    for each in found:
        _say_erased(session, each)
    return 0


def _say_erased(session: Session, erased: ErasureView) -> None:
    session.say(
        f"erased {erased.cases} cases with {erased.labels} labels, {erased.captures} captures, "
        f"{erased.feedback} pieces of feedback and {erased.differences} differences of replays"
    )
    for remnant in erased.remnants:
        session.say(f"  dataset {remnant.dataset} still holds {remnant.cases} of these cases")
        for name, values in (
            ("runs", remnant.runs),
            ("adapters", remnant.adapters),
            ("versions", remnant.versions),
        ):
            if values:
                session.say(f"    {name}: {', '.join(values)}")
