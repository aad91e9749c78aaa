"""A dataset: rows made from labels, immutable, named by the sha256 of its lines."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import msgspec

from rollout.cases import Choice
from rollout.errors import InvalidInputError

Split = Literal["train", "validation", "heldout"]
Message = Mapping[str, Any]

_encoder = msgspec.json.Encoder(order="sorted")


@dataclass(frozen=True, slots=True)
class Vote:
    """One label of a row's prompt. `agrees`: it gave the answer that the row holds.

    `inclusion` is the probability with which its case was put before a person.
    """

    case: str
    labeler: str
    choice: Choice
    inclusion: float
    agrees: bool = True
    at: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One row: what was asked, the right answer, and where both came from.

    `messages` hold `role` and `content`, and where tools are used `tool_calls`, `tool_call_id` and
    `name`; the assistant's may hold a `weight` of 0 or 1. The right answer is `gold` and the tool
    `calls` that go with it. `accepted` are other answers that were found right, `rejected` those
    that were refused in its favour. `weight` is the share of the labels that agree.

    `case`, `labeler`, `choice` and `inclusion` are those of the label that the gold is taken from,
    `labels` all of them. `cluster` names the prompts that are nearly the same; all of a cluster
    are in the same split.
    """

    case: str
    messages: tuple[Message, ...]
    gold: str
    labeler: str
    choice: Choice
    inclusion: float
    cluster: str
    split: Split
    calls: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    accepted: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    weight: float = 1.0
    labels: tuple[Vote, ...] = ()

    @property
    def answer(self) -> Message:
        """The right answer as the assistant's message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.gold}
        return {**message, "tool_calls": list(self.calls)} if self.calls else message


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A prompt of which a person said that no answer to it was right: `rejected` are those."""

    case: str
    messages: tuple[Message, ...]
    rejected: tuple[str, ...]
    inclusion: float
    cluster: str
    split: Split
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    labels: tuple[Vote, ...] = ()
    gold: None = None


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two answers to the same prompt: a person took `chosen` and not `rejected`.

    `weight`, in (0, 1], is the share of the labels that say so.
    """

    case: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class UnpairedRow:
    """An answer that a person found right, or not, on its own."""

    case: str
    prompt: tuple[Message, ...]
    answer: str
    desirable: bool
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """A labelled case that is not in the dataset, and why. `kept` is the case that stands for it."""

    case: str
    reason: str
    kept: str | None = None


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Cases with the same input and different gold. Without a majority none of them is used.

    `calls` are the tool calls that go with each of the `golds`; none where no answer has any.
    """

    cases: tuple[str, ...]
    golds: tuple[str, ...]
    settled: str | None
    calls: tuple[tuple[Mapping[str, Any], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Dataset:
    """Immutable: `digest` is the sha256 of `content`, which holds all rows as canonical JSONL.

    `rows` have a right answer; `unanswered` have none, and teach only what not to say. `compacted`
    counts the JSON answers that lost white space on their way into it.
    """

    digest: str
    content: bytes
    rows: tuple[Example, ...]
    unanswered: tuple[Unanswered, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    contradictions: tuple[Contradiction, ...] = ()
    redacted: Mapping[str, int] = field(default_factory=dict)
    compacted: int = 0

    def split(self, name: Split) -> list[Example]:
        return [row for row in self.rows if row.split == name]

    def preferences(self, name: Split) -> list[PreferenceRow]:
        """Each refused answer beside the right one; answers that are tool calls have no pair."""
        return [
            PreferenceRow(row.case, row.messages, row.gold, rejected, row.weight, row.tools)
            for row in self.split(name)
            if row.gold and not row.calls
            for rejected in row.rejected
        ]

    def unpaired(self, name: Split) -> list[UnpairedRow]:
        """Every answer that a person found right or wrong, one by one."""
        found: list[UnpairedRow] = []
        for row in self.split(name):
            right = (row.gold, *row.accepted) if row.gold and not row.calls else row.accepted
            found += [
                UnpairedRow(row.case, row.messages, answer, desirable, row.weight, row.tools)
                for answers, desirable in ((right, True), (row.rejected, False))
                for answer in answers
            ]
        found += [
            UnpairedRow(row.case, row.messages, answer, False, row.weight, row.tools)
            for row in self.unanswered
            if row.split == name
            for answer in row.rejected
        ]
        return found

    @property
    def stats(self) -> Mapping[str, Any]:
        """For people: rows by split, the commonest answers, what was dropped."""
        return {
            "rows": len(self.rows),
            "splits": dict(Counter(row.split for row in self.rows)),
            "answers": dict(Counter(row.gold for row in self.rows).most_common(20)),
            "dropped": dict(Counter(each.reason for each in self.dropped)),
            "contradictions": len(self.contradictions),
        }


def from_rows(rows: Iterable[Example], unanswered: Iterable[Unanswered] = ()) -> Dataset:
    """A dataset of rows as they are, in the order of their cases."""
    ordered = tuple(sorted(rows, key=lambda row: row.case))
    without = tuple(sorted(unanswered, key=lambda row: row.case))
    content = b"".join(_encoder.encode(row) + b"\n" for row in (*ordered, *without))
    return Dataset(hashlib.sha256(content).hexdigest(), content, ordered, without)


def load(content: bytes) -> Dataset:
    """Read canonical JSONL back; what an older release wrote keeps its digest.

    Raises InvalidInputError with the number of a broken line.
    """
    rows: list[Example] = []
    unanswered: list[Unanswered] = []
    for row in _read_lines(content):
        if isinstance(row, Example):
            rows.append(row)
        else:
            unanswered.append(row)
    return Dataset(hashlib.sha256(content).hexdigest(), content, tuple(rows), tuple(unanswered))


def _read_lines(content: bytes) -> Iterator[Example | Unanswered]:
    # Not splitlines(): it also splits at characters that may stand inside a text.
    for number, line in enumerate(content.rstrip(b"\n").split(b"\n"), start=1):
        if not line and number == 1:
            return
        try:
            values = msgspec.json.decode(line)
            if isinstance(values, dict) and values.get("gold") is None:
                yield msgspec.convert(values, Unanswered)
            else:
                yield msgspec.convert(values, Example)
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as exc:
            raise InvalidInputError(f"line {number} is no row of a dataset: {exc}") from exc


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of a dataset without its rows.

    `source` is `labels`, or the name of the file that was brought in. `dropped` and `answers` are
    counts; `ledger` names the document that lists each dropped case with its reason, and each
    contradiction; `asked_again` of those became cases. `labels` counts what it was made from,
    `compacted` the JSON answers that lost white space. `suites` are the evaluation suites that it
    was checked against.
    """

    digest: str
    route: str
    created_at: datetime
    created_by: str = ""
    run: str = ""
    source: str = "labels"
    labels: int = 0
    rows: int = 0
    unanswered: int = 0
    preferences: int = 0
    heldout: float = 0.0
    validation: float = 0.0
    splits: Mapping[str, int] = field(default_factory=dict)
    answers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    distinct_answers: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    contradictions: int = 0
    asked_again: int = 0
    redacted: Mapping[str, int] = field(default_factory=dict)
    suites: tuple[str, ...] = ()
    ledger: str | None = None
    compacted: int = 0


@dataclass(frozen=True, slots=True)
class SuiteUse:
    """That an evaluation suite is used. `prompts` names the document with its rows' messages."""

    name: str
    route: str
    prompts: str
    rows: int
    first_used_at: datetime


def prompt_lines(prompts: Iterable[Sequence[Message]]) -> bytes:
    """Prompts as canonical JSONL, whatever their order."""
    lines = sorted(_encoder.encode({"messages": list(each)}) for each in prompts)
    return b"".join(line + b"\n" for line in lines)


def read_prompts(content: bytes) -> list[list[Message]]:
    return [msgspec.json.decode(line)["messages"] for line in content.splitlines()]


def ledger_lines(dropped: Iterable[Dropped], contradictions: Iterable[Contradiction]) -> bytes:
    """What was left out and why, as canonical JSONL."""
    rows: list[Dropped | Contradiction] = [*dropped, *contradictions]
    return b"".join(_encoder.encode(row) + b"\n" for row in rows)


def read_ledger(content: bytes) -> tuple[list[Dropped], list[Contradiction]]:
    dropped: list[Dropped] = []
    contradictions: list[Contradiction] = []
    for line in content.splitlines():
        values = msgspec.json.decode(line)
        if "reason" in values:
            dropped.append(msgspec.convert(values, Dropped))
        else:
            contradictions.append(msgspec.convert(values, Contradiction))
    return dropped, contradictions


@dataclass(frozen=True, slots=True)
class Change:
    """A row that one dataset has and another has not, or has otherwise.

    `why` says for a row that is gone what became of its case, for a changed one what changed.
    """

    kind: Literal["added", "removed", "changed"]
    case: str
    split: Split
    why: str = ""


def difference(before: Dataset, after: Dataset, dropped: Iterable[Dropped]) -> list[Change]:
    """What became of each row from one dataset to another. `dropped` is what `after` left out."""
    reasons = {each.case: each for each in dropped}
    old, new = _by_case(before), _by_case(after)
    found: list[Change] = []
    for case in sorted(old.keys() | new.keys()):
        was, now = old.get(case), new.get(case)
        if was is None and now is not None:
            found.append(Change("added", case, now.split))
        elif was is not None and now is None:
            found.append(Change("removed", case, was.split, _became(reasons.get(case))))
        elif was is not None and now is not None and (why := _changed(was, now)):
            found.append(Change("changed", case, now.split, why))
    return found


def _by_case(dataset: Dataset) -> dict[str, Example | Unanswered]:
    found: dict[str, Example | Unanswered] = {row.case: row for row in dataset.rows}
    found.update((row.case, row) for row in dataset.unanswered)
    return found


def _became(dropped: Dropped | None) -> str:
    if dropped is None:
        return "its case is not labelled any more"
    return dropped.reason + (f" ({dropped.kept})" if dropped.kept else "")


def _changed(was: Example | Unanswered, now: Example | Unanswered) -> str:
    parts: list[str] = []
    if was.gold != now.gold:
        parts.append(f"the right answer was {_short(was.gold)}, is {_short(now.gold)}")
    if was.split != now.split:
        parts.append(f"moved from {was.split} to {now.split}")
    if was.messages != now.messages:
        parts.append("the prompt is written otherwise")
    if len(was.labels) != len(now.labels):
        parts.append(f"{len(was.labels)} labels became {len(now.labels)}")
    elif was.labels != now.labels or was.weight != now.weight:
        parts.append("its labels differ")
    if was.rejected != now.rejected:
        parts.append("other answers were refused")
    return "; ".join(parts)


def _short(gold: str | None) -> str:
    if gold is None:
        return "none"
    return repr(gold if len(gold) <= 60 else f"{gold[:59]}…")
