"""Creating a route, and changing how it is compared and judged."""

import json
from collections.abc import Iterator

from rollout.control.context import Control
from rollout.credentials import ApiKey
from rollout.errors import InvalidInputError
from rollout.policy import Policy
from rollout.routes import Route
from rollout.versions import check_route_name


async def put(control: Control, caller: ApiKey, route: Route, reason: str) -> bool:
    """Whether the route is new. Raises InvalidInputError with the field at fault."""
    check_route_name(route.name)
    _check_schema(route.schema)
    for problem, param in _policy_problems(route.policy):
        raise InvalidInputError(problem, param=param)
    engines = {engine.name: engine for engine in control.settings.engine_list()}
    if route.engine not in engines:
        raise InvalidInputError(
            f"there is no engine {route.engine!r}: the configuration has "
            f"{', '.join(sorted(engines)) or 'none'}",
            param="engine",
        )
    return await control.stores.rollouts.put_route(
        route,
        by=caller.name,
        at=control.now(),
        reason=reason,
        base=engines[route.engine].base,
    )


def _check_schema(text: str | None) -> None:
    if text is None:
        return
    try:
        schema = json.loads(text)
    except ValueError as exc:
        raise InvalidInputError(f"the schema is no JSON: {exc}", param="schema") from exc
    if not isinstance(schema, dict | bool):
        raise InvalidInputError("the schema is no JSON schema: give an object", param="schema")


def _policy_problems(policy: Policy) -> Iterator[tuple[str, str]]:
    if not 0 < policy.alpha < 1:
        yield f"alpha is {policy.alpha:g}: it must lie between 0 and 1", "policy.alpha"
    if not 0 < policy.margin < 0.5:
        yield f"margin is {policy.margin:g}: it must lie between 0 and 0.5", "policy.margin"
    steps = policy.steps
    if not steps or any(not 0 < step <= 100 for step in steps) or list(steps) != sorted(set(steps)):
        yield "steps must be rising percentages, as in [1, 10, 50]", "policy.steps"
    for name in ("disagreement_sample", "agreement_sample"):
        if not 0 <= getattr(policy, name) <= 1:
            yield f"{name} is a chance: it must lie in [0, 1]", f"policy.{name}"
    for name in ("minimum_pairs", "maximum_cases", "soak_seconds", "time_limit_seconds"):
        if getattr(policy, name) < 0:
            yield f"{name} must not be negative", f"policy.{name}"
