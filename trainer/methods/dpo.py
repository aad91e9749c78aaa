"""Direct preference optimisation: the chosen answer above the rejected one, as seen from the base.

Rafailov et al., 2023 (arXiv:2305.18290); IPO by Azar et al., 2023 (arXiv:2310.12036), averaged over
tokens as its authors do; hinge from SLiC (arXiv:2309.06657); robust (arXiv:2403.00409); APO
(arXiv:2408.06266). The forms are those of TRL, and the tests hold them to it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, sigmoid

from trainer.config import TrainingConfig
from trainer.methods.likelihood import lengths, of_answers
from trainer.methods.step import Method, Part
from trainer.packing import Row


@dataclass(frozen=True, slots=True)
class Ratios:
    """How much more likely each answer is than under the base, in nats, and its length (pairs,)."""

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected

    @property
    def margin_by_token(self) -> Tensor:
        return self.chosen / self.chosen_length - self.rejected / self.rejected_length


def _sigmoid(ratios: Ratios, config: TrainingConfig) -> Tensor:
    return -logsigmoid(config.beta * ratios.margin)


def _sigmoid_norm(ratios: Ratios, config: TrainingConfig) -> Tensor:
    return -logsigmoid(config.beta * ratios.margin_by_token)


def _hinge(ratios: Ratios, config: TrainingConfig) -> Tensor:
    return relu(1 - config.beta * ratios.margin)


def _robust(ratios: Ratios, config: TrainingConfig) -> Tensor:
    """What the loss would be if a share of the labels were not swapped by mistake."""
    share = config.label_smoothing
    right = -logsigmoid(config.beta * ratios.margin)
    wrong = -logsigmoid(-config.beta * ratios.margin)
    return ((1 - share) * right - share * wrong) / (1 - 2 * share)


def _apo_zero(ratios: Ratios, config: TrainingConfig) -> Tensor:
    return 1 - sigmoid(config.beta * ratios.chosen) + sigmoid(config.beta * ratios.rejected)


def _apo_down(ratios: Ratios, config: TrainingConfig) -> Tensor:
    return sigmoid(config.beta * ratios.chosen) + 1 - sigmoid(config.beta * ratios.margin)


def _ipo(ratios: Ratios, config: TrainingConfig) -> Tensor:
    return (ratios.margin_by_token - 1 / (2 * config.beta)) ** 2


LOSSES: Mapping[str, Callable[[Ratios, TrainingConfig], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "robust": _robust,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "ipo": _ipo,
}


def loss(model: Any, row: Row, part: Part) -> Tensor:
    """Items are pairs: the chosen answer, then the rejected one. The mean over the step's pairs."""
    reference = torch.tensor([item.reference for item in part.items], device=row.ids.device)
    weight = torch.tensor([item.weight for item in part.items], device=row.ids.device)
    ratios = of_answers(model, row).view(-1, 2) - reference
    length = lengths(row).view(-1, 2)
    form = LOSSES["ipo" if part.config.method == "ipo" else part.config.dpo_loss]
    each = form(Ratios(ratios[:, 0], ratios[:, 1], length[:, 0], length[:, 1]), part.config)
    return (weight * each).sum() / part.totals.items


DPO = Method(loss, needs_reference=True)
