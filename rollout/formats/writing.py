"""Lines for other programs from the rows of a dataset."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec

from rollout.datasets import Dataset, Example, Message, Split, Unanswered
from rollout.formats.names import Format

_encoder = msgspec.json.Encoder(order="sorted")
_Row = Example | Unanswered
_Values = Mapping[str, Any]


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
