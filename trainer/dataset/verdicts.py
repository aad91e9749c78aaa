"""What the labels of one prompt come to: an answer, none, or a contradiction."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rollout.datasets import Contradiction, Dropped, Vote
from trainer.dataset.voices import Said, Voice


@dataclass(frozen=True, slots=True)
class Draft:
    """A row before it has a place. `voice` is the label that it is taken from.

    `first_at` is when anybody first labelled the prompt: it never changes.
    """

    digest: str
    voice: Voice
    gold: Said | None
    accepted: tuple[str, ...]
    rejected: tuple[str, ...]
    weight: float
    votes: tuple[Vote, ...]
    first_at: float

    @property
    def gold_key(self) -> str | None:
        return None if self.gold is None else self.gold.key


@dataclass(frozen=True, slots=True)
class Decided:
    draft: Draft | None
    dropped: Sequence[Dropped]
    contradiction: Contradiction | None = None


def decide(digest: str, voices: Sequence[Voice]) -> Decided:
    """The answer that more than half of the labels give, which is the oldest one to give it.

    Where people were asked which of several labels was right, their answers alone count.
    """
    electors = _electors(voices)
    golds = Counter(voice.right.key for voice in electors if voice.right is not None)
    if not golds:
        return _without_gold(digest, voices)
    key, votes = golds.most_common(1)[0]
    majority = 2 * votes > golds.total()
    contradiction = None
    if len({voice.right.key for voice in voices if voice.right is not None}) > 1:
        contradiction = _contradiction(voices, key if majority else None)
    if not majority:
        why = "labels contradict each other"
        return Decided(None, [Dropped(case, why) for case in _cases(voices)], contradiction)
    return _with_gold(digest, voices, electors, key, contradiction)


def _electors(voices: Sequence[Voice]) -> Sequence[Voice]:
    settling = [voice for voice in voices if voice.settles and voice.right is not None]
    if not settling:
        return voices
    # A later dispute about the same prompt is settled by its own case.
    newest = max(settling, key=lambda voice: voice.order).case
    return [voice for voice in settling if voice.case == newest]


def _with_gold(
    digest: str,
    voices: Sequence[Voice],
    electors: Sequence[Voice],
    key: str,
    contradiction: Contradiction | None,
) -> Decided:
    agreeing = [voice for voice in voices if voice.right is not None and voice.right.key == key]
    # What asked about the labels was no request: rather name one that was.
    chosen = next((voice for voice in agreeing if not voice.settles), agreeing[0])
    gold = chosen.right
    accepted = {each.key: each.text for voice in agreeing for each in voice.accepted if each.text}
    rejected = {
        each.key: each.text
        for voice in voices
        for each in voice.rejected
        if each.text and not each.calls and (voice.right is None or voice.right.key == key)
    }
    for taken in (key, *accepted):
        rejected.pop(taken, None)
    dropped: list[Dropped] = []
    right_cases = {voice.case for voice in agreeing}
    for case in _cases(voices):
        if case == chosen.case:
            continue
        same = case in right_cases
        reason = "repeats another" if same else "contradicted by the majority"
        if not any(voice.right for voice in voices if voice.case == case):
            reason = "neither answer was right, and no correction"
        dropped.append(Dropped(case, reason, chosen.case))
    agree = sum(voice.right is not None and voice.right.key == key for voice in electors)
    draft = Draft(
        digest=digest,
        voice=chosen,
        gold=gold,
        accepted=tuple(sorted(accepted.values())),
        rejected=tuple(sorted(rejected.values())),
        weight=round(agree / len(electors), 6),
        votes=tuple(_votes(voices, key)),
        first_at=voices[0].at,
    )
    return Decided(draft, dropped, contradiction)


def _without_gold(digest: str, voices: Sequence[Voice]) -> Decided:
    """Nobody knows a right answer; what was refused may still be learnt from."""
    rejected = {each.key: each.text for voice in voices for each in voice.rejected if each.text}
    chosen = voices[0]
    if not rejected:
        said = any(voice.choice != "neither" for voice in voices)
        why = "the right answer has no text" if said else "neither answer was right, and no text"
        return Decided(None, [Dropped(case, why) for case in _cases(voices)])
    draft = Draft(
        digest=digest,
        voice=chosen,
        gold=None,
        accepted=(),
        rejected=tuple(sorted(rejected.values())),
        weight=1.0,
        votes=tuple(_votes(voices, None)),
        first_at=voices[0].at,
    )
    others = [case for case in _cases(voices) if case != chosen.case]
    return Decided(draft, [Dropped(case, "repeats another", chosen.case) for case in others])


def _contradiction(voices: Sequence[Voice], settled: str | None) -> Contradiction:
    known = [(voice.case, voice.right) for voice in voices if voice.right is not None]
    calls = tuple(right.calls for _, right in known)
    return Contradiction(
        cases=tuple(case for case, _ in known),
        golds=tuple(right.given for _, right in known),
        settled=settled,
        calls=calls if any(calls) else (),
    )


def _votes(voices: Sequence[Voice], key: str | None) -> Iterator[Vote]:
    for voice in voices:
        agrees = (voice.right.key if voice.right is not None else None) == key
        yield Vote(voice.case, voice.labeler, voice.choice, voice.inclusion, agrees, voice.when)


def _cases(voices: Sequence[Voice]) -> list[str]:
    return list(dict.fromkeys(voice.case for voice in voices))
