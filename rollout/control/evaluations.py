"""Suites and reports: registering, asking for an evaluation, opening a vault, showing what came out."""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import msgspec

from rollout.control.access import require_route, require_scope
from rollout.control.context import Control
from rollout.control.queueing import check_room, run_of_now
from rollout.credentials import ApiKey
from rollout.datasets import SuiteUse, prompt_lines
from rollout.errors import ConflictError, InvalidInputError, NotFoundError, RefusedError
from rollout.evidence import Report, RowResult
from rollout.runs import TrainingRun
from rollout.stores.audit import audit_entry
from rollout.suites import (
    Look,
    SuiteManifest,
    SuiteStanding,
    make_suite,
    read_rows,
    read_scorer,
    suite_lines,
)
from rollout.versions import Version


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be evaluated. What is None is chosen: the stable version, the route's suite."""

    version: str
    against: str | None = None
    suite: str | None = None
    rows: int = 0
    fresh: bool = False
    promotion: bool = False
    reason: str = ""
    ways: Sequence[str] | None = None


async def add_suite(
    control: Control, caller: ApiKey, route: str, content: bytes, *, vault: bool, note: str
) -> SuiteManifest:
    """Register a suite: a line with its scorers, then a row a line. Again, it is the same suite."""
    require_route(caller, route)
    await control.stores.rollouts.get(route)
    head, _, lines = content.partition(b"\n")
    scorers = [read_scorer(each) for each in _scorers(head)]
    if any(scorer.kind == "python" for scorer in scorers):
        # Whoever registers code has the trainer run it.
        require_scope(caller, "admin")
    rows = await asyncio.to_thread(read_rows, lines, "the suite")
    suite = await asyncio.to_thread(lambda: make_suite(route, rows, scorers, vault=vault))
    now = control.now()
    prompts = prompt_lines(row.messages for row in suite.rows)
    await asyncio.to_thread(control.artifacts.put_document, suite_lines(suite))
    document = await asyncio.to_thread(control.artifacts.put_document, prompts)
    # From here on no dataset trains on it.
    await control.stores.datasets.note_suite(
        SuiteUse(suite.name, route, document, len(suite.rows), now)
    )
    made = await control.stores.suites.put(
        SuiteManifest(
            digest=suite.digest,
            name=suite.name,
            route=route,
            rows=len(suite.rows),
            scorers=suite.scorers,
            created_at=now,
            created_by=caller.name,
            vault=vault,
            note=note,
            tags=dict(Counter(tag for row in suite.rows for tag in row.tags)),
        )
    )
    if (made.route, made.vault) != (route, vault):
        raise ConflictError(
            f"these rows are registered already, as {made.name}"
            + (" in the vault" if made.vault else "")
            + ": a suite belongs to one route, and never leaves or enters the vault"
        )
    await control.stores.audit.append(
        audit_entry("suite.add", made.name, caller.name, reason=note, after=_bare(made))
    )
    return made


async def suites(control: Control, caller: ApiKey, route: str | None) -> list[SuiteManifest]:
    found = await control.stores.suites.list(route)
    return [each for each in found if caller.allows_route(each.route)]


async def suite(control: Control, caller: ApiKey, digest: str) -> SuiteStanding:
    """The suite with each look at it."""
    return await _standing(control, await _manifest(control, caller, digest))


async def standings(control: Control, caller: ApiKey, limit: int) -> list[SuiteStanding]:
    """The newest suites with each look at them."""
    return [
        await _standing(control, each) for each in (await suites(control, caller, None))[:limit]
    ]


async def _standing(control: Control, manifest: SuiteManifest) -> SuiteStanding:
    looks = await control.stores.suites.looks(manifest.digest)
    route = await control.stores.rollouts.route(manifest.route)
    return SuiteStanding(
        manifest,
        tuple(looks),
        len({each.version for each in looks}),
        route.evaluation.maximum_looks,
    )


async def suite_rows(control: Control, caller: ApiKey, digest: str) -> bytes:
    manifest = await _manifest(control, caller, digest)
    if manifest.vault:
        raise RefusedError(
            f"{manifest.name} is in the vault: nobody reads its rows, or it would be none"
        )
    return await asyncio.to_thread(control.artifacts.document, manifest.digest)


async def start(control: Control, caller: ApiKey, ask: Ask) -> TrainingRun:
    """Queue an evaluation. A suite in the vault is opened here, or refused with the reason."""
    version = await control.stores.rollouts.version(ask.version)
    require_route(caller, version.route)
    await check_room(control, version.route, "evaluation")
    against = await _against(control, version, ask.against)
    manifest = None if ask.suite is None else await _manifest(control, caller, ask.suite)
    if manifest is not None and manifest.route != version.route:
        raise InvalidInputError(
            f"{manifest.name} is a suite of route {manifest.route}, and {version.name} is of "
            f"{version.route}",
            param="suite",
        )
    config: dict[str, Any] = {
        "version": version.name,
        "against": against.name,
        "suite": None if manifest is None else manifest.digest,
        "rows": ask.rows,
        "fresh": ask.fresh,
        "purpose": "promotion" if ask.promotion else "evaluation",
    }
    if ask.ways is not None:
        config["ways"] = list(ask.ways)
    asked = run_of_now(control, caller, "evaluation", version.route, against.name, config)
    run = replace(asked, version=version.name)
    if manifest is not None and manifest.vault:
        await _open_vault(control, caller, manifest, version, ask, run.id)
    await control.stores.runs.enqueue(run)
    return run


