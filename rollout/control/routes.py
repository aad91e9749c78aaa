"""Creating a route, and changing how it is compared and judged."""

import json

from rollout.control.context import Control
from rollout.credentials import ApiKey
from rollout.errors import InvalidInputError
from rollout.policy import policy_problems, servable_gates
from rollout.routes import Route, named_engines, route_problems
from rollout.versions import check_route_name


async def put(control: Control, caller: ApiKey, route: Route, reason: str) -> bool:
    """Whether the route is new. Raises InvalidInputError with the field at fault."""
    check_route_name(route.name)
    _check_schema(route.schema)
    for field, problem in policy_problems(route.policy, servable_gates(route.slo, route.schema)):
        raise InvalidInputError(problem, param=f"policy.{field}")
    for field, problem in route_problems(route):
        raise InvalidInputError(problem, param=field)
    engines = {engine.name: engine for engine in control.settings.engine_list()}
    for field, engine in named_engines(route):
        if engine not in engines:
            raise InvalidInputError(
                f"there is no engine {engine!r}: the configuration has "
                f"{', '.join(sorted(engines)) or 'none'}",
                param=field,
            )
    return await control.stores.rollouts.put_route(
        route,
        by=caller.name,
        at=control.now(),
        reason=reason,
        base=engines[route.engine].base,
        base_revision=engines[route.engine].base_revision,
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
