"""How a route's judge does: beside itself with the answers changed round, and beside people."""

from rollout.agreement.judging import record
from rollout.cases import outcome
from rollout.control.context import Control
from rollout.control.views import JudgeView

# As many cases as a route keeps by default.
_MOST = 10_000


async def judge(control: Control, route: str) -> JudgeView:
    """Of all cases with a verdict: how often it contradicted itself, how often people agreed."""
    named = (await control.stores.rollouts.route(route)).judge
    cases = [case for case, _ in await control.stores.cases.list(route, None, _MOST)]
    labelled = await control.stores.cases.labelled(route)
    found = record(
        [case.judgement for case in cases if case.judgement is not None],
        [
            (row.case.judgement, outcome(row.case, row.label))
            for row in labelled
            if row.case.judgement is not None
        ],
    )
    return JudgeView(route, named, found, found.position_bias)
