"""What an answer says: the key that all ways to say it share, and the way in which it is learnt."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from rollout.cases import normalise
from trainer.dataset.prompts import unified


def answer_key(text: str, calls: Sequence[Mapping[str, Any]] = ()) -> str:
    """Equal for answers that say the same: case and white space, and the order in JSON, aside."""
    key = _json_key(text) if text.lstrip()[:1] in ("{", "[") else None
    key = normalise(unified(text)) if key is None else key
    return f"{key}\x1f{json.dumps([_function(call) for call in calls])}" if calls else key


def compact(text: str) -> str:
    """JSON without the white space around its values, all else as it was written.

    An engine that holds answers to a schema allows none of it, so a version that has learnt it
    loses its way there. What is no JSON comes back as it is.
    """
    try:
        return msgspec.json.format(text, indent=-1)
    except (msgspec.DecodeError, RecursionError):
        return text


def _json_key(text: str) -> str | None:
    try:
        return normalise(unified(json.dumps(json.loads(text), sort_keys=True)))
    except (ValueError, RecursionError):
        return None


def _function(call: Mapping[str, Any]) -> Any:
    # Each call's id is another.
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        return str(function)
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, sort_keys=True)
    return [function.get("name"), _json_key(text) or text]
