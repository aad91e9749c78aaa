"""The dataset compiler: labelled cases in, rows with a split out, and a reason for what is not."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rollout.cases import LabelledCase
from rollout.datasets import (
    Contradiction,
    Dataset,
    Dropped,
    Example,
    Message,
    Split,
    Unanswered,
    from_rows,
)
from trainer.dataset import near
from trainer.dataset.prompts import asked_text, distinguishing, flat, without_instructions
from trainer.dataset.splits import NOWHERE, ORDER, Places
from trainer.dataset.verdicts import Draft, decide
from trainer.dataset.voices import AS_GIVEN, Heard, Manner, hear, hear_rows


@dataclass(frozen=True, slots=True)
class Compiled:
    """A dataset, and where it put which prompts: what the next one must know."""

    dataset: Dataset
    places: Places


def compile_dataset(
    labelled: Iterable[LabelledCase],
    *,
    heldout: float,
    validation: float = 0.0,
    suite_prompts: Sequence[Sequence[Message]] = (),
    manner: Manner = AS_GIVEN,
    places: Places = NOWHERE,
) -> Compiled:
    """Make a dataset by the rules.

    Texts are read in the `manner` before anything else. A case is dropped where its label names no
    answer, where it repeats or nearly repeats an older one with the same answer, where labels
    contradict each other without a majority, and where it asks what an evaluation suite asks
    (`suite_prompts`, the suites' messages).

    Prompts that are nearly the same form a cluster, split by the hash of its anchor, the prompt
    that was labelled first. `places` are those of the route's earlier datasets, which hold whatever
    is labelled, imported or erased since: a row never changes its split, and what was held out
    once is never trained on. A row that would lie close to rows of another split is dropped.
    """
    return _compile(
        hear(labelled, manner),
        heldout=heldout,
        validation=validation,
        suite_prompts=suite_prompts,
        places=places,
    )


def compile_rows(
    rows: Iterable[Example | Unanswered],
    *,
    heldout: float,
    validation: float = 0.0,
    suite_prompts: Sequence[Sequence[Message]] = (),
    manner: Manner = AS_GIVEN,
    places: Places = NOWHERE,
) -> Compiled:
    """The same for rows that were made elsewhere; the splits that they come with count nothing."""
    return _compile(
        hear_rows(rows, manner),
        heldout=heldout,
        validation=validation,
        suite_prompts=suite_prompts,
        places=places,
    )


def leaks(dataset: Dataset, suite_prompts: Sequence[Sequence[Message]]) -> list[str]:
    """Cases of rows that are learnt from and ask what a suite asks, or nearly that."""
    rows: list[Example | Unanswered] = [*dataset.rows, *dataset.unanswered]
    learnt = [row for row in rows if row.split != "heldout"]
    found = _neighbours([row.messages for row in learnt], suite_prompts)
    return sorted(learnt[place].case for place in found.evaluated)


def _compile(
    heard: Heard,
    *,
    heldout: float,
    validation: float,
    suite_prompts: Sequence[Sequence[Message]],
    places: Places,
) -> Compiled:
    dropped = list(heard.dropped)
    contradictions: list[Contradiction] = []
    drafts: list[Draft] = []
    for digest, voices in heard.prompts.items():
        decided = decide(digest, voices)
        dropped += decided.dropped
        if decided.contradiction is not None:
            contradictions.append(decided.contradiction)
        if decided.draft is not None:
            drafts.append(decided.draft)

    def split(anchor: str) -> Split:
        return places.split(anchor, heldout=heldout, validation=validation)

    def rank(draft: Draft) -> int:
        anchor = places.anchors.get(draft.digest)
        return len(ORDER) if anchor is None else ORDER.index(split(anchor))

    # What has its place already keeps it, held-out rows first; then by the first label's time.
    drafts.sort(key=lambda draft: (rank(draft), draft.first_at, draft.digest))
    neighbours = _neighbours([draft.voice.messages for draft in drafts], suite_prompts)
    placing = _Placing(drafts, neighbours, places, heldout, validation)
    for place in range(len(drafts)):
        placing.put(place)
    dataset = from_rows(placing.rows, placing.unanswered)
    dataset = replace(
        dataset,
        dropped=tuple(
            sorted([*dropped, *placing.dropped], key=lambda each: (each.case, each.reason))
        ),
        contradictions=tuple(sorted(contradictions, key=lambda each: each.cases)),
        redacted=heard.redacted,
        compacted=heard.compacted,
    )
    return Compiled(dataset, Places(placing.anchors, places.held | placing.held))


@dataclass(frozen=True, slots=True)
class _Neighbours:
    """For each draft by its place: the earlier and later ones that are nearly the same."""

    texts: Sequence[str]
    near: Mapping[int, Sequence[int]]
    evaluated: frozenset[int]


def _neighbours(
    prompts: Sequence[Sequence[Message]], suite_prompts: Sequence[Sequence[Message]]
) -> _Neighbours:
    suites = [messages for each in suite_prompts if (messages := flat(each)) is not None]
    texts = distinguishing(without_instructions(prompts))
    # A suite may ask the same without the instructions that clients send, or with its own.
    asked = [asked_text(messages) for messages in suites]
    bare = without_instructions(suites)
    evaluated = {*asked, *distinguishing(asked), *bare, *distinguishing(bare)} - {""}
    everything = [*sorted(evaluated), *texts]
    first = len(evaluated)
    found: dict[int, list[int]] = defaultdict(list)
    leaking: set[int] = set()
    for one, other in near.near_pairs(everything):
        if one >= first:
            found[one - first].append(other - first)
            found[other - first].append(one - first)
        elif other >= first:
            leaking.add(other - first)
    return _Neighbours(texts, found, frozenset(leaking))


class _Placing:
    """Drafts in their order, each given its place or dropped with a reason."""

    def __init__(
        self,
        drafts: Sequence[Draft],
        neighbours: _Neighbours,
        places: Places,
        heldout: float,
        validation: float,
    ) -> None:
        self.rows: list[Example] = []
        self.unanswered: list[Unanswered] = []
        self.dropped: list[Dropped] = []
        self.anchors: dict[str, str] = {}
        self.held: set[str] = set()
        self._drafts = drafts
        self._neighbours = neighbours
        self._places = places
        self._shares = (heldout, validation)
        self._placed: dict[int, tuple[str, Split]] = {}
        self._stands_for: dict[int, int] = {}

    def put(self, place: int) -> None:
        draft = self._drafts[place]
        if place in self._neighbours.evaluated:
            self._drop(draft, "is in an evaluation suite")
            return
        close = self._close(place)
        anchor = self._places.anchors.get(draft.digest)
        if anchor is None:
            anchor = self._placed[close[0]][0] if close else draft.digest
        heldout, validation = self._shares
        split = self._places.split(anchor, heldout=heldout, validation=validation)
        for other in close:
            if self._placed[other][1] != split:
                self._drop(draft, "is nearly the same as a row of another split", other)
                return
        self.anchors[draft.digest] = anchor
        if split == "heldout":
            self.held.add(anchor)
        for other in close:
            if self._drafts[other].gold_key == draft.gold_key:
                self._stands_for[place] = other
                self._drop(draft, "nearly repeats another", other)
                return
        self._placed[place] = (anchor, split)
        self._add(draft, anchor, split)

    def _close(self, place: int) -> list[int]:
        """The rows that are nearly the same, in the order in which they got their places.

        Where there are very many, some are known only through one that was dropped for them.
        """
        found: set[int] = set()
        for other in self._neighbours.near.get(place, ()):
            if other in self._placed:
                found.add(other)
            elif (kept := self._stands_for.get(other)) is not None and kept not in found:
                texts = self._neighbours.texts
                if near.is_near(texts[place], texts[kept]):
                    found.add(kept)
        return sorted(found)

    def _drop(self, draft: Draft, reason: str, kept: int | None = None) -> None:
        stands = None if kept is None else self._drafts[kept].voice.case
        self.dropped.append(Dropped(draft.voice.case, reason, stands))

    def _add(self, draft: Draft, anchor: str, split: Split) -> None:
        voice = draft.voice
        if draft.gold is None:
            self.unanswered.append(
                Unanswered(
                    case=voice.case,
                    messages=voice.messages,
                    rejected=draft.rejected,
                    inclusion=voice.inclusion,
                    cluster=anchor,
                    split=split,
                    tools=voice.tools,
                    weight=draft.weight,
                    labels=draft.votes,
                )
            )
            return
        self.rows.append(
            Example(
                case=voice.case,
                messages=voice.messages,
                gold=draft.gold.text,
                labeler=voice.labeler,
                choice=voice.choice,
                inclusion=voice.inclusion,
                cluster=anchor,
                split=split,
                calls=draft.gold.calls,
                tools=voice.tools,
                accepted=draft.accepted,
                rejected=draft.rejected,
                weight=draft.weight,
                labels=draft.votes,
            )
        )
