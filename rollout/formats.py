"""Rows of datasets as other programs write and read them: OpenAI's, TRL's and Axolotl's JSONL."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import msgspec

from rollout.datasets import Dataset, Example, Message, Split, Unanswered
from rollout.errors import InvalidInputError

Format = Literal[
    "rows",
    "openai-chat",
    "openai-preference",
    "trl-messages",
    "trl-prompt-completion",
    "trl-preference",
    "trl-unpaired",
    "axolotl-conversations",
    "axolotl-alpaca",
    "axolotl-preference",
]
FORMATS: Final[tuple[Format, ...]] = get_args(Format)
# `rows` is our own, and comes with splits that an import would not keep.
IMPORTED: Final[tuple[Format, ...]] = tuple(name for name in FORMATS if name != "rows")

_MAXIMUM_LINE: Final = 4 * 2**20
_DEEPEST: Final = 64
_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")
_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
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
        except _LineError as exc:
            raise _broken(number, exc.reason) from exc
        made = _row(read, route, by, seen)
        (rows if isinstance(made, Example) else unanswered).append(made)  # type: ignore[arg-type]
    if name is None or not (rows or unanswered):
        raise InvalidInputError("the file holds no rows; nothing was imported")
    return Imported(name, tuple(rows), tuple(unanswered))


def write_rows(dataset: Dataset, name: Format, split: Split | None = None) -> Iterator[bytes]:
    """The dataset's lines in a format; rows that it has no words for are left out."""
    if name == "rows" and split is None:
        yield dataset.content
        return
    rows: list[_Row] = [*dataset.rows, *dataset.unanswered]
    for row in rows:
        if split in (None, row.split):
            for values in _WRITERS[name](row):
                yield _encoder.encode(values) + b"\n"


