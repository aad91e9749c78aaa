"""What labels say: the right answer and the refused ones by each single label, prompt by prompt."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any, Final, TypeAlias

from rollout.cases import Choice, Label, LabelledCase
from rollout.datasets import Dropped, Example, Message, Unanswered
from trainer.dataset.answers import answer_key, compact
from trainer.dataset.prompts import digest_of, flat

# Gives a JSON value with its strings redacted, and how often each kind was found in it; None where
# it took too long.
Redact: TypeAlias = Callable[[Any], tuple[Any, Mapping[str, int]] | None]
# The kind of cases that ask which of two labels was right.
CONTRADICTION: Final = "contradiction"


@dataclass(frozen=True, slots=True)
class Said:
    """An answer. `key` is equal for those that say the same; `given` is how a person saw it, `text`
    how it is learnt."""

    text: str
    calls: tuple[Mapping[str, Any], ...]
    key: str
    given: str


@dataclass(frozen=True, slots=True)
class Voice:
    """One label: what it takes for right, what else it found right, and what it refused.

    `settles`: its case asked which of several labels was right.
    """

    case: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    labeler: str
    choice: Choice
    inclusion: float
    at: float
    when: str
    settles: bool
    right: Said | None
    accepted: tuple[Said, ...]
    rejected: tuple[Said, ...]

    @property
    def order(self) -> tuple[float, str, str]:
        return self.at, self.case, self.labeler


@dataclass(frozen=True, slots=True)
class Heard:
    """The labels of each prompt by its digest, oldest first, and what could not be used.

    `compacted` counts the answers that are learnt in another way than people saw them.
    """

    prompts: Mapping[str, Sequence[Voice]]
    dropped: Sequence[Dropped]
    redacted: Mapping[str, int]
    compacted: int


@dataclass(frozen=True, slots=True)
class Manner:
    """What is done to texts before anything is compared: first `redact`, then, where the route's
    answers are held to a JSON schema (`compact_json`), the white space goes out of JSON answers."""

    redact: Redact | None = None
    compact_json: bool = False


AS_GIVEN: Final = Manner()


def hear(labelled: Iterable[LabelledCase], manner: Manner = AS_GIVEN) -> Heard:
    """What each label says of which prompt."""
    return _collect((each.case.id, _of_case(each, manner)) for each in labelled)


def hear_rows(rows: Iterable[Example | Unanswered], manner: Manner = AS_GIVEN) -> Heard:
    """The same of rows that were made elsewhere, each as if one label had said it."""
    return _collect((row.case, _of_row(row, manner)) for row in rows)


@dataclass(frozen=True, slots=True)
class _Read:
    voices: Sequence[Voice]
    redacted: Mapping[str, int]


def _collect(cases: Iterable[tuple[str, _Read | str]]) -> Heard:
    prompts: dict[str, list[Voice]] = defaultdict(list)
    dropped: list[Dropped] = []
    redacted: Counter[str] = Counter()
    compacted = 0
    for case, read in cases:
        if isinstance(read, str):
            dropped.append(Dropped(case, read))
            continue
        redacted.update(read.redacted)
        compacted += _rewritten(read.voices)
        first = read.voices[0]
        prompts[digest_of(first.messages, first.tools)].extend(read.voices)
    for voices in prompts.values():
        voices.sort(key=lambda voice: voice.order)
    return Heard(prompts, dropped, redacted, compacted)


def _rewritten(voices: Iterable[Voice]) -> int:
    """How many answers of a case are learnt in another way than they were given."""
    known = [said for each in voices for said in (each.right, *each.accepted, *each.rejected)]
    return len({said.given for said in known if said is not None and said.text != said.given})


def _of_case(each: LabelledCase, manner: Manner) -> _Read | str:
    """The case's labels, or the reason why none of them can be used."""
    case = each.case
    labels = each.labels
    given: list[Any] = [
        list(case.messages),
        [[answer.text, list(answer.tool_calls)] for answer in case.answers],
        [label.correction for label in labels],
    ]
    clean = _redacted(given, manner.redact)
    if isinstance(clean, str):
        return clean
    (all_messages, answers, corrections), counts = clean
    messages = flat(all_messages)
    if messages is None:
        return "its messages are not text"
    usable = [
        _said(manner, text, calls) if answer.ok else None
        for answer, (text, calls) in zip(case.answers, answers, strict=True)
    ]
    voices = [
        _voice(each, label, correction, messages, usable, manner)
        for label, correction in zip(labels, corrections, strict=True)
    ]
    return _Read(voices, counts)


