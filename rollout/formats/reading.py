"""Rows from the lines of other programs' files."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from rollout.datasets import Example, Message, Unanswered
from rollout.errors import InvalidInputError
from rollout.formats.messages import (
    LineError,
    as_answer,
    as_asked,
    as_messages,
    as_prompt,
    as_refused,
    as_text,
    as_tools,
    field,
    shown,
)
from rollout.formats.names import IMPORTED, Format

_MAXIMUM_LINE: Final = 4 * 2**20
_DEEPEST: Final = 64
_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")
_SPEAKERS: Final[Mapping[str, str]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
}
_encoder = msgspec.json.Encoder(order="sorted")
_decoder = msgspec.json.Decoder()


@dataclass(frozen=True, slots=True)
class Imported:
    """Rows of a file, each under an id made of its bytes; their splits mean nothing yet."""

    format: Format
    rows: tuple[Example, ...]
    unanswered: tuple[Unanswered, ...]


def read_rows(content: bytes, route: str, name: Format | None = None, by: str = "") -> Imported:
    """Read a file's lines; `name` None takes the format from its first line.

    Raises InvalidInputError with the number of the first line that is none of this format.
    """
    if content.startswith(_BOMS):
        raise _broken(1, "the file is UTF-16: save it as UTF-8")
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    seen: Counter[str] = Counter()
    rows: list[Example] = []
    unanswered: list[Unanswered] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = _values(line)
            name = name or _detect(values)
            read = _READERS[name](values)
        except LineError as exc:
            raise _broken(number, exc.reason) from exc
        made = _row(read, route, by, seen)
        (rows if isinstance(made, Example) else unanswered).append(made)  # type: ignore[arg-type]
    if name is None or not (rows or unanswered):
        raise InvalidInputError("the file holds no rows; nothing was imported")
    return Imported(name, tuple(rows), tuple(unanswered))


def _broken(number: int, reason: str) -> InvalidInputError:
    return InvalidInputError(
        f"line {number}: {reason}; nothing was imported", param=f"line {number}"
    )


@dataclass(frozen=True, slots=True)
class _Read:
    """`gold` None: `rejected` are answers that are not right, and nobody said what is."""

    messages: tuple[Message, ...]
    gold: Message | None
    rejected: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


def _row(read: _Read, route: str, by: str, seen: Counter[str]) -> Example | Unanswered:
    said = [route, read.messages, read.gold, read.rejected, read.tools]
    digest = hashlib.sha256(_encoder.encode(said)).hexdigest()[:24]
    seen[digest] += 1
    # The same line again is another row, which the dataset's rules drop and count.
    again = f"-{seen[digest]}" if seen[digest] > 1 else ""
    case = f"import-{digest}{again}"
    if read.gold is None:
        return Unanswered(case, read.messages, read.rejected, 1.0, "", "train", read.tools)
    return Example(
        case=case,
        messages=read.messages,
        gold=str(read.gold["content"]),
        labeler=by,
        choice="first",
        inclusion=1.0,
        cluster="",
        split="train",
        calls=tuple(read.gold.get("tool_calls", ())),
        tools=read.tools,
        rejected=read.rejected,
    )


def _values(line: bytes) -> Mapping[str, Any]:
    if len(line) > _MAXIMUM_LINE:
        raise LineError(
            f"it is {len(line) / 2**20:.1f} MiB long: a row has at most "
            f"{_MAXIMUM_LINE // 2**20} MiB"
        )
    if b"\0" in line:
        raise LineError("it holds a NUL byte: is this a text file?")
    try:
        values = _decoder.decode(line)
    except RecursionError as exc:
        raise LineError("it is nested too deeply") from exc
    except UnicodeDecodeError as exc:
        raise LineError(f"it is no UTF-8 at byte {exc.start + 1}") from exc
    except msgspec.DecodeError as exc:
        raise LineError(_why_no_json(line, str(exc))) from exc
    if not isinstance(values, dict):
        raise LineError("it is no JSON object")
    _check_strings(values, 0)
    return values


def _why_no_json(line: bytes, said: str) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as exc:
        return f"it is no UTF-8 at byte {exc.start + 1}"
    return f"it is no JSON ({said})"


def _check_strings(value: object, depth: int) -> None:
    """No text that can't be written, nothing nested beyond reason."""
    if depth > _DEEPEST:
        raise LineError(f"it is nested more than {_DEEPEST} deep")
    if isinstance(value, str):
        if "\0" in value:
            raise LineError("a text in it holds a NUL character")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as exc:
                raise LineError("a text in it holds half of a surrogate pair") from exc
    elif isinstance(value, dict):
        for name, each in value.items():
            _check_strings(name, depth)
            _check_strings(each, depth + 1)
    elif isinstance(value, list):
        for each in value:
            _check_strings(each, depth + 1)


def _detect(values: Mapping[str, Any]) -> Format:
    for name, needed in _NEEDED.items():
        if needed <= values.keys():
            return name
    raise LineError(
        f"it has the keys {', '.join(sorted(values)[:8]) or 'of nothing'}, which no known format "
        f"has; there are {', '.join(IMPORTED)}"
    )