class _LineError(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _broken(number: int, reason: str) -> InvalidInputError:
    return InvalidInputError(
        f"line {number}: {reason}; nothing was imported", param=f"line {number}"
    )


# From lines to rows


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
        raise _LineError(
            f"it is {len(line) / 2**20:.1f} MiB long: a row has at most "
            f"{_MAXIMUM_LINE // 2**20} MiB"
        )
    if b"\0" in line:
        raise _LineError("it holds a NUL byte: is this a text file?")
    try:
        values = _decoder.decode(line)
    except RecursionError as exc:
        raise _LineError("it is nested too deeply") from exc
    except UnicodeDecodeError as exc:
        raise _LineError(f"it is no UTF-8 at byte {exc.start + 1}") from exc
    except msgspec.DecodeError as exc:
        raise _LineError(_why_no_json(line, str(exc))) from exc
    if not isinstance(values, dict):
        raise _LineError("it is no JSON object")
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
        raise _LineError(f"it is nested more than {_DEEPEST} deep")
    if isinstance(value, str):
        if "\0" in value:
            raise _LineError("a text in it holds a NUL character")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as exc:
                raise _LineError("a text in it holds half of a surrogate pair") from exc
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
    raise _LineError(
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
    messages = _messages(_get(values, "messages"), "messages")
    return _ending(messages, "messages", _tools(values))


def _ending(
    messages: tuple[Message, ...], where: str, tools: tuple[Mapping[str, Any], ...]
) -> _Read:
    """A conversation whose last message is the answer to learn."""
    last = messages[-1]
    if last["role"] != "assistant":
        raise _LineError(f"{where}: the last message is the {last['role']}'s, not the assistant's")
    if last.get("weight") == 0:
        raise _LineError(f"{where}: the last answer has the weight 0, so nothing would be learnt")
    return _Read(_prompt(messages[:-1], where), last, (), tools)


def _read_openai_preference(values: Mapping[str, Any]) -> _Read:
    given = _get(values, "input")
    if not isinstance(given, dict):
        raise _LineError("input: it is no object with messages")
    prompt = _prompt(_messages(_get(given, "messages"), "input.messages"), "input.messages")
    chosen = _answer(_get(values, "preferred_output"), "preferred_output")
    rejected = _answer(_get(values, "non_preferred_output"), "non_preferred_output")
    return _Read(prompt, chosen, _refused(rejected, "non_preferred_output"), _tools(given))


def _read_trl_completion(values: Mapping[str, Any]) -> _Read:
    prompt = _either_prompt(_get(values, "prompt"), "prompt")
    gold = _answer(_get(values, "completion"), "completion")
    return _Read(prompt, gold, (), _tools(values))


def _read_trl_preference(values: Mapping[str, Any]) -> _Read:
    prompt = _either_prompt(_get(values, "prompt"), "prompt")
    chosen = _answer(_get(values, "chosen"), "chosen")
    rejected = _answer(_get(values, "rejected"), "rejected")
    return _Read(prompt, chosen, _refused(rejected, "rejected"), _tools(values))


def _read_trl_unpaired(values: Mapping[str, Any]) -> _Read:
    prompt = _either_prompt(_get(values, "prompt"), "prompt")
    answer = _answer(_get(values, "completion"), "completion")
    label = _get(values, "label")
    if not isinstance(label, bool):
        raise _LineError("label: it is neither true nor false")
    if label:
        return _Read(prompt, answer, (), _tools(values))
    return _Read(prompt, None, _refused(answer, "completion"), _tools(values))


def _read_conversations(values: Mapping[str, Any]) -> _Read:
    given = _get(values, "conversations")
    if not isinstance(given, list):
        raise _LineError("conversations: it is no list of turns")
    turns = [_turn(each, f"conversations[{place}]") for place, each in enumerate(given)]
    return _ending(_messages(turns, "conversations"), "conversations", _tools(values))


def _turn(given: object, where: str) -> object:
    if not isinstance(given, dict):
        raise _LineError(f"{where}: it is no object with from and value")
    speaker = given.get("from", given.get("role"))
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise _LineError(f"{where}.from: {_shown(speaker)} is none of {', '.join(_SPEAKERS)}")
    return {"role": _SPEAKERS[speaker], "content": given.get("value", given.get("content"))}


def _read_alpaca(values: Mapping[str, Any]) -> _Read:
    instruction = _text(_get(values, "instruction"), "instruction")
    more = values.get("input")
    if more is not None and not isinstance(more, str):
        raise _LineError("input: it is no text")
    messages: list[object] = []
    if (system := values.get("system")) is not None:
        messages.append({"role": "system", "content": _text(system, "system")})
    content = f"{instruction}\n\n{more}" if more else instruction
    messages.append({"role": "user", "content": content})
    gold = _answer(_get(values, "output"), "output")
    return _Read(_prompt(_messages(messages, "instruction"), "instruction"), gold)


def _read_axolotl_preference(values: Mapping[str, Any]) -> _Read:
    prompt = _prompt(_messages(_get(values, "messages"), "messages"), "messages")
    chosen = _answer(_get(values, "chosen"), "chosen")
    rejected = _answer(_get(values, "rejected"), "rejected")
    return _Read(prompt, chosen, _refused(rejected, "rejected"), _tools(values))


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


def _get(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise _LineError(f"{name}: it is missing")
    return values[name]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _LineError(f"{where}: {_shown(value)} is no text")
    return value


def _either_prompt(value: object, where: str) -> tuple[Message, ...]:
    """A conversation, or a text that a user says."""
    if isinstance(value, str):
        return ({"role": "user", "content": _text(value, where)},)
    return _prompt(_messages(value, where), where)


def _prompt(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    if not any(each["role"] == "user" for each in messages):
        raise _LineError(f"{where}: nobody asks anything, for no message is a user's")
    if messages[-1]["role"] == "assistant":
        raise _LineError(f"{where}: the last message before the answer is the assistant's")
    return messages


def _answer(value: object, where: str) -> Message:
    """The assistant's one message, or its text."""
    if isinstance(value, str):
        return {"role": "assistant", "content": _text(value, where)}
    given = value if isinstance(value, list) else [value]
    messages = _messages(given, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise _LineError(f"{where}: it must be one message of the assistant's")
    return messages[0]


def _refused(answer: Message, where: str) -> tuple[str, ...]:
    if not str(answer["content"]).strip():
        raise _LineError(f"{where}: a refused answer must have a text")
    return (str(answer["content"]),)


def _messages(value: object, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _LineError(f"{where}: {_shown(value)} is no list of messages")
    if not value:
        raise _LineError(f"{where}: there is no message in it")
    return tuple(_message(each, f"{where}[{place}]") for place, each in enumerate(value))


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise _LineError(f"{where}: {_shown(value)} is no message")
    role = value.get("role")
    if role not in _ROLES:
        raise _LineError(f"{where}.role: {_shown(role)} is no role; there are {', '.join(_ROLES)}")
    made: dict[str, Any] = {"role": role, "content": _content(value.get("content"), where)}
    if calls := value.get("tool_calls"):
        if role != "assistant":
            raise _LineError(f"{where}.tool_calls: only the assistant calls tools")
        made["tool_calls"] = _calls(calls, where)
    if role == "assistant" and not made["content"].strip() and not calls:
        raise _LineError(f"{where}: the assistant says nothing")
    for name in ("name", "tool_call_id"):
        if (given := value.get(name)) is not None:
            made[name] = _text(given, f"{where}.{name}")
    if (weight := value.get("weight")) is not None:
        if isinstance(weight, bool) or weight not in (0, 1) or role != "assistant":
            raise _LineError(f"{where}.weight: an assistant's message may have the weight 0 or 1")
        made["weight"] = int(weight)
    return made


def _content(value: object, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _LineError(f"{where}.content: {_shown(value)} is no text")
    texts: list[str] = []
    for place, part in enumerate(value):
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise _LineError(f"{where}.content[{place}]: only parts of text can be trained on")
        texts.append(text)
    return "\n".join(texts)


def _calls(value: object, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list):
        raise _LineError(f"{where}.tool_calls: {_shown(value)} is no list")
    for place, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _LineError(f"{where}.tool_calls[{place}]: it has no function with a name")
    return value


def _tools(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = values.get("tools")
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(each, dict) for each in tools):
        raise _LineError("tools: it is no list of tools")
    return tuple(tools)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


# From rows to lines

_Row = Example | Unanswered
_Values = Mapping[str, Any]


def _with_tools(values: _Values, row: _Row) -> _Values:
    return {**values, "tools": list(row.tools)} if row.tools else values


def _pairs(row: _Row) -> Iterator[tuple[Example, Message, Message]]:
    if isinstance(row, Example) and row.gold and not row.calls:
        for rejected in row.rejected:
            yield row, row.answer, {"role": "assistant", "content": rejected}


def _write_own(row: _Row) -> Iterator[_Values]:
    values: dict[str, Any] = msgspec.to_builtins(row)
    yield values


def _write_chat(row: _Row) -> Iterator[_Values]:
    if isinstance(row, Example):
        yield _with_tools({"messages": [*row.messages, row.answer]}, row)


def _write_openai_preference(row: _Row) -> Iterator[_Values]:
    for each, chosen, rejected in _pairs(row):
        yield {
            "input": _with_tools({"messages": list(each.messages)}, row),
            "preferred_output": [chosen],
            "non_preferred_output": [rejected],
        }


def _write_trl_completion(row: _Row) -> Iterator[_Values]:
    if isinstance(row, Example):
        yield _with_tools({"prompt": list(row.messages), "completion": [row.answer]}, row)


def _write_trl_preference(row: _Row) -> Iterator[_Values]:
    for each, chosen, rejected in _pairs(row):
        values = {"prompt": list(each.messages), "chosen": [chosen], "rejected": [rejected]}
        yield _with_tools(values, row)


def _write_trl_unpaired(row: _Row) -> Iterator[_Values]:
    right: list[Message] = []
    if isinstance(row, Example):
        others = [{"role": "assistant", "content": text} for text in row.accepted]
        right = [row.answer, *others]
    wrong = [{"role": "assistant", "content": text} for text in row.rejected]
    for answers, label in ((right, True), (wrong, False)):
        for answer in answers:
            values = {"prompt": list(row.messages), "completion": [answer], "label": label}
            yield _with_tools(values, row)


def _write_conversations(row: _Row) -> Iterator[_Values]:
    names = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
    if isinstance(row, Example) and not row.tools and not row.calls:
        messages = [*row.messages, row.answer]
        if all(each["role"] in names and "tool_calls" not in each for each in messages):
            turns = [{"from": names[each["role"]], "value": each["content"]} for each in messages]
            yield {"conversations": turns}


def _write_alpaca(row: _Row) -> Iterator[_Values]:
    roles = tuple(each["role"] for each in row.messages)
    if not isinstance(row, Example) or row.tools or row.calls:
        return
    if roles in (("user",), ("system", "user")):
        values = {"instruction": row.messages[-1]["content"], "input": "", "output": row.gold}
        yield {**values, "system": row.messages[0]["content"]} if len(roles) == 2 else values


def _write_axolotl_preference(row: _Row) -> Iterator[_Values]:
    for each, chosen, rejected in _pairs(row):
        values = {"messages": list(each.messages), "chosen": chosen, "rejected": rejected}
        yield _with_tools(values, row)


_WRITERS: Final[Mapping[Format, Callable[[_Row], Iterator[_Values]]]] = {
    "rows": _write_own,
    "openai-chat": _write_chat,
    "openai-preference": _write_openai_preference,
    "trl-messages": _write_chat,
    "trl-prompt-completion": _write_trl_completion,
    "trl-preference": _write_trl_preference,
    "trl-unpaired": _write_trl_unpaired,
    "axolotl-conversations": _write_conversations,
    "axolotl-alpaca": _write_alpaca,
    "axolotl-preference": _write_axolotl_preference,
}
