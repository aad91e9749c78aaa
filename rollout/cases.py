"""A case is what a person is asked to judge; a label is what they said."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from rollout.exchanges import Answer, Comparison, Judgement, Outcome

Choice = Literal["first", "second", "both", "neither"]
# What a choice means, whichever answer was shown first.
Value = Literal["stable", "candidate", "both", "neither"]
# "disputed": as many people as may be asked were asked, and no choice has a majority.
CaseState = Literal["open", "leased", "labelled", "disputed"]

# The least interest that still makes a difference to the place in the queue.
_NEAREST: Final = 1 / 64


@dataclass(frozen=True, slots=True)
class Case:
    """One request with the two answers to it.

    `messages` are the client's own, without what a version put before them. `inclusion` is the
    probability with which a pair of this kind became a case, in (0, 1]. `unit` is the hashed
    identity of the client, empty in cases of older releases. `labels_needed` people label it, and
    one more where no choice of theirs has a majority. `unsure` is what `unsure_of` said of the pair,
    `judgement` what the route's judge did, if it was asked; nobody who labels is shown it.
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
    unit: str = ""
    labels_needed: int = 1
    unsure: float = 0.75
    judgement: Judgement | None = None

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
    """A case with the label that decides it. `others` are the rest, oldest first."""

    case: Case
    label: Label
    others: tuple[Label, ...] = ()

    @property
    def labels(self) -> tuple[Label, ...]:
        """All of them, oldest first."""
        return tuple(sorted((*self.others, self.label), key=lambda label: label.labelled_at))

    @property
    def decided_at(self) -> datetime:
        """When the last label came, which the deciding one need not be."""
        return max(label.labelled_at for label in (*self.others, self.label))


@dataclass(frozen=True, slots=True)
class Decision:
    """What the labels of a case come to.

    `needed` is how many it takes in all, as far as one can tell now. `label` decides, and
    `outcome` is the candidate's; both are None while it is open. A disputed case has no label
    that decides; its outcome is a tie, for people looked and found neither answer better.
    """

    state: Literal["open", "labelled", "disputed"]
    needed: int
    outcome: Outcome | None = None
    label: Label | None = None


@dataclass(frozen=True, slots=True)
class JudgeRecord:
    """How a judge did beside people, on cases that have both its verdict and a label.

    `agreed` of `labelled` verdicts were people's too; `kappa` is Cohen's, 0 for no better than
    chance, None where it is not defined. `inconsistent` of `judged` contradicted themselves when
    the answers changed places.
    """

    judged: int = 0
    inconsistent: int = 0
    labelled: int = 0
    agreed: int = 0
    kappa: float | None = None

    @property
    def position_bias(self) -> float | None:
        return self.inconsistent / self.judged if self.judged else None


def decide(case: Case, labels: Sequence[Label]) -> Decision:
    """Whether these labels, oldest first and each by somebody else, decide the case.

    It is decided once `labels_needed` are there and one choice has more than half of them.
    Without such a choice one more person is asked, and what is split even then is disputed. Of
    the majority's labels the newest decides, one with a correction before one without.
    """
    if len(labels) < case.labels_needed:
        return Decision("open", case.labels_needed)
    choice, votes = Counter(label.choice for label in labels).most_common(1)[0]
    if 2 * votes > len(labels):
        majority = [label for label in labels if label.choice == choice]
        deciding = max(
            enumerate(majority), key=lambda each: (each[1].correction is not None, each[0])
        )[1]
        return Decision("labelled", len(labels), outcome(case, deciding), deciding)
    if len(labels) <= case.labels_needed:
        return Decision("open", case.labels_needed + 1)
    return Decision("disputed", len(labels), "tie")


def value_of(case: Case, label: Label) -> Value:
    """What was chosen, by whose answer it is."""
    if label.choice in ("both", "neither"):
        return label.choice
    return "stable" if (label.choice == "first") == case.stable_first else "candidate"


def unsure_of(comparison: Comparison, floor: Comparison | None = None) -> float:
    """How open it is which answer is right, in [1/4, 1].

    1/4 where the pair decides itself, so that a label adds nothing to the evidence. 1 where the
    judge contradicted itself, or stable, asked again, did (`floor` is the pair of its two answers).
    1/2 where the judge gave the same verdict in both orders. Else, of an engine that tells the
    probabilities of its tokens, 1 - c/2 for the less confident answer's c; and 3/4 where nothing
    is known.
    """
    judgement = comparison.judgement
    if comparison.outcome is not None:
        return 0.25
    if (judgement and not judgement.consistent) or (floor and not floor.agrees):
        return 1.0
    if judgement:
        return 0.5
    known = [
        answer.confidence
        for answer in (comparison.stable, comparison.candidate)
        if answer.confidence is not None
    ]
    return 1.0 - min(known) / 2 if known else 0.75


def interest(distance: float, unsure: float) -> float:
    """How far apart times how unsure, both in [0, 1], as a logarithm to base 2: from -6 to 0."""
    return math.log2(distance * unsure + _NEAREST)


def stratum_of(case: Case) -> str:
    """Names the cases that became cases with the same chance and wait at like places.

    Within one stratum, which cases people came to label has nothing to do with what they said.
    """
    if case.agreement >= 1.0:
        return f"{case.inclusion:.6g}|agrees"
    band = math.floor(interest(1.0 - case.agreement, case.unsure))
    return f"{case.inclusion:.6g}|{band}"


def outcome(case: Case, label: Label) -> Outcome:
    """The candidate's outcome of a labelled pair."""
    match value_of(case, label):
        case "stable":
            return "loss"
        case "candidate":
            return "win"
        case "both" | "neither":
            return "tie"


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