async def reports(
    control: Control, caller: ApiKey, route: str | None, limit: int, version: str | None = None
) -> list[Report]:
    rows = await control.stores.reports.list(route, limit, version)
    return [report for report in rows if caller.allows_route(report.route)]


async def report(control: Control, caller: ApiKey, report_id: str) -> Report:
    found = await control.stores.reports.get(report_id)
    require_route(caller, found.route)
    return found


async def report_rows(control: Control, caller: ApiKey, report_id: str) -> list[RowResult]:
    """What both versions answered to each row; those on which they differ first."""
    found = await report(control, caller, report_id)
    if found.vault:
        raise RefusedError(f"{found.suite} is in the vault: its rows are shown to nobody")
    ours, parents = [
        {each["row"]: each for each in await _answers(control, score.answers)}
        for score in found.scores[:2]
    ]
    order = {"lost": 0, "gained": 1, "same": 2}
    results = [_result(row, each, parents.get(row, {}), found.metric) for row, each in ours.items()]
    return sorted(results, key=lambda each: (order[each.change], each.row))


async def _answers(control: Control, document: str | None) -> list[Mapping[str, Any]]:
    if document is None:
        raise NotFoundError("the answers of this report were not kept: it is of an older release")
    content = await asyncio.to_thread(control.artifacts.document, document)
    found: list[Mapping[str, Any]] = msgspec.json.decode(content)["graded"]
    return found


def _result(
    row: str, ours: Mapping[str, Any], parents: Mapping[str, Any], metric: str
) -> RowResult:
    mine, theirs = _mark(ours, metric), _mark(parents, metric)
    return RowResult(
        row=row,
        change="gained" if mine > theirs else "lost" if mine < theirs else "same",
        answer=_said(ours),
        mark=mine,
        parent_answer=_said(parents),
        parent_mark=theirs,
        error=ours.get("error") or parents.get("error"),
    )


def _mark(graded: Mapping[str, Any], metric: str) -> float:
    return float((graded.get("marks") or {}).get(metric, graded.get("right", False)))


def _said(graded: Mapping[str, Any]) -> str:
    calls = graded.get("calls")
    return str(graded.get("answer", "")) + (json.dumps(calls) if calls else "")


async def _manifest(control: Control, caller: ApiKey, digest: str) -> SuiteManifest:
    found = await control.stores.suites.get(digest)
    require_route(caller, found.route)
    return found


async def _against(control: Control, version: Version, named: str | None) -> Version:
    """The version to compare with: the stable one; for the stable one, the route's first.

    A version may be compared with itself where somebody asks for it: what differs is noise.
    """
    if named is not None:
        return await control.stores.rollouts.version(named)
    rollout = await control.stores.rollouts.get(version.route)
    number = rollout.stable if rollout.stable != version.number else 1
    found = await control.stores.rollouts.version(f"{version.route}@{number}")
    if found.name == version.name:
        raise InvalidInputError(
            f"{version.name} would be compared with itself: say which version it is compared with, "
            "or say this one, to see how far it differs from itself",
            param="against",
        )
    return found


async def _open_vault(
    control: Control,
    caller: ApiKey,
    manifest: SuiteManifest,
    version: Version,
    ask: Ask,
    run_id: str,
) -> None:
    """Only for the decision whether the version on trial is promoted, and once for each version."""
    refused = f"{manifest.name} is in the vault, which is opened for a promotion alone: "
    if not ask.promotion:
        raise RefusedError(
            refused + "evaluate on an open suite, or say that a promotion is to be decided"
        )
    if not ask.reason.strip():
        raise RefusedError(refused + "say why, it is written down")
    rollout = await control.stores.rollouts.get(version.route)
    if rollout.trial is None or rollout.trial.candidate != version.number:
        raise RefusedError(
            refused
            + f"{version.name} is not on trial on {version.route}, so there is none to decide"
        )
    before = await control.stores.suites.looks(manifest.digest)
    if seen := next((each for each in before if each.version == version.name), None):
        raise RefusedError(
            refused + f"it was opened for {version.name} on {seen.at:%Y-%m-%d %H:%M} by "
            f"{seen.by or 'somebody'} (run {seen.run}), and a second look would be a second chance"
        )
    # The look counts from here on, whatever becomes of the run.
    look = Look(manifest.digest, version.name, run_id, control.now(), caller.name, "promotion")
    await control.stores.audit.append(
        audit_entry(
            "suite.open",
            manifest.name,
            caller.name,
            reason=ask.reason,
            after={"look": _said_of(look)},
        )
    )
    await control.stores.suites.look(look)


def _said_of(look: Look) -> str:
    return f"{look.version}, run {look.run}, {_day(look.at)}"


def _day(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M}"


def _bare(manifest: SuiteManifest) -> Mapping[str, Any]:
    """Without code: the audit says what was registered, the suite has it."""
    scorers = [scorer.kind for scorer in manifest.scorers]
    return {
        "digest": manifest.digest,
        "rows": manifest.rows,
        "vault": manifest.vault,
        "scorers": ", ".join(scorers),
    }


def _scorers(head: bytes) -> Sequence[Mapping[str, Any]]:
    try:
        values = json.loads(head)
        found = values["scorers"]
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise InvalidInputError(
            'the first line has the scorers, as in {"scorers": [{"kind": "exact"}]}',
            param="scorers",
        ) from exc
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise InvalidInputError("`scorers` is no list of objects", param="scorers")
    return found
