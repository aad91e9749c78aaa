"""The processes that train one adapter together, one for each GPU: what they must agree on."""

import os
from collections.abc import Iterable
from typing import Any, Protocol

import torch


class Ranks(Protocol):
    """`number` is this process's, of `count`. Number 0 speaks and writes for all."""

    number: int
    count: int

    def sum(self, value: float) -> float:
        """Over all processes; each gets the same."""
        ...

    def sum_gradients(self, parameters: Iterable[Any]) -> None:
        """Put the sum over all processes in place of each gradient."""
        ...


class Alone:
    """One process."""

    number = 0
    count = 1

    def sum(self, value: float) -> float:
        return value

    def sum_gradients(self, parameters: Iterable[Any]) -> None:
        """They are the sum already."""


class Together:
    """Several, started by `accelerate launch`. Each holds the whole model and takes its share of
    a step's rows, so the sum of their gradients is the gradient of the step."""

    def __init__(self) -> None:
        from accelerate import PartialState

        self._state = PartialState()
        # The state counts one process where a CPU is asked for; torch knows better.
        self.number = torch.distributed.get_rank()
        self.count = torch.distributed.get_world_size()

    @property
    def device(self) -> torch.device:
        device: torch.device = self._state.device
        return device

    def sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return float(total)

    def sum_gradients(self, parameters: Iterable[Any]) -> None:
        held = list(parameters)
        for each in held:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
        # One message: an adapter is hundreds of small matrices.
        flat = torch.cat([each.grad.reshape(-1) for each in held])
        torch.distributed.all_reduce(flat)
        for each, part in zip(held, flat.split([each.numel() for each in held]), strict=True):
            each.grad.copy_(part.view_as(each))


def join() -> Ranks:
    """What this process was started as."""
    return Together() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()