_NEEDED: Final[Mapping[Format, frozenset[str]]] = {
    "openai-preference": frozenset({"input", "preferred_output", "non_preferred_output"}),
    "axolotl-preference": frozenset({"messages", "chosen", "rejected"}),
    "openai-chat": frozenset({"messages"}),
    "trl-preference": frozenset({"prompt", "chosen", "rejected"}),
    "trl-unpaired": frozenset({"prompt", "completion", "label"}),
    "trl-prompt-completion": frozenset({"prompt", "completion"}),
    "axolotl-conversations": frozenset({"conversations"}),
    "axolotl-alpaca": frozenset({"instruction", "output"}),
}


def _read_chat(values: Mapping[str, Any]) -> _Read:
    messages = as_messages(field(values, "messages"), "messages")
    return _ending(messages, "messages", as_tools(values))


def _ending(
    messages: tuple[Message, ...], where: str, tools: tuple[Mapping[str, Any], ...]
) -> _Read:
    """A conversation whose last message is the answer to learn."""
    last = messages[-1]
    if last["role"] != "assistant":
        raise LineError(f"{where}: the last message is the {last['role']}'s, not the assistant's")
    if last.get("weight") == 0:
        raise LineError(f"{where}: the last answer has the weight 0, so nothing would be learnt")
    return _Read(as_prompt(messages[:-1], where), last, (), tools)


def _read_openai_preference(values: Mapping[str, Any]) -> _Read:
    given = field(values, "input")
    if not isinstance(given, dict):
        raise LineError("input: it is no object with messages")
    prompt = as_prompt(as_messages(field(given, "messages"), "input.messages"), "input.messages")
    chosen = as_answer(field(values, "preferred_output"), "preferred_output")
    rejected = as_answer(field(values, "non_preferred_output"), "non_preferred_output")
    return _Read(prompt, chosen, as_refused(rejected, "non_preferred_output"), as_tools(given))


def _read_trl_completion(values: Mapping[str, Any]) -> _Read:
    prompt = as_asked(field(values, "prompt"), "prompt")
    gold = as_answer(field(values, "completion"), "completion")
    return _Read(prompt, gold, (), as_tools(values))


def _read_trl_preference(values: Mapping[str, Any]) -> _Read:
    prompt = as_asked(field(values, "prompt"), "prompt")
    chosen = as_answer(field(values, "chosen"), "chosen")
    rejected = as_answer(field(values, "rejected"), "rejected")
    return _Read(prompt, chosen, as_refused(rejected, "rejected"), as_tools(values))


def _read_trl_unpaired(values: Mapping[str, Any]) -> _Read:
    prompt = as_asked(field(values, "prompt"), "prompt")
    answer = as_answer(field(values, "completion"), "completion")
    label = field(values, "label")
    if not isinstance(label, bool):
        raise LineError("label: it is neither true nor false")
    if label:
        return _Read(prompt, answer, (), as_tools(values))
    return _Read(prompt, None, as_refused(answer, "completion"), as_tools(values))


def _read_conversations(values: Mapping[str, Any]) -> _Read:
    given = field(values, "conversations")
    if not isinstance(given, list):
        raise LineError("conversations: it is no list of turns")
    turns = [_turn(each, f"conversations[{place}]") for place, each in enumerate(given)]
    return _ending(as_messages(turns, "conversations"), "conversations", as_tools(values))


def _turn(given: object, where: str) -> object:
    if not isinstance(given, dict):
        raise LineError(f"{where}: it is no object with from and value")
    speaker = given.get("from", given.get("role"))
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise LineError(f"{where}.from: {shown(speaker)} is none of {', '.join(_SPEAKERS)}")
    return {"role": _SPEAKERS[speaker], "content": given.get("value", given.get("content"))}


def _read_alpaca(values: Mapping[str, Any]) -> _Read:
    instruction = as_text(field(values, "instruction"), "instruction")
    more = values.get("input")
    if more is not None and not isinstance(more, str):
        raise LineError("input: it is no text")
    messages: list[object] = []
    if (system := values.get("system")) is not None:
        messages.append({"role": "system", "content": as_text(system, "system")})
    content = f"{instruction}\n\n{more}" if more else instruction
    messages.append({"role": "user", "content": content})
    gold = as_answer(field(values, "output"), "output")
    return _Read(as_prompt(as_messages(messages, "instruction"), "instruction"), gold)


def _read_axolotl_preference(values: Mapping[str, Any]) -> _Read:
    prompt = as_prompt(as_messages(field(values, "messages"), "messages"), "messages")
    chosen = as_answer(field(values, "chosen"), "chosen")
    rejected = as_answer(field(values, "rejected"), "rejected")
    return _Read(prompt, chosen, as_refused(rejected, "rejected"), as_tools(values))


_READERS: Final[Mapping[Format, Callable[[Mapping[str, Any]], _Read]]] = {
    "openai-chat": _read_chat,
    "openai-preference": _read_openai_preference,
    "trl-messages": _read_chat,
    "trl-prompt-completion": _read_trl_completion,
    "trl-preference": _read_trl_preference,
    "trl-unpaired": _read_trl_unpaired,
    "axolotl-conversations": _read_conversations,
    "axolotl-alpaca": _read_alpaca,
    "axolotl-preference": _read_axolotl_preference,
}
