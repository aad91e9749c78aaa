"""Examples of different lengths into rows of tokens without padding, each row a forward pass."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.rendering import Rendered

# Best fit over all open rows would be quadratic; the fullest that fits among so many is as good.
_OPEN_ROWS = 64
# A mask costs something too.
_WORTH_SHARING = 8
# The owner of tokens that several examples share.
_EVERYONES = -1


@dataclass(frozen=True, slots=True)
class Item:
    """What is never split over rows: one example, or those that a loss holds against each other.

    `reference` are the log-probabilities of the examples' answers under the base, where the method
    needs them. `desirable` says of a single answer whether it was right, `weight` how much a pair
    or a single answer counts; where likelihood is learnt, each token has its own weight.
    """

    examples: tuple[Rendered, ...]
    desirable: bool = True
    weight: float = 1.0
    reference: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Its tokens, those that its examples begin alike with counted once."""
        shared = _shared_prompt(self.examples)
        return shared + sum(len(example.ids) - shared for example in self.examples)


@dataclass(frozen=True, slots=True)
class Row:
    """Several examples end to end.

    ids, positions (1, tokens): an example's positions are those it would have alone.
    kept, targets, weights (learnt tokens,): where to read a prediction, of what, and how much it
        counts.
    owners (learnt tokens,): the number of the example that each of them belongs to.
    mask (1, 1, tokens, tokens): what each token may look at, where the examples share their
        beginning; None where positions that begin at 0 again are all that keeps them apart.
    examples: how many there are. tokens: how many they have, shared ones counted in each.
    """

    ids: Tensor
    positions: Tensor
    kept: Tensor
    targets: Tensor
    weights: Tensor
    owners: Tensor
    mask: Tensor | None
    examples: int
    tokens: int

    def to(self, device: torch.device) -> "Row":
        return Row(
            self.ids.to(device),
            self.positions.to(device),
            self.kept.to(device),
            self.targets.to(device),
            self.weights.to(device),
            self.owners.to(device),
            None if self.mask is None else self.mask.to(device),
            self.examples,
            self.tokens,
        )


def pack(items: Sequence[Item], *, share: bool = True) -> Row:
    """One row of all the examples of the items, in their order.

    Where all of them, or those of one item, begin with the same prompt and `share` allows it, the
    row holds that once: causal attention gives its tokens the same states in each example, and
    each example's gradients reach it all the same.
    """
    row = _Builder()
    every = [example for item in items for example in item.examples]
    everyones = _shared_prompt(every) if share else 0
    row.add(every[0].ids[:everyones], 0, item=_EVERYONES, example=_EVERYONES)
    number = 0
    for place, item in enumerate(items):
        own = max(everyones, _shared_prompt(item.examples) if share else 0)
        row.add(item.examples[0].ids[everyones:own], everyones, item=place, example=_EVERYONES)
        for example in item.examples:
            row.learn(example, own, number)
            row.add(example.ids[own:], own, item=place, example=number)
            number += 1
    return row.finish(number, sum(len(example.ids) for example in every))


class _Builder:
    """A row while it grows."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._positions: list[int] = []
        self._items: list[int] = []
        self._examples: list[int] = []
        self._learnt: list[tuple[int, int, float, int]] = []

    def add(self, ids: Sequence[int], position: int, *, item: int, example: int) -> None:
        self._ids.extend(ids)
        self._positions.extend(range(position, position + len(ids)))
        self._items.extend([item] * len(ids))
        self._examples.extend([example] * len(ids))

    def learn(self, example: Rendered, shared: int, number: int) -> None:
        """Note what of the example is learnt; the rest of it follows behind its shared tokens."""
        # The token before predicts the next one.
        offset = len(self._ids) - shared - 1
        self._learnt.extend(
            (offset + place, example.ids[place], weight, number)
            for place, weight in example.learnt()
        )

    def finish(self, examples: int, tokens: int) -> Row:
        kept, targets, weights, owners = zip(*self._learnt, strict=True)
        return Row(
            ids=torch.tensor([self._ids]),
            positions=torch.tensor([self._positions]),
            kept=torch.tensor(kept),
            targets=torch.tensor(targets),
            weights=torch.tensor(weights, dtype=torch.float32),
            owners=torch.tensor(owners),
            mask=self._mask() if _EVERYONES in self._examples else None,
            examples=examples,
            tokens=tokens,
        )

    def _mask(self) -> Tensor:
        """True where a token may look: back, at its own example and at what that shares."""
        items, examples = torch.tensor(self._items), torch.tensor(self._examples)
        same_item = items[:, None] == items[None, :]
        same_example = examples[:, None] == examples[None, :]
        shared = examples[None, :] == _EVERYONES
        visible = (same_item & (same_example | shared)) | (items[None, :] == _EVERYONES)
        return visible.tril()[None, None]


def _shared_prompt(examples: Sequence[Rendered]) -> int:
    """How many tokens all the examples begin with, short of the ones that predict an answer."""
    if len(examples) < 2:
        return 0
    longest = min(example.answer_start for example in examples) - 1
    low, high = (pick(example.ids[:longest] for example in examples) for pick in (min, max))
    same = next((place for place in range(longest) if low[place] != high[place]), longest)
    return same if same >= _WORTH_SHARING else 0


def plan_epoch(
    lengths: Sequence[int], *, row_tokens: int, batch_tokens: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """The steps of an epoch: each a list of rows, each a list of indices into `lengths`.

    Every index occurs exactly once. A row holds at most `row_tokens` tokens, a step about
    `batch_tokens`. The same arguments give the same plan, so a resumed run needs no other state.
    """
    order = _shuffled(len(lengths), f"{seed}:{epoch}:examples")
    capacity = min(row_tokens, max(batch_tokens, max(lengths, default=1)))
    rows = _best_fit(order, lengths, capacity)
    places = _shuffled(len(rows), f"{seed}:{epoch}:rows")
    return _group([rows[place] for place in places], lengths, batch_tokens)


def _shuffled(count: int, salt: str) -> list[int]:
    """0 to count-1 in an order that depends on the salt alone."""
    return sorted(
        range(count), key=lambda index: hashlib.sha256(f"{salt}:{index}".encode()).digest()
    )


def _best_fit(order: list[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    open_rows: list[tuple[int, list[int]]] = []  # (room, row)
    for index in order:
        length = lengths[index]
        fitting = [place for place, (room, _) in enumerate(open_rows) if room >= length]
        if fitting:
            best = min(fitting, key=lambda place: open_rows[place][0])
            room, row = open_rows.pop(best)
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(index)
        open_rows.append((room - length, row))
        if len(open_rows) > _OPEN_ROWS:
            open_rows.remove(min(open_rows, key=lambda each: each[0]))
    return rows


def _group(
    rows: list[list[int]], lengths: Sequence[int], batch_tokens: int
) -> list[list[list[int]]]:
    """Rows into steps, such that a step comes as near to `batch_tokens` as whole rows allow."""
    steps: list[list[list[int]]] = []
    tokens = 0
    for row in rows:
        size = sum(lengths[index] for index in row)
        if not steps or tokens + size / 2 > batch_tokens:
            steps.append([])
            tokens = 0
        steps[-1].append(row)
        tokens += size
    return steps
