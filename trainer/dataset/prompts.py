"""What a prompt is: its messages as text, the digest that names it, what tells it from others."""

import hashlib
import json
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rollout.cases import normalise, prompt_digest
from rollout.datasets import Message

_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
_KEPT: Final = ("tool_call_id", "name", "weight")
_GUIDES: Final = frozenset({"system", "developer"})
# Words count as an instruction where most prompts, of at least a few, begin with them; or where so
# long a text begins a good part of them, of many: there may be several instructions.
_MOST: Final = 0.8
_FEW: Final = 3
_PART: Final = 0.1
_MANY: Final = 30
_LONG: Final = 6


def flat(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...] | None:
    """Role, text and tool calls of each message; None where there is something else in one."""
    done: list[Message] = []
    for message in messages:
        role, content = message.get("role"), _text(message.get("content"))
        calls = message.get("tool_calls")
        if role not in _ROLES or (content is None and not calls):
            return None
        made: dict[str, Any] = {"role": role, "content": content or ""}
        if calls:
            made["tool_calls"] = list(calls)
        made |= {name: message[name] for name in _KEPT if message.get(name) is not None}
        done.append(made)
    return tuple(done) or None


def _text(content: object) -> str | None:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        texts = [part for part in parts if isinstance(part, str)]
        return "\n".join(texts) if len(texts) == len(content) else None
    return None


def digest_of(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """Equal for prompts that differ in case, white space and the way letters are written only.

    Raises UnicodeEncodeError for text that no file can hold.
    """
    plain = [{**each, "content": unified(each["content"])} for each in messages]
    digest = prompt_digest(plain)
    calls = [each["tool_calls"] for each in messages if "tool_calls" in each]
    if not calls and not tools:
        return digest
    more = json.dumps([calls, list(tools)], sort_keys=True)
    return hashlib.sha256(f"{digest}{more}".encode()).hexdigest()


def unified(text: str) -> str:
    """One way to write each letter, as é is one letter or two, and nothing that is not seen."""
    if text.isascii():
        return text
    composed = unicodedata.normalize("NFKC", text)
    return "".join(letter for letter in composed if unicodedata.category(letter) != "Cf")


def whole_text(messages: Sequence[Message]) -> str:
    return normalise(unified(" ".join(_said(message) for message in messages)))


def asked_text(messages: Sequence[Message]) -> str:
    """What the user says in it, without instructions."""
    return whole_text([each for each in messages if each["role"] == "user"])


def _said(message: Message) -> str:
    calls = message.get("tool_calls")
    return f"{message['content']} {json.dumps(calls)}" if calls else str(message["content"])


def without_instructions(prompts: Sequence[Sequence[Message]]) -> list[str]:
    """Each prompt's text, without a system message that comes with several other questions too.

    One that comes with a single question may hold what it is about.
    """
    systems = [whole_text([each for each in one if each["role"] in _GUIDES]) for one in prompts]
    rests = [whole_text([each for each in one if each["role"] not in _GUIDES]) for one in prompts]
    questions: dict[str, set[str]] = defaultdict(set)
    for system, rest in zip(systems, rests, strict=True):
        if len(questions[system]) < _FEW:
            questions[system].add(rest)
    return [
        rest if len(questions[system]) >= _FEW else f"{system} {rest}".strip()
        for system, rest in zip(systems, rests, strict=True)
    ]


def distinguishing(texts: Sequence[str]) -> list[str]:
    """What tells texts apart: their words without those that many of them begin or end with.

    Instructions that come with every request would make any two of them look alike.
    """
    words = [text.split() for text in texts]
    rest = [each[cut:] for each, cut in zip(words, _shared_starts(words), strict=True)]
    ends = _shared_starts([each[::-1] for each in rest])
    return [" ".join(each[: len(each) - cut]) for each, cut in zip(rest, ends, strict=True)]


def _shared_starts(texts: Sequence[Sequence[str]]) -> list[int]:
    """For each text, how many of its first words are an instruction."""
    shared = [0] * len(texts)
    if len(texts) < _FEW:
        return shared
    groups = [(list(range(len(texts))), 0)]
    while groups:
        members, place = groups.pop()
        by_word: dict[str, list[int]] = defaultdict(list)
        for index in members:
            if len(texts[index]) > place:
                by_word[texts[index][place]].append(index)
        for same in by_word.values():
            most = len(same) >= _MOST * len(texts)
            if most or len(same) >= max(_MANY, _PART * len(texts)):
                groups.append((same, place + 1))
                if most or place + 1 >= _LONG:
                    for index in same:
                        shared[index] = place + 1
    return shared
