"""The review sentences: what the application asks about, and what twenty people said of each."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollout.errors import ConfigError

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


def best_prompt(sentences: Sequence[Sentence], examples: int = 1) -> list[Mapping[str, str]]:
    """The application's instruction and `examples` clear sentences of each class."""
    messages: list[Mapping[str, str]] = [{"role": "system", "content": INSTRUCTION}]
    clear = {label: _clear(sentences, label) for label in CLASSES}
    for _ in range(examples):
        for label in CLASSES:
            messages.append({"role": "user", "content": next(clear[label]).text})
            messages.append({"role": "assistant", "content": label})
    return messages


def suite_lines(sentences: Iterable[Sentence]) -> str:
    """Held-out sentences as an evaluation suite of the route."""
    return "".join(json.dumps(_suite_row(sentence)) + "\n" for sentence in sentences)


def _suite_row(sentence: Sentence) -> dict[str, Any]:
    return {
        "id": sentence.id,
        "messages": list(sentence.messages),
        "gold": sentence.label,
        "choices": list(CLASSES),
    }


def _clear(sentences: Sequence[Sentence], label: str) -> Iterator[Sentence]:
    return (
        sentence
        for sentence in sentences
        if sentence.label == label
        and sentence.share >= _CLEAR
        and len(sentence.text) in _EXAMPLE_LENGTH
    )
