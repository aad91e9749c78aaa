"""Labelled cases to a dataset: the rules, the split that never changes, the digest."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rapidfuzz import fuzz

from rollout.cases import Choice, LabelledCase, gold_text, normalise, prompt_digest
from rollout.datasets import (
    Contradiction,
    Dataset,
    Dropped,
    Example,
    PreferenceRow,
    Split,
    Unanswered,
    UnpairedRow,
    Vote,
    from_rows,
    load,
)

__all__ = [
    "Contradiction",
    "Dataset",
    "Dropped",
    "Example",
    "PreferenceRow",
    "Split",
    "Unanswered",
    "UnpairedRow",
    "Vote",
    "compile_dataset",
    "from_rows",
    "load",
    "split_of",
]

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
# Texts that are this alike (0 to 100, by the letters to insert and delete) say the same.
_NEAR = 95.0
# Texts that share this much of their four-letter pieces are compared letter by letter.
_SHINGLE = 4
_CANDIDATE = 0.6
_PERMUTATIONS = 64
# Words count as an instruction where this share of the prompts, of at least so many, has them.
_MOST = 0.8
_FEW = 3


def compile_dataset(
    labelled: Iterable[LabelledCase],
    *,
    heldout: float,
    validation: float = 0.0,
    suite_prompts: Sequence[Sequence[Mapping[str, Any]]] = (),
) -> Dataset:
    """Make a dataset by the rules.

    A row is dropped where its label names no answer, where it repeats or nearly repeats an older
    one with the same answer, where labels contradict each other without a majority, and where it
    asks what an evaluation suite asks (`suite_prompts`, the suites' messages).

    Rows are taken in the order in which they were labelled, and each is split by the hash of the
    oldest prompt that is nearly the same: later labels never move an earlier row.
    """
    dropped: list[Dropped] = []
    candidates = sorted(
        _candidates(labelled, dropped), key=lambda each: (each.labelled_at, each.case)
    )
    settled, contradictions = _settle(candidates, dropped)
    evaluated = [flat for messages in suite_prompts if (flat := _flat(messages))]
    texts = _distinguishing([*evaluated, *(each.messages for each in settled)])
    index = _NearIndex()
    for text in texts[: len(evaluated)]:
        index.add(_Known(text, owner="", cluster="", gold=None))
    rows: list[Example] = []
    for candidate, text in zip(settled, texts[len(evaluated) :], strict=True):
        near = index.find(text)
        if near is not None and near.gold is None:
            dropped.append(Dropped(candidate.case, "is in an evaluation suite"))
            continue
        if near is not None and near.gold == normalise(candidate.gold):
            dropped.append(Dropped(candidate.case, "nearly repeats another", near.owner))
            continue
        cluster = near.cluster if near is not None else candidate.prompt
        index.add(_Known(text, candidate.case, cluster, normalise(candidate.gold)))
        rows.append(
            Example(
                case=candidate.case,
                messages=candidate.messages,
                gold=candidate.gold,
                labeler=candidate.labeler,
                choice=candidate.choice,
                inclusion=candidate.inclusion,
                cluster=cluster,
                split=split_of(cluster, heldout=heldout, validation=validation),
            )
        )
    dataset = from_rows(rows)
    return replace(dataset, dropped=tuple(dropped), contradictions=contradictions)


def split_of(cluster: str, *, heldout: float, validation: float = 0.0) -> Split:
    """Where a cluster belongs, by its hash alone. A larger share only adds to its split."""
    bucket = int.from_bytes(hashlib.sha256(f"split:{cluster}".encode()).digest()[:8], "big") / 2**64
    if bucket < heldout:
        return "heldout"
    return "validation" if bucket >= 1 - validation else "train"


@dataclass(frozen=True, slots=True)
class _Candidate:
    case: str
    messages: tuple[Mapping[str, str], ...]
    prompt: str
    gold: str
    labeler: str
    choice: Choice
    inclusion: float
    labelled_at: float


def _candidates(labelled: Iterable[LabelledCase], dropped: list[Dropped]) -> Iterator[_Candidate]:
    for each in labelled:
        gold = gold_text(each)
        if gold is None:
            dropped.append(Dropped(each.case.id, "neither answer was right, and no correction"))
            continue
        if not gold.strip():
            dropped.append(Dropped(each.case.id, "the right answer has no text"))
            continue
        messages = _flat(each.case.messages)
        if messages is None:
            dropped.append(Dropped(each.case.id, "its messages are not text"))
            continue
        yield _Candidate(
            case=each.case.id,
            messages=messages,
            prompt=prompt_digest(messages),
            gold=gold.strip(),
            labeler=each.label.labeler,
            choice=each.label.choice,
            inclusion=each.case.inclusion,
            labelled_at=each.label.labelled_at.timestamp(),
        )


def _flat(messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, str], ...] | None:
    """Role and text of each message; None where there is something else in one."""
    flat: list[Mapping[str, str]] = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            texts = [part for part in parts if isinstance(part, str)]
            content = "\n".join(texts) if len(texts) == len(content) else None
        if role not in _ROLES or not isinstance(content, str):
            return None
        flat.append({"role": str(role), "content": content})
    return tuple(flat) or None


def _settle(
    candidates: Sequence[_Candidate], dropped: list[Dropped]
) -> tuple[list[_Candidate], tuple[Contradiction, ...]]:
    """One candidate for each prompt: the oldest with the answer that most labels give."""
    by_prompt: dict[str, list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_prompt[candidate.prompt].append(candidate)
    settled: list[_Candidate] = []
    contradictions: list[Contradiction] = []
    for group in by_prompt.values():
        answers = Counter(normalise(each.gold) for each in group)
        answer, votes = answers.most_common(1)[0]
        majority = 2 * votes > len(group)
        if len(answers) > 1:
            contradictions.append(
                Contradiction(
                    tuple(each.case for each in group),
                    tuple(each.gold for each in group),
                    answer if majority else None,
                )
            )
        if not majority:
            dropped.extend(Dropped(each.case, "labels contradict each other") for each in group)
            continue
        first = next(each for each in group if normalise(each.gold) == answer)
        settled.append(first)
        for each in group:
            if each is not first:
                same = normalise(each.gold) == answer
                reason = "repeats another" if same else "contradicted by the majority"
                dropped.append(Dropped(each.case, reason, first.case))
    return settled, tuple(contradictions)


def _distinguishing(prompts: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
    """What tells the prompts apart: their words without those that most of them begin or end with.

    Instructions that come with every request would make any two of them look alike.
    """
    words = [
        normalise(" ".join(message["content"] for message in messages)).split()
        for messages in prompts
    ]
    rest = [each[cut:] for each, cut in zip(words, _shared_starts(words), strict=True)]
    ends = _shared_starts([each[::-1] for each in rest])
    return [" ".join(each[: len(each) - cut]) for each, cut in zip(rest, ends, strict=True)]


def _shared_starts(texts: Sequence[Sequence[str]]) -> list[int]:
    """For each text, how many of its first words are those that most texts begin with."""
    shared = [0] * len(texts)
    if len(texts) < _FEW:
        return shared
    agreeing = list(range(len(texts)))
    place = 0
    while True:
        words = Counter(texts[index][place] for index in agreeing if len(texts[index]) > place)
        word, count = words.most_common(1)[0] if words else ("", 0)
        if count < _MOST * len(texts):
            return shared
        agreeing = [
            index for index in agreeing if len(texts[index]) > place and texts[index][place] == word
        ]
        place += 1
        for index in agreeing:
            shared[index] = place


@dataclass(frozen=True, slots=True)
class _Known:
    """A text that is in the dataset, or in a suite (then without a `gold`)."""

    text: str
    owner: str
    cluster: str
    gold: str | None


class _NearIndex:
    """Texts by their MinHash, each candidate then compared letter by letter."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        self._known: list[_Known] = []
        self._same: dict[str, int] = {}
        self._hashes = MinHashLSH(threshold=_CANDIDATE, num_perm=_PERMUTATIONS)

    def add(self, known: _Known) -> None:
        number = len(self._known)
        self._known.append(known)
        self._same.setdefault(known.text, number)
        self._hashes.insert(number, _minhash(known.text), check_duplication=False)

    def find(self, text: str) -> _Known | None:
        """The oldest text that is nearly this one."""
        if (same := self._same.get(text)) is not None:
            return self._known[same]
        candidates: list[int] = sorted(self._hashes.query(_minhash(text)))
        for known in (self._known[number] for number in candidates):
            if fuzz.ratio(text, known.text, score_cutoff=_NEAR) >= _NEAR:
                return known
        return None


def _minhash(text: str) -> Any:
    from datasketch import MinHash

    shingles = {text[place : place + _SHINGLE] for place in range(max(1, len(text) - _SHINGLE + 1))}
    hashed = MinHash(num_perm=_PERMUTATIONS, seed=1)
    hashed.update_batch([shingle.encode() for shingle in sorted(shingles)])
    return hashed
