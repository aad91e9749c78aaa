"""The people: they label what the shadow found, by what twenty readers said of each sentence."""

from collections.abc import Mapping
from typing import Any

from rollout.cases import Choice, normalise, same_text
from rollout.client import ControlClient
from rollout.control.views import AnswerView, CaseView
from trainer.demo.sentences import Sentence

_LEASE_SECONDS = 60


class People:
    """Twenty readers rated each sentence; the class of their mean is what they say."""

    def __init__(self, control: ControlClient, route: str, sentences: list[Sentence]) -> None:
        self._control = control
        self._route = route
        self._by_text = {normalise(sentence.text): sentence for sentence in sentences}
        self.labels = 0

    def label(self, count: int) -> int:
        """Claim up to `count` cases and label them; returns how many were labelled."""
        before = self.labels
        for case in self._control.claim(self._route, count, _LEASE_SECONDS):
            sentence = self._by_text.get(normalise(_question(case.messages)))
            if sentence is None:
                # Somebody else's traffic, or a sentence that was redacted: nobody here can say
                # what is right. Its lease runs out; given back at once it would come back at once.
                continue
            choice = _choice(case, sentence.label)
            self._control.label(
                case.id,
                choice,
                correction=sentence.label if choice == "neither" else None,
                comment=f"{sentence.share:.0%} of 20 readers",
            )
            self.labels += 1
        return self.labels - before


def _choice(case: CaseView, gold: str) -> Choice:
    first, second = _right(case.first, gold), _right(case.second, gold)
    if first and second:
        return "both"
    if first:
        return "first"
    return "second" if second else "neither"


def _right(answer: AnswerView, gold: str) -> bool:
    return answer.error is None and same_text(answer.text, gold)


def _question(messages: tuple[Mapping[str, Any], ...]) -> str:
    return str(messages[-1].get("content", "")) if messages else ""
