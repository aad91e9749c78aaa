"""Supervised fine-tuning: the negative log-likelihood of the answers."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.packing import Row


def loss(model: Any, row: Row) -> Tensor:
    """The summed loss over the row's learnt tokens (a scalar); the loop divides by their number.

    The head is computed at the positions that have a target alone: for labels that is a few
    percent of them, and the head is the largest matrix of a small model.
    """
    return functional.cross_entropy(target_logits(model, row).float(), row.targets, reduction="sum")


def log_probabilities(model: Any, row: Row) -> Tensor:
    """Of each learnt token, in nats (targets,)."""
    logits = target_logits(model, row).float()
    return torch.log_softmax(logits, dim=-1).gather(-1, row.targets.unsqueeze(-1)).squeeze(-1)


def target_logits(model: Any, row: Row) -> Tensor:
    """What predicts each learnt token (targets, vocabulary).

    With `attention_mask=None` and `use_cache=False` transformers reads from the positions where
    one example ends and keeps them apart; with a mask of ones, or a cache, it silently mixes them.
    A mask of four dimensions is taken as it is.
    """
    output = model(
        input_ids=row.ids,
        position_ids=row.positions,
        attention_mask=row.mask,
        use_cache=False,
        logits_to_keep=row.kept,
    )
    logits: Tensor = output.logits[0]
    return logits
