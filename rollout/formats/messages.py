"""The messages of a line, checked: each fault says in which place it stands."""

from collections.abc import Mapping
from typing import Any, Final

from rollout.datasets import Message

_ROLES: Final = ("system", "developer", "user", "assistant", "tool")


class LineError(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def field(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise LineError(f"{name}: it is missing")
    return values[name]


def as_text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise LineError(f"{where}: {shown(value)} is no text")
    return value


def as_asked(value: object, where: str) -> tuple[Message, ...]:
    """A conversation, or a text that a user says."""
    if isinstance(value, str):
        return ({"role": "user", "content": as_text(value, where)},)
    return as_prompt(as_messages(value, where), where)


def as_prompt(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    if not any(each["role"] == "user" for each in messages):
        raise LineError(f"{where}: nobody asks anything, for no message is a user's")
    if messages[-1]["role"] == "assistant":
        raise LineError(f"{where}: the last message before the answer is the assistant's")
    return messages


def as_answer(value: object, where: str) -> Message:
    """The assistant's one message, or its text."""
    if isinstance(value, str):
        return {"role": "assistant", "content": as_text(value, where)}
    given = value if isinstance(value, list) else [value]
    messages = as_messages(given, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise LineError(f"{where}: it must be one message of the assistant's")
    return messages[0]


def as_refused(answer: Message, where: str) -> tuple[str, ...]:
    if not str(answer["content"]).strip():
        raise LineError(f"{where}: a refused answer must have a text")
    return (str(answer["content"]),)


def as_messages(value: object, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise LineError(f"{where}: {shown(value)} is no list of messages")
    if not value:
        raise LineError(f"{where}: there is no message in it")
    return tuple(_message(each, f"{where}[{place}]") for place, each in enumerate(value))


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise LineError(f"{where}: {shown(value)} is no message")
    role = value.get("role")
    if role not in _ROLES:
        raise LineError(f"{where}.role: {shown(role)} is no role; there are {', '.join(_ROLES)}")
    made: dict[str, Any] = {"role": role, "content": _content(value.get("content"), where)}
    if calls := value.get("tool_calls"):
        if role != "assistant":
            raise LineError(f"{where}.tool_calls: only the assistant calls tools")
        made["tool_calls"] = _calls(calls, where)
    if role == "assistant" and not made["content"].strip() and not calls:
        raise LineError(f"{where}: the assistant says nothing")
    for name in ("name", "tool_call_id"):
        if (given := value.get(name)) is not None:
            made[name] = as_text(given, f"{where}.{name}")
    if (weight := value.get("weight")) is not None:
        if isinstance(weight, bool) or weight not in (0, 1) or role != "assistant":
            raise LineError(f"{where}.weight: an assistant's message may have the weight 0 or 1")
        made["weight"] = int(weight)
    return made


def _content(value: object, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise LineError(f"{where}.content: {shown(value)} is no text")
    texts: list[str] = []
    for place, part in enumerate(value):
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise LineError(f"{where}.content[{place}]: only parts of text can be trained on")
        texts.append(text)
    return "\n".join(texts)


def _calls(value: object, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list):
        raise LineError(f"{where}.tool_calls: {shown(value)} is no list")
    for place, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise LineError(f"{where}.tool_calls[{place}]: it has no function with a name")
    return value


def as_tools(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = values.get("tools")
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(each, dict) for each in tools):
        raise LineError("tools: it is no list of tools")
    return tuple(tools)


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
