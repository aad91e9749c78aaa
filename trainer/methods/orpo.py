"""Odds ratio preference optimisation: likelihood and preference at once, without a reference.

Hong, Lee and Thorne, 2024 (arXiv:2403.07691). TRL, like the authors' code, learns the prompt's
tokens too (`orpo_learns = "all"`); the paper's formula, and the default here, is the answer alone.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.methods.likelihood import lengths, of_answers
from trainer.methods.step import Method, Part
from trainer.packing import Row
from trainer.rendering import Rendered


def loss(model: Any, row: Row, part: Part) -> Tensor:
    """Items are pairs: the chosen answer, then the rejected one; a third example, where there is
    one, is what is learnt by likelihood in place of the chosen answer."""
    each = len(part.items[0].examples)
    weight = torch.tensor([item.weight for item in part.items], device=row.ids.device)
    sums = of_answers(model, row).view(-1, each)
    means = sums / lengths(row).view(-1, each)
    chosen, rejected = means[:, 0], means[:, 1]
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    likelihood = -sums[:, 2 if each > 2 else 0].sum() / part.totals.tokens
    return likelihood - part.config.beta * (weight * logsigmoid(odds)).sum() / part.totals.items


ORPO = Method(loss)


def prompt_learnt_too(example: Rendered) -> Rendered:
    """All its tokens but the first, which nothing predicts."""
    return Rendered(example.ids, 1)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, by the form that is exact on each side of -log 2."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
