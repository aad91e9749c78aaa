"""What every method gets: its part of an optimizer step, and the totals that the parts share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.config import TrainingConfig
from trainer.packing import Item, Row

Packer = Callable[[Sequence[Item]], Row]


@dataclass(frozen=True, slots=True)
class Totals:
    """Of the whole step, however it falls into parts and machines.

    items: the weight of all pairs, or single answers; count: how many they are. tokens: the weight
    of all learnt tokens. drift: how far the model has moved from the base, in nats (the KL term of
    KTO).
    """

    items: float
    count: int
    tokens: float
    drift: float = 0.0


@dataclass(frozen=True, slots=True)
class Part:
    """The items of one row, and what their loss is a share of."""

    items: Sequence[Item]
    totals: Totals
    config: TrainingConfig


def _all_of_them(items: Sequence[Item]) -> Sequence[Item]:
    return items


@dataclass(frozen=True, slots=True)
class Method:
    """A loss over items.

    loss: the part's share of the step's loss; over all parts they add up to it.
    needs_reference: whether it looks at `Item.reference`.
    learnt: what of the items is packed into the row that the loss is of.
    drift: the sum over these items of what `Totals.drift` is the mean of.
    """

    loss: Callable[[Any, Row, Part], Tensor]
    needs_reference: bool = False
    learnt: Callable[[Sequence[Item]], Sequence[Item]] = _all_of_them
    drift: Callable[[Any, Sequence[Item], Packer], float] | None = None


def totals_of(parts: Sequence[Sequence[Item]]) -> Totals:
    """Of what is learnt by likelihood: the first example of each item, or its third."""
    items = [item for part in parts for item in part]
    learnt = (item.examples[2 if len(item.examples) > 2 else 0] for item in items)
    return Totals(
        items=sum(item.weight for item in items),
        count=len(items),
        tokens=sum(weight for each in learnt for _, weight in each.learnt()),
    )
