"""`sluice dataset`: what a route's labels make, what was left out and why, and other formats."""

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rollout.commands import files
from rollout.commands.session import Session, Subparsers, command, noun, table
from rollout.commands.training import pair, show_progress
from rollout.control.views import DatasetDifference
from rollout.datasets import Change, Contradiction, Dropped, Manifest
from rollout.formats import FORMATS, IMPORTED
from rollout.runs import TrainingRun

_SPLITS = ("train", "validation", "heldout")
_SHOWN_CHANGES = 50


def add(parsers: Subparsers) -> None:
    below = noun(parsers, "dataset", "build, show, compare, import and export datasets")
    build = command(below, "build", _build, "build a route's dataset from its labels", reads=True)
    build.add_argument("route")
    _add_settings(build)
    bring = command(below, "import", _import, "build one from a file of JSON lines", reads=True)
    bring.add_argument("route")
    bring.add_argument("file", type=Path, help="- is standard input")
    bring.add_argument("--format", choices=IMPORTED, help="else told from the first line")
    _add_settings(bring)
    listing = command(below, "list", _list, "list the datasets", reads=True)
    listing.add_argument("route", nargs="?")
    show = command(below, "show", _show, "what is in one, and what was left out", reads=True)
    show.add_argument("digest", help="or the first digits of it")
    what = show.add_mutually_exclusive_group()
    what.add_argument("--rows", action="store_true", help="write the rows as lines of JSON")
    what.add_argument(
        "--dropped",
        nargs="?",
        const="",
        metavar="REASON",
        help="list the cases that were left out, all or those of a reason",
    )
    what.add_argument(
        "--contradictions", action="store_true", help="list the labels that contradict each other"
    )
    diff = command(below, "diff", _diff, "what changed from one dataset to another", reads=True)
    diff.add_argument("before")
    diff.add_argument("after")
    diff.add_argument("--all", action="store_true", help=f"not only the first {_SHOWN_CHANGES}")
    export = command(below, "export", _export, "write one in the format of another program")
    export.add_argument("digest")
    export.add_argument("--format", choices=FORMATS, default="rows")
    export.add_argument("--split", choices=_SPLITS, help="else all of them")
    export.add_argument("--output", "-o", metavar="FILE", type=Path, help="else standard output")


def _add_settings(parser: Any) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="heldout or validation, the shares that are never trained on",
    )
    parser.add_argument("--detach", action="store_true", help="only queue it and print its run")


def _build(session: Session) -> int:
    options = session.options
    config = dict(pair(text) for text in options.set)
    return _follow(session, session.client.build_dataset(options.route, config))


def _import(session: Session) -> int:
    options = session.options
    path: Path = options.file
    content = files.read(path)
    config = dict(pair(text) for text in options.set)
    name = "standard input" if str(path) == "-" else path.name
    run = session.client.import_dataset(
        options.route, content, file=name, format=options.format, config=config
    )
    return _follow(session, run)


def _follow(session: Session, run: TrainingRun) -> int:
    """Watch until it is built. Ctrl-C stops the watching, never the run."""
    if session.options.detach:
        session.say(run.id)
        return 0
    try:
        ended = show_progress(session, run.id, quiet=session.wants_json)
    except KeyboardInterrupt:
        session.say(f"\n{run.id} goes on without you: `sluice runs follow {run.id}`")
        return 130
    if ended.dataset is None or ended.state != "built":
        session.warn(f"{run.id} {ended.state}: {ended.reason or 'no reason given'}")
        return 1
    row = session.client.manifest(ended.dataset)
    session.show(Manifest, row, lambda: _details(row))
    return 0


def _list(session: Session) -> int:
    rows = session.client.datasets(session.options.route)
    session.show(list[Manifest], rows, lambda: _table(rows))
    return 0


def _table(rows: list[Manifest]) -> Table:
    made = table("DATASET", "ROUTE", "ROWS", "FROM", "RUN", "MADE")
    for row in rows:
        made.add_row(
            row.digest,
            Text(row.route),
            str(row.rows),
            Text(row.source),
            row.run,
            f"{row.created_at:%Y-%m-%d %H:%M}",
        )
    return made


