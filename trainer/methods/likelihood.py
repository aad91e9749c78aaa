"""What the model makes of a row's answers: log-probabilities, at the learnt positions alone."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.packing import Row


def log_probabilities(model: Any, row: Row) -> Tensor:
    """Of each learnt token, in nats (targets,).

    The head is computed at the positions that have a target alone: for labels that is a few
    percent of them, and the head is the largest matrix of a small model.
    """
    return -functional.cross_entropy(
        target_logits(model, row).float(), row.targets, reduction="none"
    )


def of_answers(model: Any, row: Row) -> Tensor:
    """Of each example's answer: the sum over its tokens, each with its weight (examples,)."""
    weighted = log_probabilities(model, row) * row.weights
    return torch.zeros(row.examples, device=weighted.device).index_add(0, row.owners, weighted)


def lengths(row: Row) -> Tensor:
    """How many tokens of each example are learnt (examples,)."""
    ones = torch.ones_like(row.weights)
    return torch.zeros(row.examples, device=ones.device).index_add(0, row.owners, ones)


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
