"""What is known of a route: the requests as they come, and in what its answers were wrong."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

from rollout.cases import LabelledCase, gold_text, normalise, value_of
from rollout.exchanges import Exchange
from rollout.retraining import Accord
from rollout.tallies import Agreement

FailureKind = Literal["form", "choice", "facts", "wording"]

_MOST_CLASSES: Final = 50
_LONGEST_CLASS: Final = 64
_FACT: Final = re.compile(
    r"""
    https?://\S+ | \S+@\S+\.\w+            # addresses
    | \b\w*\d[\w.,:/-]*                    # numbers, dates, amounts, codes
    | (?<=[a-z,;]\s)[A-Z][\w-]+            # names within a sentence
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request as it came. `instruction` is what its system messages say, "" where there are
    none; `opening` how its first message begins. `constrained`: the client asked the engine for a
    form. `valid`: whether the answer satisfies the route's schema, None where there is none."""

    instruction: str
    opening: str
    characters: int
    at: datetime
    prompt_tokens: int = 0
    completion_tokens: int = 0
    constrained: bool = False
    valid: bool | None = None


@dataclass(frozen=True, slots=True)
class Gathered:
    """What is known of a route. `captured`: the samples are what clients sent, else those of cases.

    `adapters`: its engine can load them. `previous` is the version to go back to. `suite_rows` is
    None where the route has no suite; `detectable` is the smallest gain that its rows, or those
    that would be held out, show.
    """

    route: str
    stable: str
    base: str
    samples: Sequence[Sample] = ()
    captured: bool = True
    labelled: Sequence[LabelledCase] = ()
    agreement: Agreement = field(default_factory=Agreement)
    accord: Accord | None = None
    open_cases: int = 0
    adapters: bool = True
    previous: str | None = None
    versions: int = 1
    suite_rows: int | None = None
    evaluation_rows: int = 0
    detectable: float | None = None
    other_bases: Sequence[str] = ()
    last_report: str = ""


def sample_of(exchange: Exchange, valid: bool | None) -> Sample:
    """What a captured exchange says of the task."""
    try:
        body = json.loads(exchange.request)
    except ValueError:
        body = {}
    body = body if isinstance(body, dict) else {}
    listed = body.get("messages")
    messages = listed if isinstance(listed, list) else [{"content": body.get("prompt")}]
    form = body.get("response_format")
    found = sample_from(
        [message for message in messages if isinstance(message, dict)], exchange.captured_at
    )
    return Sample(
        instruction=found.instruction,
        opening=found.opening,
        characters=found.characters,
        at=exchange.captured_at,
        prompt_tokens=exchange.answer.prompt_tokens,
        completion_tokens=exchange.answer.completion_tokens,
        constrained="structured_outputs" in body
        or any(key.startswith("guided_") for key in body)
        or (isinstance(form, dict) and form.get("type") not in (None, "text")),
        valid=valid,
    )


def sample_from(messages: Sequence[Mapping[str, Any]], at: datetime) -> Sample:
    """What the messages of a request say of its task."""
    texts = [
        (str(message.get("role", "user")), _text(message.get("content"))) for message in messages
    ]
    instruction = "\n".join(text for role, text in texts if role in ("system", "developer"))
    opening = next((text for role, text in texts if role not in ("system", "developer")), "")
    return Sample(instruction, opening, sum(len(text) for _, text in texts), at)


@dataclass(frozen=True, slots=True)
class Failure:
    """A case in which stable was wrong, and what kind of wrong."""

    case: str
    kind: FailureKind


def failures_of(
    labelled: Sequence[LabelledCase], valid: Callable[[str], bool] | None
) -> list[Failure]:
    """Of each case in which people found stable's answer wrong and there is a right one.

    form: it breaks the schema where the right one does not, or says the same in other dress, or is
    none of the answers that the task knows. choice: another one of these. facts: the right answer
    holds numbers, names or addresses that neither the prompt nor stable's answer has. wording: the
    rest.
    """
    classes = {normalise(name) for name in classes_of(labelled)}
    found: list[Failure] = []
    for row in labelled:
        gold = gold_text(row)
        if gold is None or value_of(row.case, row.label) in ("stable", "both"):
            continue
        if normalise(gold) != normalise(row.case.stable.text):
            found.append(Failure(row.case.id, _kind(row, gold, classes, valid)))
    return found


def _kind(
    row: LabelledCase, gold: str, classes: set[str], valid: Callable[[str], bool] | None
) -> FailureKind:
    said = row.case.stable.text
    if valid is not None and valid(gold) and not valid(said):
        return "form"
    wanted, given = normalise(gold), normalise(said)
    if _bare(gold) == _bare(said):
        return "form"
    if wanted in classes:
        return "choice" if given in classes else "form"
    known = " ".join([_text(message.get("content")) for message in row.case.messages] + [said])
    if any(fact.casefold() not in known.casefold() for fact in _FACT.findall(gold)):
        return "facts"
    return "wording"


def classes_of(labelled: Sequence[LabelledCase]) -> Mapping[str, int]:
    """How often each right answer occurs, where the task is a choice among a few; else empty."""
    golds = Counter(gold for row in labelled if (gold := gold_text(row)) is not None)
    few = len(golds) <= _MOST_CLASSES and sum(golds.values()) >= 3 * len(golds)
    short = all(len(gold) <= _LONGEST_CLASS for gold in golds)
    return dict(golds) if golds and few and short else {}


def task_of(sample: Sample) -> str:
    """Names the task of a request: its instruction, with what changes from day to day taken out.

    Without an instruction, how its first message begins.
    """
    text = sample.instruction or " ".join(sample.opening.split()[:6])
    return re.sub(r"\d+", "0", normalise(text))


def _bare(text: str) -> str:
    """What is left of an answer without its dress: case, marks, fences and a leading phrase."""
    words = re.sub(r"[^\w\s]", " ", text.casefold()).split()
    while words and words[0] in _DRESS:
        words.pop(0)
    return " ".join(words)


_DRESS: Final = frozenset(
    {"the", "answer", "is", "label", "category", "class", "sure", "here", "it", "this", "output"}
)


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return ""
