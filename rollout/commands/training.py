"""`sluice train` and `sluice runs`: from labels to a proposed version."""

import tomllib
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from rollout.commands.session import Session, Subparsers, command, noun, table
from rollout.errors import InvalidInputError, UnavailableError
from rollout.runs import RunEvent, TrainingRun


def add(parsers: Subparsers) -> None:
    train = command(parsers, "train", _train, "train the next adapter of a route from its labels")
    train.add_argument("route")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a value that differs from the trainer's default, as in epochs=2",
    )
    train.add_argument(
        "--dataset", metavar="DIGEST", help="one of the route's; else one is built from the labels"
    )
    train.add_argument("--detach", action="store_true", help="only queue it and print its id")
    train.add_argument(
        "--no-propose",
        dest="propose",
        action="store_false",
        help="leave it to a person to propose the version where it wins",
    )
    below = noun(parsers, "runs", "list, show, follow, pause, resume and cancel training runs")
    listing = command(below, "list", _list, "list the runs", reads=True)
    listing.add_argument("route", nargs="?")
    show = command(below, "show", _show, "show one run", reads=True)
    show.add_argument("id", metavar="RUN")
    follow = command(below, "follow", _follow, "watch a run to its end")
    follow.add_argument("id", metavar="RUN")
    pause = command(below, "pause", _pause, "save a run and give it back until it is resumed")
    pause.add_argument("id", metavar="RUN")
    resume = command(below, "resume", _resume, "let a paused run go on where it was")
    resume.add_argument("id", metavar="RUN")
    cancel = command(below, "cancel", _cancel, "ask a run to stop")
    cancel.add_argument("id", metavar="RUN")


def _train(session: Session) -> int:
    options = session.options
    run = session.client.start_run(
        options.route,
        dict(pair(text) for text in options.set),
        options.dataset,
        propose=options.propose,
    )
    if options.detach:
        session.say(run.id)
        return 0
    session.say(f"{run.id} is queued; it must beat {run.parent}")
    return _watch(session, run.id)


def _watch(session: Session, run_id: str) -> int:
    """Follow to the end. Ctrl-C stops the watching, never the run."""
    try:
        ended = show_progress(session, run_id)
    except KeyboardInterrupt:
        session.say(
            f"\n{run_id} goes on without you: `sluice runs follow {run_id}` shows it again,"
        )
        session.say(f"`sluice runs cancel {run_id}` stops it")
        return 130
    if ended.state == "proposed":
        session.say(f"proposed {ended.version}: {ended.reason}")
        return 0
    if ended.state == "ready":
        session.say(
            f"{ended.version} won and is not proposed: {ended.reason}\n"
            f"`sluice rollout propose {ended.route} {ended.version}` does"
        )
        return 0
    if ended.state == "built":
        session.say(f"built {ended.dataset}: {ended.reason}")
        return 0
    session.warn(f"{run_id} {ended.state}: {ended.reason or 'no reason given'}")
    return 1


def show_progress(session: Session, run_id: str, *, quiet: bool = False) -> TrainingRun:
    """Follow a run to its end, with a bar at a terminal and lines elsewhere."""
    columns = (
        TextColumn("{task.description:<11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[message]}", markup=True),
    )
    with Progress(
        *columns, console=session.out, disable=quiet or not session.out.is_terminal
    ) as bars:
        tasks: dict[str, TaskID] = {}
        for item in session.client.follow_run(run_id):
            if isinstance(item, TrainingRun):
                for task in tasks.values():
                    bars.stop_task(task)
                return item
            if quiet:
                continue
            if session.out.is_terminal:
                _advance(bars, tasks, item)
            else:
                session.say(_line(item))
    raise UnavailableError(f"the progress of {run_id} ended without the run")


def _advance(bars: Progress, tasks: dict[str, TaskID], event: RunEvent) -> None:
    if event.stage not in tasks:
        for task in tasks.values():
            bars.stop_task(task)
        tasks[event.stage] = bars.add_task(event.stage, total=None, message="")
    message = event.message.replace("[", r"\[")
    eta = f", about {event.eta:.0f} s left" if event.eta else ""
    bars.update(
        tasks[event.stage],
        completed=event.done,
        total=event.total or None,
        message=f"{message}{eta}",
    )


def _line(event: RunEvent) -> str:
    count = f" {event.done}/{event.total}" if event.total else ""
    return f"{event.at:%H:%M:%S} {event.stage}{count}: {event.message}"


def _list(session: Session) -> int:
    rows = session.client.runs(session.options.route)
    session.show(list[TrainingRun], rows, lambda: _table(rows))
    return 0


def _table(rows: list[TrainingRun]) -> Table:
    made = table("RUN", "ROUTE", "STATE", "PARENT", "VERSION", "WHY")
    for row in rows:
        made.add_row(
            row.id,
            Text(row.route),
            row.state,
            row.parent,
            row.version or "–",
            Text(row.reason or (f"started because {row.why}" if row.why else "")),
        )
    return made


def _show(session: Session) -> int:
    row = session.client.run(session.options.id)
    session.show(TrainingRun, row, lambda: _details(row))
    return 0


def _details(row: TrainingRun) -> Table:
    made = table("KEY", "VALUE", title=row.id)
    values: dict[str, Any] = {
        "route": row.route,
        "state": row.state,
        "reason": row.reason,
        "parent": row.parent,
        "version": row.version,
        "dataset": row.dataset,
        "adapter": row.adapter,
        "report": row.report,
        "asked": f"{row.created_at:%Y-%m-%d %H:%M:%S} by {row.created_by}",
        "why": row.why,
    }
    for key, value in values.items():
        if value:
            made.add_row(key, Text(str(value)))
    return made


def _follow(session: Session) -> int:
    return _watch(session, session.client.run(session.options.id).id)


def _cancel(session: Session) -> int:
    run = session.client.cancel_run(session.options.id)
    done = run.state == "cancelled"
    session.say(f"{run.id} {'is cancelled' if done else 'will stop at its next step'}")
    return 0


def _pause(session: Session) -> int:
    run = session.client.pause_run(session.options.id)
    done = run.state == "paused"
    session.say(f"{run.id} {'is paused' if done else 'will be paused at its next step'}")
    session.say(f"`sluice runs resume {run.id}` lets it go on")
    return 0


def _resume(session: Session) -> int:
    run = session.client.resume_run(session.options.id)
    session.say(f"{run.id} goes on as soon as a trainer is free")
    return 0


def pair(text: str) -> tuple[str, Any]:
    """`epochs=2` with the value read as TOML, and as text where it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InvalidInputError(f"--set {text}: write KEY=VALUE")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value
