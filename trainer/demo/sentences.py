"""The review sentences: what the application asks about, and what twenty people said of each."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rollout.errors import ConfigError
from trainer.suites import SuiteRow

CLASSES = ("positive", "negative", "neutral")
# What the application itself puts before every sentence.
INSTRUCTION = (
    "Is this sentence from a product review positive, negative or neutral about the product? "
    "Answer with one word."
)
# Only sentences on which nearly everyone agrees are good examples.
_CLEAR = 0.9
_EXAMPLE_LENGTH = range(30, 90)


@dataclass(frozen=True, slots=True)
class Sentence:
    """`label` is the class of the mean rating; `share` is how many of the twenty are of it."""

    id: str
    text: str
    label: str
    share: float
    split: Literal["train", "heldout"]

    @property
    def messages(self) -> tuple[Mapping[str, str], ...]:
        return (
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": self.text},
        )


def read_sentences(path: Path) -> list[Sentence]:
    """In an order that looks random and never changes. Raises ConfigError where there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as exc:
        raise ConfigError(f"there are no review sentences in {path}: run `make model`") from exc
    rows = (json.loads(line) for line in lines)
    sentences = [
        Sentence(row["id"], row["text"], row["label"], row["share"], row["split"]) for row in rows
    ]
    return sorted(sentences, key=lambda sentence: hashlib.sha256(sentence.id.encode()).digest())


def prompts(sentences: Sequence[Sentence]) -> list[tuple[Mapping[str, str], ...]]:
    """Prompts to choose the best one from: the instruction with different clear examples.

    Small models lean towards the class of the last example, so the order varies too.
    """
    clear = {label: _clear(sentences, label) for label in CLASSES}
    orders = (CLASSES, CLASSES[::-1], ("negative", "neutral", "positive"))
    found: list[tuple[Mapping[str, str], ...]] = []
    for rounds in (1, 1, 2, 2):
        messages: list[Mapping[str, str]] = [{"role": "system", "content": INSTRUCTION}]
        order = orders[len(found) % len(orders)]
        for label in order * rounds:
            messages.append({"role": "user", "content": next(clear[label]).text})
            messages.append({"role": "assistant", "content": label})
        found.append(tuple(messages))
    return found


def suite_rows(
    sentences: Iterable[Sentence], prompt: Sequence[Mapping[str, str]] | None = None
) -> list[SuiteRow]:
    """Sentences to evaluate on, asked as the application does, or behind another prompt."""
    return [
        SuiteRow(
            id=sentence.id,
            messages=sentence.messages if prompt is None else (*prompt, sentence.messages[-1]),
            gold=sentence.label,
            choices=CLASSES,
        )
        for sentence in sentences
    ]


def suite_lines(rows: Iterable[SuiteRow]) -> str:
    """The rows as a suite's file."""
    return "".join(
        json.dumps({name: value for name, value in asdict(row).items() if value is not None}) + "\n"
        for row in rows
    )


def _clear(sentences: Sequence[Sentence], label: str) -> Iterator[Sentence]:
    return (
        sentence
        for sentence in sentences
        if sentence.label == label
        and sentence.share >= _CLEAR
        and len(sentence.text) in _EXAMPLE_LENGTH
    )
