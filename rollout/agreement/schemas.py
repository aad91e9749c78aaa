"""Whether an answer satisfies its route's JSON schema, without fetching anything."""

import functools
import json

from jsonschema import SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing.exceptions import Unresolvable
from referencing.jsonschema import EMPTY_REGISTRY

from rollout.agreement.fields import NoJson, parse
from rollout.routes import Comparator


def valid(text: str, comparator: Comparator, schema: str | None) -> bool:
    """A text that is no JSON is checked as a string, unless the comparator is "json"."""
    value = parse(text)
    if isinstance(value, NoJson):
        if comparator == "json":
            return False
        value = text
    if schema is None:
        return True
    validator = _validator(schema)
    try:
        return validator is None or validator.is_valid(value)
    except Unresolvable:
        return True


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Validator | None:
    """None for a schema that is none itself: nobody's answer is at fault for that.

    With a registry given, a `$ref` to somewhere else is never fetched.
    """
    try:
        document = json.loads(schema)
        kind = validator_for(document)
        kind.check_schema(document)
    except (ValueError, SchemaError):
        return None
    return kind(document, registry=EMPTY_REGISTRY)
