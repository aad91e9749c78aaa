"""Supervised fine-tuning: the negative log-likelihood of the answers."""

from typing import Any

from torch import Tensor

from trainer.methods.likelihood import log_probabilities
from trainer.methods.step import Method, Part
from trainer.packing import Row


def loss(model: Any, row: Row, part: Part) -> Tensor:
    """The mean over the step's learnt tokens, each with its weight."""
    return -(log_probabilities(model, row) * row.weights).sum() / part.totals.tokens


SFT = Method(loss)
