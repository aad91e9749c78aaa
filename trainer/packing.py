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


@dataclass(frozen=True, slots=True)
class Row:
    """Several examples end to end.

    ids, positions (1, tokens): an example's positions are those it would have alone.
    kept, targets (learnt tokens,): where to read a prediction, and of what.
    mask (1, 1, tokens, tokens): what each token may look at, where the examples share their
        beginning; None where positions that begin at 0 again are all that keeps them apart.
    tokens: how many there are in the examples, shared ones counted in each.
    """

    ids: Tensor
    positions: Tensor
    kept: Tensor
    targets: Tensor
    mask: Tensor | None
    tokens: int

    def to(self, device: torch.device) -> "Row":
        return Row(
            self.ids.to(device),
            self.positions.to(device),
            self.kept.to(device),
            self.targets.to(device),
            None if self.mask is None else self.mask.to(device),
            self.tokens,
        )


def pack(examples: Sequence[Rendered], *, share: bool = True) -> Row:
    """One row of all the examples, in their order.

    Where all of them begin with the same instruction and `share` allows it, the row holds that
    once: causal attention gives its tokens the same states in each example, and each example's
    gradients reach it all the same.
    """
    shared = _shared_prompt(examples) if share else 0
    ids = list(examples[0].ids[:shared])
    positions = list(range(shared))
    owners = [-1] * shared
    kept: list[int] = []
    targets: list[int] = []
    for number, example in enumerate(examples):
        # The token before predicts the next one.
        first = len(ids) + example.answer_start - shared - 1
        kept.extend(range(first, first + len(example.answer)))
        targets.extend(example.answer)
        ids.extend(example.ids[shared:])
        positions.extend(range(shared, len(example.ids)))
        owners.extend([number] * (len(example.ids) - shared))
    return Row(
        ids=torch.tensor([ids]),
        positions=torch.tensor([positions]),
        kept=torch.tensor(kept),
        targets=torch.tensor(targets),
        mask=_mask(torch.tensor(owners)) if shared else None,
        tokens=sum(len(example.ids) for example in examples),
    )


def _shared_prompt(examples: Sequence[Rendered]) -> int:
    """How many tokens all the examples begin with, short of the ones that predict an answer."""
    if len(examples) < 2:
        return 0
    longest = min(example.answer_start for example in examples) - 1
    low, high = (pick(example.ids[:longest] for example in examples) for pick in (min, max))
    same = next((place for place in range(longest) if low[place] != high[place]), longest)
    return same if same >= _WORTH_SHARING else 0


def _mask(owners: Tensor) -> Tensor:
    """True where a token may look: back, at what is shared (-1) and at its own example."""
    visible = (owners[:, None] == owners[None, :]) | (owners[None, :] < 0)
    return visible.tril()[None, None]


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
