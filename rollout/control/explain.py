"""Where an answer came from: route, arm, unit, version, weights, data, and the commit behind it."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from rollout.assignment import bucket
from rollout.control import versions
from rollout.control.context import Control
from rollout.control.views import Answered, CaseOf, Explanation, Source
from rollout.errors import InvalidInputError, NotFoundError
from rollout.exchanges import Exchange, Feedback, Receipt
from rollout.records import HistoryEntry
from rollout.state import Rollout
from rollout.stores.codec import encode
from rollout.versions import parse_model

_HISTORY: Final = 1000
# Gateways answer at once; one that is stuck should keep nobody waiting.
_PATIENCE_SECONDS: Final = 2.0
# Of older trials only what was captured is looked for.
_TRIALS: Final = 50


async def explain_request(control: Control, route: str, request_id: str) -> Explanation:
    """Raises NotFoundError that says where it was looked for, and how long things are kept."""
    await control.stores.rollouts.get(route)
    history = await _history(control, route)
    exchange = await control.stores.captures.find(route, request_id)
    if exchange is not None:
        found = _receipt(exchange)
        feedback = await control.stores.feedback.about(route, found.trial, request_id)
        return await _explain(control, request_id, found, "capture", exchange, feedback, history)
    receipts = await _asked_around(control, route, request_id)
    feedback = await _feedback(control, route, request_id, history)
    rated = [each.receipt for each in feedback if each.receipt is not None]
    source: Source = "gateway" if receipts else "feedback"
    known = receipts or rated
    if not known:
        raise await _nowhere(control, route, request_id)
    several = len(set(known)) > 1
    note = ("several requests bear this id; this is one of them",) if several else ()
    return await _explain(control, request_id, known[-1], source, None, feedback, history, note)


async def explain_version(control: Control, route: str, asked: str) -> Explanation:
    """What a version is made of, and the commits that moved it."""
    await control.stores.rollouts.get(route)
    name = f"{route}@{asked}" if asked.isdecimal() else asked
    of_route, number = parse_model(name)
    if number is None or of_route != route:
        raise InvalidInputError(
            f"{asked!r} is no version of {route}: write {route}@NUMBER", param="version"
        )
    history = await _history(control, route)
    return await _made(control, route, number, None, None, history, ())


async def _explain(
    control: Control,
    request_id: str,
    receipt: Receipt,
    source: Source,
    exchange: Exchange | None,
    feedback: Sequence[Feedback],
    history: Sequence[HistoryEntry],
    notes: tuple[str, ...] = (),
) -> Explanation:
    at = None if exchange is None else exchange.captured_at
    then = standing(history, receipt, at)
    trial = None if then is None else then.after.trial
    of_trial = trial is not None and trial.id == receipt.trial
    answered = Answered(
        source=source,
        arm=receipt.arm,
        trial=receipt.trial,
        unit=receipt.unit or None,
        bucket=(
            bucket(receipt.trial, receipt.unit) * 100 if receipt.trial and receipt.unit else None
        ),
        weight=trial.weight if trial is not None and of_trial else None,
        instead=(
            receipt.arm == "candidate"
            and trial is not None
            and of_trial
            and receipt.version != trial.candidate
        ),
        at=at,
        status=None if exchange is None else exchange.answer.status,
    )
    made = await _made(
        control, receipt.route, receipt.version, request_id, answered, history, notes
    )
    return Explanation(
        route=made.route,
        request_id=request_id,
        version=made.version,
        answered=answered,
        commit=commit_behind(history, receipt, at),
        commits=made.commits,
        run=made.run,
        report=made.report,
        cases=await _cases(control, receipt.route, request_id),
        feedback=tuple(feedback),
        notes=made.notes,
    )


async def _made(
    control: Control,
    route: str,
    number: int,
    request_id: str | None,
    answered: Answered | None,
    history: Sequence[HistoryEntry],
    notes: tuple[str, ...],
) -> Explanation:
    view = await versions.version(control, f"{route}@{number}")
    run, said = None, list(notes)
    if view.version.run is not None:
        try:
            run = await control.stores.runs.get(view.version.run)
        except NotFoundError:
            said.append(f"run {view.version.run} is no longer kept")
    moved = tuple(entry for entry in history if _moves(entry, number))
    if not moved and number == 1:
        said.append("it came with the route, so no commit put it there")
    if answered is not None and answered.arm == "pinned":
        said.append("the client asked for this very version, so no trial and no commit chose it")
    if answered is not None and answered.instead:
        said.append("stable answered because the candidate failed; it counts against the candidate")
    if answered is not None and answered.at is None:
        said.append("the time of the answer is not known: what held last is shown")
    return Explanation(
        route=route,
        request_id=request_id,
        version=view,
        answered=answered,
        commit=moved[-1] if moved else None,
        commits=moved,
        run=run,
        report=await control.stores.reports.of(view.name),
        cases=(),
        feedback=(),
        notes=tuple(said),
    )


def commit_behind(
    history: Sequence[HistoryEntry], receipt: Receipt, at: datetime | None
) -> HistoryEntry | None:
    """The commit that let the version answer: that made it stable, or gave the candidate its share.

    `history` is oldest first. None where the client named the version, or the route came with it.
    """
    if receipt.arm == "pinned":
        return None
    before = [entry for entry in history if at is None or entry.at <= at]
    by_share = receipt.arm == "candidate" and any(_tries(entry.after, receipt) for entry in before)
    for entry in reversed(before):
        if by_share:
            share = _share(entry.after, receipt)
            if share and share != _share(entry.before, receipt):
                return entry
        elif entry.after.stable == receipt.version != entry.before.stable:
            return entry
    return None


def standing(
    history: Sequence[HistoryEntry], receipt: Receipt, at: datetime | None
) -> HistoryEntry | None:
    """The newest commit by that time after which the receipt's trial was on."""
    for entry in reversed(history):
        trial = entry.after.trial
        if (at is None or entry.at <= at) and trial is not None and trial.id == receipt.trial:
            return entry
    return None


