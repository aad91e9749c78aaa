"""`sluice rollout explain` and `judge`: where an answer came from, and how far a judge can be trusted."""

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from rollout.commands.session import Session, Subparsers, command, table
from rollout.control.views import Explanation, JudgeView
from rollout.records import HistoryEntry


def add(below: Subparsers) -> None:
    parser = command(below, "explain", _explain, "lead an answer back to its weights", reads=True)
    parser.add_argument("route")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--request-id", metavar="ID", help="the x-request-id of an answer")
    which.add_argument("--version", metavar="VERSION", help="ROUTE@NUMBER, or the number")
    judge = command(below, "judge", _judge, "how a judge does beside people", reads=True)
    judge.add_argument("route")


def _explain(session: Session) -> int:
    options = session.options
    found = session.client.explain(
        options.route, request_id=options.request_id, version=options.version
    )
    session.show(Explanation, found, lambda: _described(found))
    return 0


def _described(found: Explanation) -> Table:
    made = table("WHAT", "VALUE", title=found.request_id or found.version.name)
    for name, value in _rows(found):
        made.add_row(name, Text(value))
    return made


def _rows(found: Explanation) -> Iterator[tuple[str, str]]:
    yield "route", found.route
    if (answered := found.answered) is not None:
        yield "arm", answered.arm
        if answered.trial is not None:
            yield "trial", answered.trial
        if answered.unit is not None:
            yield "unit", answered.unit
        if answered.bucket is not None:
            share = "" if answered.weight is None else f" (candidate's below {answered.weight:g} %)"
            yield "bucket", f"{answered.bucket:.4f} %{share}"
        if answered.at is not None:
            yield "answered", f"{answered.at:%Y-%m-%d %H:%M:%S} with status {answered.status}"
        yield "known from", answered.source
    yield from _weights(found)
    if found.commit is not None:
        yield "commit", _commit(found.commit)
    for entry in found.commits:
        if entry != found.commit:
            yield "moved by", _commit(entry)
    for case in found.cases:
        yield "case", f"{case.id} of {case.trial}: {case.kind}, agreement {case.agreement:.2f}"
    for each in found.feedback:
        yield "feedback", f"{each.rating} {each.comment}".strip()
    for note in found.notes:
        yield "note", note


def _weights(found: Explanation) -> Iterator[tuple[str, str]]:
    version = found.version.version
    yield "version", found.version.name
    revision = f" at revision {version.base_revision}" if version.base_revision else ""
    yield "base", f"{version.base}{revision} on engine {version.engine}"
    yield "adapter", f"sha256 {version.adapter}" if version.adapter else "none: the bare base"
    yield "served as", found.version.served_name
    if version.prompt is not None or version.sampling:
        parts = ["a prompt"] * (version.prompt is not None)
        parts += [f"{name}={value}" for name, value in version.sampling.items()]
        yield "carries", ", ".join(parts)
    by = f" by {version.created_by}" if version.created_by else ""
    note = f": {version.note}" if version.note else ""
    yield "registered", f"{version.created_at:%Y-%m-%d %H:%M:%S}{by}{note}"
    if version.parent is not None:
        yield "parent", f"{version.route}@{version.parent}"
    if version.dataset is not None:
        yield "dataset", version.dataset
    if version.run is not None:
        state = f" ({found.run.state})" if found.run is not None else ""
        yield "run", f"{version.run}{state}"
    if (report := found.report) is not None:
        yield "report", f"{report.id}: {report.outcome} against {report.parent}: {report.reason}"


def _commit(entry: HistoryEntry) -> str:
    event = entry.event
    what = event.kind.replace("_", " ")
    if event.kind == "canary":
        what = f"canary {event.percent:g} %"
    why = f": {event.reason}" if event.reason else ""
    return f"revision {entry.revision}, {entry.at:%Y-%m-%d %H:%M:%S}, {what} by {event.by}{why}"


def _judge(session: Session) -> int:
    found = session.client.judge(session.options.route)
    session.show(JudgeView, found, lambda: _record(found))
    return 0


def _record(found: JudgeView) -> Table:
    made = table("WHAT", "VALUE", title=found.route)
    judge, said = found.judge, found.record
    named = "none" if judge is None else f"{judge.model or 'the base'} of engine {judge.engine}"
    decides = "" if judge is None else ", decides" if judge.decides else ", decides nothing"
    made.add_row("judge", Text(named + decides))
    bias = "" if found.position_bias is None else f" ({found.position_bias:.1%})"
    made.add_row("judged", f"{said.judged} cases")
    made.add_row("went by the place", f"{said.inconsistent}{bias}")
    share = f" ({said.agreed / said.labelled:.1%})" if said.labelled else ""
    made.add_row("as people said", f"{said.agreed} of {said.labelled} labelled cases{share}")
    kappa = "not defined yet" if said.kappa is None else f"{said.kappa:.2f}"
    made.add_row("Cohen's kappa", f"{kappa} (1 is agreement, 0 is chance)")
    return made
