"""A case is what a person is asked to judge; a label is what they said."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from rollout.exchanges import Answer, Outcome

Choice = Literal["first", "second", "both", "neither"]
CaseState = Literal["open", "leased", "labelled"]


@dataclass(frozen=True, slots=True)
class Case:
    """One request with the two answers to it.

    `messages` are the client's own, without what a version put before them. `inclusion` is the
    probability with which a pair of this kind became a case, in (0, 1].
    """

    id: str
    route: str
    trial: str
    request_id: str
    messages: tuple[Mapping[str, Any], ...]
    stable: Answer
    candidate: Answer
    agreement: float
    kind: str
    inclusion: float
    priority: float
    created_at: datetime

    @property
    def stable_first(self) -> bool:
        """Whether stable's answer is shown first: a fair coin that nobody has to store."""
        return hashlib.sha256(f"order:{self.id}".encode()).digest()[0] % 2 == 0

    @property
    def answers(self) -> tuple[Answer, Answer]:
        """Both answers in the order in which a labeler sees them."""
        if self.stable_first:
            return self.stable, self.candidate
        return self.candidate, self.stable


@dataclass(frozen=True, slots=True)
class Label:
    """`correction` is the answer that would have been right, where the labeler wrote one."""

    case: str
    route: str
    choice: Choice
    labeler: str
    labelled_at: datetime
    correction: str | None = None
    comment: str = ""


@dataclass(frozen=True, slots=True)
class LabelledCase:
    """A case with what was said of it."""

    case: Case
    label: Label


def outcome(case: Case, label: Label) -> Outcome:
    """The candidate's outcome of a labelled pair."""
    if label.choice in ("both", "neither"):
        return "tie"
    chose_stable = (label.choice == "first") == case.stable_first
    return "loss" if chose_stable else "win"


def choice_for(case: Case, gold: str) -> Choice:
    """The choice that a labeler makes who knows that `gold` is the right answer."""
    first, second = (answer.ok and same_text(answer.text, gold) for answer in case.answers)
    if first and second:
        return "both"
    if first:
        return "first"
    return "second" if second else "neither"


def gold_text(labelled: LabelledCase) -> str | None:
    """The right answer by this label, or None where the labeler found none."""
    if labelled.label.correction is not None:
        return labelled.label.correction
    first, second = labelled.case.answers
    match labelled.label.choice:
        case "first" | "both":
            return first.text
        case "second":
            return second.text
        case "neither":
            return None


def normalise(text: str) -> str:
    """Case, and white space, do not make two texts different."""
    return " ".join(text.casefold().split())


def same_text(one: str, other: str) -> bool:
    return normalise(one) == normalise(other)


def prompt_digest(messages: Sequence[Mapping[str, Any]]) -> str:
    """Names a prompt: equal for prompts that differ only in case and white space (64 hex)."""
    turns = "\x1e".join(
        f"{message.get('role')}\x1f{normalise(_content(message))}" for message in messages
    )
    return hashlib.sha256(turns.encode()).hexdigest()


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\x1d".join(str(part.get("text", part)) for part in content)
    return ""