def _voice(
    each: LabelledCase,
    label: Label,
    correction: str | None,
    messages: tuple[Message, ...],
    usable: Sequence[Said | None],
    manner: Manner,
) -> Voice:
    first, second = usable
    right: Said | None
    accepted: list[Said | None] = []
    rejected: list[Said | None] = []
    match label.choice:
        case "first":
            right, rejected = first, [second]
        case "second":
            right, rejected = second, [first]
        case "both":
            right, accepted = first or second, [first, second]
        case "neither":
            right, rejected = None, [first, second]
    if correction is not None:
        # Who writes another answer has found both of these wrong, or not right enough.
        right, accepted, rejected = _said(manner, correction), [], [first, second]
    return Voice(
        case=each.case.id,
        messages=messages,
        tools=(),
        labeler=label.labeler,
        choice=label.choice,
        inclusion=each.case.inclusion,
        at=label.labelled_at.timestamp(),
        when=label.labelled_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        settles=each.case.kind == CONTRADICTION,
        right=right,
        accepted=_others(accepted, right),
        rejected=_others(rejected, right),
    )


def _of_row(row: Example | Unanswered, manner: Manner) -> _Read | str:
    given = [
        list(row.messages),
        row.gold or "",
        list(row.calls) if isinstance(row, Example) else [],
        list(row.accepted) if isinstance(row, Example) else [],
        list(row.rejected),
        list(row.tools),
    ]
    clean = _redacted(given, manner.redact)
    if isinstance(clean, str):
        return clean
    (all_messages, gold, calls, accepted, rejected, tools), counts = clean
    messages = flat(all_messages)
    if messages is None:
        return "its messages are not text"
    right = _said(manner, gold, calls)
    return _Read(
        [
            Voice(
                case=row.case,
                messages=messages,
                tools=tuple(tools),
                labeler=row.labeler if isinstance(row, Example) else "",
                choice=row.choice if isinstance(row, Example) else "neither",
                inclusion=row.inclusion,
                at=0.0,
                when="",
                settles=False,
                right=right,
                accepted=_others([_said(manner, each) for each in accepted], right),
                rejected=_others([_said(manner, each) for each in rejected], right),
            )
        ],
        counts,
    )


def _redacted(given: Any, redact: Redact | None) -> tuple[Any, Mapping[str, int]] | str:
    clean = (given, {}) if redact is None else redact(given)
    if clean is None:
        return "redaction took too long"
    try:
        for text in _texts(clean[0]):
            text.encode()
    except (UnicodeEncodeError, RecursionError):
        return "its text is no valid Unicode"
    return clean


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        if not value.isascii():
            yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _texts(name)
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _said(manner: Manner, text: str, calls: Iterable[Mapping[str, Any]] = ()) -> Said | None:
    """None where it says nothing."""
    given, known = text.strip(), tuple(calls)
    if not given and not known:
        return None
    # What comes with tool calls is held to no schema.
    learnt = compact(given) if manner.compact_json and not known else given
    return Said(learnt, known, answer_key(given, known), given)


def _others(answers: Iterable[Said | None], right: Said | None) -> tuple[Said, ...]:
    """Those of them that say something else, each once."""
    found = {each.key: each for each in answers if each is not None}
    if right is not None:
        found.pop(right.key, None)
    return tuple(found.values())