def _tries(rollout: Rollout, receipt: Receipt) -> bool:
    """Whether the receipt's trial is on, and of the version that answered."""
    trial = rollout.trial
    return trial is not None and (trial.id, trial.candidate) == (receipt.trial, receipt.version)


def _share(rollout: Rollout, receipt: Receipt) -> float:
    """The candidate's share of the traffic, if it is the receipt's trial that is on."""
    trial = rollout.trial
    return trial.weight if trial is not None and trial.id == receipt.trial else 0.0


def _moves(entry: HistoryEntry, number: int) -> bool:
    """Whether the commit changed what the version gets of the traffic, or put it on trial."""
    return _place(entry.before, number) != _place(entry.after, number)


def _place(rollout: Rollout, number: int) -> tuple[bool, float | None]:
    trial = rollout.trial
    weight = trial.weight if trial is not None and trial.candidate == number else None
    return rollout.stable == number, weight


def _receipt(exchange: Exchange) -> Receipt:
    return Receipt(
        exchange.route,
        exchange.answer.version,
        exchange.arm,
        exchange.trial or None,
        exchange.unit,
    )


async def _history(control: Control, route: str) -> Sequence[HistoryEntry]:
    """Oldest first."""
    return (await control.stores.rollouts.history(route, _HISTORY))[::-1]


async def _asked_around(control: Control, route: str, request_id: str) -> Sequence[Receipt]:
    live = await control.stores.presence.live()
    found = await control.stores.questions.ask(request_id, len(live), _PATIENCE_SECONDS)
    return [receipt for receipt in found if receipt.route == route]


async def _feedback(
    control: Control, route: str, request_id: str, history: Sequence[HistoryEntry]
) -> list[Feedback]:
    trials = dict.fromkeys(
        entry.after.trial.id for entry in reversed(history) if entry.after.trial is not None
    )
    found: list[Feedback] = []
    for trial in [None, *list(trials)[:_TRIALS]]:
        found += await control.stores.feedback.about(route, trial, request_id)
    return found


async def _cases(control: Control, route: str, request_id: str) -> tuple[CaseOf, ...]:
    found: list[CaseOf] = []
    for case_id in await control.stores.cases.find(f'"request_id":{encode(request_id).decode()}'):
        case = await control.stores.cases.find_one(case_id)
        # The text may also stand in what a client said.
        if case is not None and (case.route, case.request_id) == (route, request_id):
            found.append(CaseOf(case.id, case.trial, case.kind, case.agreement))
    return tuple(found)


async def _nowhere(control: Control, route: str, request_id: str) -> NotFoundError:
    cases = await _cases(control, route, request_id)
    hint = (
        f" A case was made of it ({', '.join(case.id for case in cases)}), in {cases[0].trial}, "
        "but what the client got is no longer known."
        if cases
        else ""
    )
    keeping = control.settings.store
    live = len(await control.stores.presence.live())
    return NotFoundError(
        f"nothing is known of a request {request_id!r} of {route}. It is not among the captured "
        f"exchanges (a share of the requests; the newest {keeping.captures} of all routes, for "
        f"{keeping.captures_hours:g} hours), not among the newest requests that {live} live "
        "gateway workers remember ([gateway.feedback] maximum_known each, until they end), and "
        f"nobody rated it.{hint}",
        param="request_id",
    )
