"""Kahneman-Tversky optimisation: single answers that were right or wrong, without pairs.

Ethayarajh et al., 2024 (arXiv:2402.01306); the unpaired APO (arXiv:2408.06266). As in TRL, which the
tests hold it to, the model's drift from the base is estimated from answers to other prompts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import sigmoid

from trainer.methods.likelihood import of_answers
from trainer.methods.step import Method, Packer, Part
from trainer.packing import Item, Row


def learnt(items: Sequence[Item]) -> Sequence[Item]:
    """An item's examples are the answer, and the prompt with another's answer for the drift."""
    return [Item(item.examples[:1]) for item in items]


@torch.no_grad()
def drift(model: Any, items: Sequence[Item], pack: Packer) -> float:
    mismatched = pack([Item(item.examples[1:]) for item in items])
    before = sum(item.reference[1] for item in items)
    return float(of_answers(model, mismatched).sum()) - before


def loss(model: Any, row: Row, part: Part) -> Tensor:
    device, config = row.ids.device, part.config
    reference = torch.tensor([item.reference[0] for item in part.items], device=device)
    right = torch.tensor([item.desirable for item in part.items], device=device)
    # An answer that was wrong should be less likely than before.
    sign = torch.where(right, 1.0, -1.0)
    weight = torch.tensor([item.weight for item in part.items], device=device)
    weight = weight * torch.where(right, config.desirable_weight, config.undesirable_weight)
    ratios = of_answers(model, row) - reference
    moved = max(part.totals.drift, 0.0) if config.kto_loss == "kto" else 0.0
    losses = 1 - sigmoid(config.beta * sign * (ratios - moved))
    return (weight * losses).sum() / part.totals.items


KTO = Method(loss, needs_reference=True, learnt=learnt, drift=drift)
