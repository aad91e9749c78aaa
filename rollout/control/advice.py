"""What is known of a route, gathered for advice on whether to train it."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from rollout.advice import Advice, Gathered, Sample, advise, sample_from, sample_of
from rollout.agreement.schemas import valid
from rollout.cases import LabelledCase, gold_text, prompt_digest
from rollout.control.context import Control
from rollout.intervals import detectable_difference
from rollout.retraining import accord
from rollout.routes import Route

# The newest requests, and labels, that are looked at.
_MOST_SAMPLES = 1000
_MOST_LABELS = 5000
_HELDOUT = 0.2
# How many rows only one of two versions gets right, as a rule: what a gain is seen against.
_CHURN = 0.2
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


async def advice(control: Control, name: str) -> Advice:
    """Look at what is captured, labelled and evaluated, and say what a good colleague would."""
    stores = control.stores
    route, rollout = await stores.rollouts.route(name), await stores.rollouts.get(name)
    stable = await stores.rollouts.version(f"{name}@{rollout.stable}")
    (stats,) = await stores.cases.stats(name)
    labelled = await stores.cases.newest_labelled(name, _MOST_LABELS)
    reports = await stores.reports.list(name, 1)
    engines = control.settings.engine_list()
    engine = next((each for each in engines if each.name == stable.engine), None)
    samples = await _samples(control, route)
    suite_rows = await _suite_rows(control, name)
    prompts = {prompt_digest(row.case.messages) for row in labelled if gold_text(row) is not None}
    rows = round(len(prompts) * _HELDOUT) if suite_rows is None else suite_rows
    known = Gathered(
        route=name,
        stable=stable.name,
        base=stable.base,
        samples=samples or [_of_case(row) for row in labelled],
        captured=bool(samples),
        labelled=labelled,
        agreement=stats.agreement,
        accord=accord(labelled, rollout.stable, await stores.cases.tallies(name)),
        open_cases=stats.open + stats.leased,
        adapters=engine is not None and engine.kind == "vllm",
        previous=None if rollout.previous is None else f"{name}@{rollout.previous}",
        versions=len(await stores.rollouts.versions(name)),
        suite_rows=suite_rows,
        evaluation_rows=rows,
        detectable=detectable_difference(rows, _CHURN) if rows else None,
        other_bases=sorted({each.base for each in engines if each.base != stable.base}),
        last_report=f"{reports[0].version}: {reports[0].reason}" if reports else "",
    )
    return await asyncio.to_thread(advise, known, _validator(route), control.now())


def _validator(route: Route) -> Callable[[str], bool] | None:
    if route.schema is None:
        return None
    return partial(valid, comparator=route.comparator, schema=route.schema)


async def _samples(control: Control, route: Route) -> list[Sample]:
    check = _validator(route)
    found: list[Sample] = []
    async for page in control.stores.captures.between(route.name, _BEGINNING, control.now()):
        for taken in page:
            answer = taken.exchange.answer
            checked = check(answer.text) if check is not None and answer.ok else None
            found.append(sample_of(taken.exchange, checked))
        if len(found) >= _MOST_SAMPLES:
            break
    return found[:_MOST_SAMPLES]


def _of_case(row: LabelledCase) -> Sample:
    return sample_from(row.case.messages, row.case.created_at)


async def _suite_rows(control: Control, route: str) -> int | None:
    """Of the largest suite that was registered for the route, or that it was evaluated on."""
    registered = [suite.rows for suite in await control.stores.suites.list(route)]
    used = [use.rows for use in await control.stores.datasets.suites() if use.route == route]
    return max([*registered, *used], default=None)