def _show(session: Session) -> int:
    options = session.options
    if options.rows:
        files.write([session.client.dataset(options.digest)], None)
    elif options.dropped is not None:
        dropped = session.client.dropped(options.digest, options.dropped or None)
        session.show(list[Dropped], dropped, lambda: _dropped_table(dropped))
    elif options.contradictions:
        found = session.client.contradictions(options.digest)
        session.show(list[Contradiction], found, lambda: _contradictions_table(found))
    else:
        row = session.client.manifest(options.digest)
        session.show(Manifest, row, lambda: _details(row))
    return 0


def _details(row: Manifest) -> Table:
    made = table("KEY", "VALUE", title=row.digest)
    values: dict[str, str] = {
        "route": row.route,
        "made": f"{row.created_at:%Y-%m-%d %H:%M:%S} by {row.created_by or '–'}, {row.run or '–'}",
        "from": f"{row.labels:,} labels" if row.labels else row.source,
        "rows": f"{row.rows:,}",
        "splits": _counts(row.splits),
        "shares": f"heldout {row.heldout:g}, validation {row.validation:g}",
        "preferences": f"{row.preferences:,}" if row.preferences else "",
        "no right answer": f"{row.unanswered:,}" if row.unanswered else "",
        "different answers": f"{row.distinct_answers:,}",
    }
    for split in _SPLITS:
        values[f"answers, {split}"] = _balance(row.answers.get(split, {}), row.splits.get(split, 0))
    values["contradictions"] = (
        f"{row.contradictions:,}, of which {row.asked_again:,} went back to the queue"
        if row.contradictions
        else ""
    )
    values["redacted"] = _counts(row.redacted)
    values["white space"] = f"taken out of {row.compacted:,} JSON answers" if row.compacted else ""
    values["checked against"] = ", ".join(row.suites)
    for reason, count in sorted(row.dropped.items(), key=lambda each: -each[1]):
        values[f"left out: {reason}"] = f"{count:,}"
    for key, value in values.items():
        if value:
            made.add_row(Text(key), Text(value))
    return made


def _counts(counts: Any) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))


def _balance(answers: Any, rows: int) -> str:
    """The commonest answers of a split with their shares."""
    common = sorted(answers.items(), key=lambda each: (-each[1], each[0]))[:10]
    return ", ".join(f"{name} {count:,} ({count / rows:.0%})" for name, count in common if rows)


def _dropped_table(rows: list[Dropped]) -> Table:
    made = table("CASE", "WHY", "INSTEAD")
    for row in rows:
        made.add_row(Text(row.case), Text(row.reason), Text(row.kept or "–"))
    return made


def _contradictions_table(rows: list[Contradiction]) -> Table:
    made = table("CASES", "ANSWERS", "SETTLED")
    for row in rows:
        answers = " | ".join(dict.fromkeys(row.golds))
        made.add_row(Text(", ".join(row.cases)), Text(answers), Text(row.settled or "no"))
    return made


def _diff(session: Session) -> int:
    options = session.options
    found = session.client.compare_datasets(options.before, options.after)
    session.show(DatasetDifference, found, lambda: _changes_table(found, everything=options.all))
    return 0


def _changes_table(found: DatasetDifference, *, everything: bool) -> Table:
    kinds: dict[str, int] = {}
    for change in found.changes:
        kinds[change.kind] = kinds.get(change.kind, 0) + 1
    counted = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    made = table("CHANGE", "CASE", "SPLIT", "WHY", title=counted or "the rows are the same")
    changes: tuple[Change, ...] = found.changes
    shown = changes if everything else changes[:_SHOWN_CHANGES]
    for each in shown:
        made.add_row(each.kind, Text(each.case), each.split, Text(each.why or "–"))
    if len(shown) < len(changes):
        made.add_row("…", f"{len(changes) - len(shown):,} more: --all", "", "")
    return made


def _export(session: Session) -> int:
    options = session.options
    content = session.client.dataset(options.digest, options.format, options.split)
    target: Path | None = options.output
    written = files.write([content], target)
    if target is not None:
        session.say(f"{written:,} lines are in {target}")
    return 0
