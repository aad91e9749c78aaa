"""`sluice rollout`: where a rollout stands, and moving it."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rollout.client import Confirmation
from rollout.commands import explain, replays
from rollout.commands.plans import read_plan
from rollout.commands.session import Session, Subparsers, command, noun, table
from rollout.control.views import Changed, RolloutView, Verb
from rollout.errors import UnavailableError
from rollout.evidence import Evidence
from rollout.gates import in_short
from rollout.planner import Standing
from rollout.records import HistoryEntry
from rollout.state import Event, Rollout

_ROLLBACK_SECONDS = 10.0
# A control API that takes longer hangs; where the store can be reached nobody waits for it.
_ANSWER_SECONDS = 3.0
_HELP: dict[Verb, str] = {
    "propose": "put a version on trial; it begins in the shadow",
    "canary": "give the candidate so many percent of the traffic",
    "advance": "approve the plan's next step and enter it; behind the last one, promote",
    "hold": "stop where it is until a person decides",
    "resume": "go on with a held trial",
    "promote": "make the candidate stable",
    "withdraw": "take a version out of the queue",
    "rollback": "end the trial, or bring the last stable back; returns when all gateways follow",
}


_FORCED: dict[Verb, str] = {
    "propose": "though it lost its evaluation; the history says so",
    "canary": "though not every replica serves it; the history says so",
    "promote": "without a passing gate, or on fewer replicas; the history says so",
    "advance": "without a passing gate; the history says so",
    "rollback": "take the last stable back though a trial was rolled back a moment ago, or though "
    "no replica serves it",
}


def add(parsers: Subparsers) -> None:
    below = noun(parsers, "rollout", "look at rollouts and move them")
    status = command(below, "status", _status, "show trials, evidence and verdicts", reads=True)
    status.add_argument("route", nargs="?", help="else all of them")
    for verb, help_text in _HELP.items():
        run = _roll_back if verb == "rollback" else partial(_change, verb=verb)
        parser = command(below, verb, run, help_text)
        parser.add_argument("route")
        if verb in ("propose", "withdraw"):
            parser.add_argument("version", metavar="VERSION", help="ROUTE@NUMBER, or the number")
        if verb == "propose":
            parser.add_argument(
                "--plan",
                metavar="FILE",
                type=Path,
                help="steps for this trial, as TOML; else those of the route's policy",
            )
            parser.add_argument(
                "--queue", action="store_true", help="wait for its turn where a trial is on"
            )
        if verb == "canary":
            parser.add_argument("percent", type=float)
        parser.add_argument("--reason", help="why, for the history")
        parser.add_argument("--revision", type=int, help="refuse if the rollout is not at this one")
        if verb in _FORCED:
            parser.add_argument("--force", action="store_true", help=_FORCED[verb])
        parser.add_argument(
            "--wait",
            type=float,
            metavar="SECONDS",
            default=_ROLLBACK_SECONDS if verb == "rollback" else 0.0,
            help="wait so long for the engines to serve it and the gateways to follow",
        )
    replays.add(below)
    explain.add(below)
    history = command(below, "history", _history, "list what happened and why", reads=True)
    history.add_argument("route")
    history.add_argument("--limit", type=int, default=30)


def _change(session: Session, verb: Verb) -> int:
    options = session.options
    file = getattr(options, "plan", None)
    plan = None if file is None else read_plan(file)
    with nullcontext() if plan is None else plan.blamed("plan"):
        changed = session.client.change(
            options.route,
            verb,
            reason=session.reason(),
            version=getattr(options, "version", None),
            percent=getattr(options, "percent", None),
            revision=options.revision,
            force=getattr(options, "force", False),
            plan=None if plan is None else plan.plan,
            queue=getattr(options, "queue", False),
            patience=options.wait,
        )
    session.say(f"{options.route}: {_where(changed)}")
    if changed.rollout.queued:
        session.say(f"  then its queue: {_queue(changed.rollout)}")
    if options.wait <= 0:
        return 0
    began = time.monotonic()
    answer = session.client.wait_until_served(changed.catalog_revision, options.wait)
    return _confirmed(session, answer, time.monotonic() - began)


def _roll_back(session: Session) -> int:
    """Also with the controller down, where the store can be reached from here."""
    options = session.options
    began = time.monotonic()
    wait: Callable[[int, float], Confirmation]
    store_url = session.store_url()
    try:
        changed = session.client.change(
            options.route,
            "rollback",
            reason=session.reason(),
            revision=options.revision,
            force=options.force,
            timeout=None if store_url is None else _ANSWER_SECONDS,
        )
        wait = session.client.wait_until_served
    except UnavailableError as exc:
        # A store or an engine that is unavailable was said by an API that answers.
        if store_url is None or type(exc) is not UnavailableError:
            raise
        session.warn("the control API does not answer; rolling back by the store itself")
        # Other commands must not wait until all that speaks to the store is loaded.
        from rollout.commands import direct

        changed = direct.roll_back(
            store_url,
            options.route,
            by=session.user(),
            reason=session.reason(),
            revision=options.revision,
            force=options.force,
        )
        wait = partial(direct.wait_until_served, store_url)
    session.say(f"{options.route}: {_where(changed)}")
    if options.wait <= 0:
        return 0
    answer = wait(changed.catalog_revision, options.wait)
    return _confirmed(session, answer, time.monotonic() - began)


def _confirmed(session: Session, answer: Confirmation, seconds: float) -> int:
    if answer.missing:
        names = ", ".join(f"{each.host} (process {each.pid})" for each in answer.missing)
        session.warn(
            f"committed, but after {seconds:.1f} s these gateways have not confirmed: {names}. "
            "They follow as soon as they reach the store; if they don't, restart them"
        )
        return 1
    if answer.confirmed == 0:
        session.say("no gateway is alive, so there was nobody to wait for")
    else:
        plural = "" if answer.confirmed == 1 else "s"
        session.say(f"{answer.confirmed} gateway worker{plural} confirmed in {seconds:.2f} s")
    return 0


def _queue(rollout: Rollout) -> str:
    return ", ".join(f"{rollout.route}@{waiting.version}" for waiting in rollout.queued)


def _where(changed: Changed) -> str:
    rollout = changed.rollout
    trial = rollout.trial
    if trial is None:
        return f"{rollout.route}@{rollout.stable} takes all of the traffic"
    candidate = f"{rollout.route}@{trial.candidate}"
    if trial.weight == 0:
        return f"{candidate} is in the shadow ({trial.stage})"
    return f"{candidate} takes {trial.weight:g} % of the traffic ({trial.stage})"


def _status(session: Session) -> int:
    client = session.client
    route = session.options.route
    names = [route] if route else [row.route.name for row in client.routes()]
    views = [client.rollout(name) for name in names]
    if session.wants_json:
        kind, value = (RolloutView, views[0]) if route else (list[RolloutView], views)
        session.show(kind, value, table)
        return 0
    for view in views:
        session.out.print(_describe(view))
    if not views:
        session.say("there is no route yet: `sluice route set NAME --engine ENGINE` makes one")
    return 0


def _describe(view: RolloutView) -> RenderableType:
    rollout, trial = view.rollout, view.rollout.trial
    lines: list[RenderableType] = [
        Text(f"{rollout.route}", style="bold").append(f"  revision {rollout.revision}", "dim"),
        Text(f"  stable     {view.stable}"),
    ]
    if view.previous:
        lines.append(Text(f"  before     {view.previous}"))
    if trial is not None:
        share = f"{trial.weight:g} % of the traffic"
        lines.append(Text(f"  candidate  {view.candidate}  {trial.stage}, {share}"))
    if view.standing is not None:
        lines += _progress(view.standing)
    if view.queued:
        lines.append(Text(f"  queued     {', '.join(view.queued)}"))
    if view.last is not None:
        lines.append(Text(f"  last       {_last(view.last)}"))
    lines += [Text(f"  resident   {line}", "yellow") for line in _missing(view)]
    if trial is not None:
        # What the plan does not ask for can only end the trial.
        asked = ("split",) if view.standing is None else ("split", *view.standing.plan.gates)
        for verdict in sorted(view.verdicts, key=lambda verdict: verdict.gate not in asked):
            lines.append(
                Text("  gate       " if verdict.gate in asked else "  watched    ")
                .append(f"{verdict.gate} {verdict.outcome}".ljust(21), _COLOURS[verdict.outcome])
                .append(f" {in_short(verdict)}")
            )
            if verdict.outcome == "fail":
                lines.append(Text(f"             {verdict.reason}"))
        if view.evidence is not None:
            lines.append(_numbers(view.evidence))
    if view.retraining is not None:
        said = f"{view.retraining.state}: {view.retraining.reason}"
        failing = "yellow" if view.retraining.failures else ""
        lines.append(Text(f"  retraining {said}", failing))
    hint = f": sluice cases claim {rollout.route}" if view.open_cases else ""
    lines.append(Text(f"  cases      {view.open_cases} wait for a person{hint}\n"))
    return Group(*lines)


def _progress(at: Standing) -> Iterator[Text]:
    """The steps with the present one, and what has to happen before the next."""
    line = Text("  plan       ")
    for place, step in enumerate(at.plan.steps):
        style = "bold" if place == at.step else "dim"
        line.append(" > " if place else "", "dim")
        name = _step_name(step.percent)
        line.append(f"[{name}]" if place == at.step else name, style)
    step = at.plan.steps[at.step]
    least = f" of {step.minimum_units:,}" if step.minimum_units else ""
    what = "units" if step.percent else "compared pairs"
    since = f"since {at.entered_at:%Y-%m-%d %H:%M} UTC"
    yield line.append(f"  {since}, {at.units:,}{least} {what}")
    for wait in at.waits:
        # A gate without a forecast says below what it lacks.
        brief = wait.kind == "gate" and wait.needed is None
        text = wait.text.partition(":")[0] if brief else wait.text
        yield Text(f"  waiting    {text}", "yellow")
    if not at.waits:
        yield Text(f"  next       {_step_name(at.next_percent)}, within a second", "green")


def _last(entry: HistoryEntry) -> str:
    event = entry.event
    why = f": {event.reason}" if event.reason else ""
    what = _what(event, entry.after.route)
    return f"{what} by {event.by}, {entry.at:%Y-%m-%d %H:%M} UTC{why}"


def _step_name(percent: float) -> str:
    if percent == 0:
        return "shadow"
    return "promotion" if percent >= 100 else f"{percent:g} %"


def _missing(view: RolloutView) -> Iterator[str]:
    """Which replicas lack a version, and what waits for them."""
    for name, found in view.placements.items():
        if found.everywhere:
            continue
        # What the candidate waits for stands with its plan.
        if name != view.candidate:
            yield f"{name} is not everywhere: {found.reason}"


_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def _numbers(evidence: Evidence) -> Text:
    pairs = evidence.pairs
    return Text(
        f"  pairs      {pairs.total}: {pairs.agree} agree, {pairs.disagree} disagree, "
        f"{pairs.failed} failed; {pairs.wins} better, {pairs.losses} worse, {pairs.ties} even\n"
        f"  requests   stable {evidence.stable.requests} ({evidence.stable.errors} errors), "
        f"candidate {evidence.candidate.requests} ({evidence.candidate.errors} errors, "
        f"{evidence.candidate.fallbacks} answered by stable)\n"
        f"  feedback   stable {evidence.stable.positive} good, {evidence.stable.negative} bad; "
        f"candidate {evidence.candidate.positive} good, {evidence.candidate.negative} bad"
    )


def _history(session: Session) -> int:
    rows = session.client.history(session.options.route, session.options.limit)
    session.show(list[HistoryEntry], rows, lambda: _history_table(rows))
    return 0


def _history_table(rows: list[HistoryEntry]) -> Table:
    made = table("REVISION", "WHEN", "WHAT", "BY", "WHY")
    for row in rows:
        made.add_row(
            str(row.revision),
            f"{row.at:%Y-%m-%d %H:%M:%S}",
            _what(row.event, row.after.route),
            Text(row.event.by),
            Text(row.event.reason),
        )
    return made


def _what(event: Event, route: str) -> str:
    if event.kind in ("proposed", "queued", "withdrawn"):
        return f"{event.kind} {route}@{event.version}"
    if event.kind == "canary":
        return f"canary {event.percent:g} %"
    return event.kind.replace("_", " ")
