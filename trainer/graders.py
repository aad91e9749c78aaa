"""Whether an answer is right."""

import json
from typing import Any

import jsonschema

from rollout.cases import same_text
from trainer.suites import SuiteRow


def grade(row: SuiteRow, answer: str) -> bool:
    """By the row's kind: JSON that satisfies the schema and equals the gold, or the same text."""
    if row.schema is not None:
        return _same_json(row.schema, row.gold, answer)
    return same_text(answer, row.gold)


def _same_json(schema: str, gold: str, answer: str) -> bool:
    try:
        given, wanted = json.loads(answer), json.loads(gold)
        jsonschema.validate(given, json.loads(schema))
    except (ValueError, jsonschema.ValidationError):
        return False
    return bool(_plain(given) == _plain(wanted))


def _plain(value: Any) -> Any:
    """Numbers that are equal are the same, and texts that differ only in case or spaces."""
    match value:
        case dict():
            return {key: _plain(each) for key, each in value.items()}
        case list():
            return [_plain(each) for each in value]
        case str():
            return " ".join(value.casefold().split())
        case bool() | None:
            return (type(value).__name__, value)
        case _:
            return value
