"""A tiny model with an adapter, and examples that it can learn."""

from typing import Any

import torch

from tests.trainer.samples import sentences
from trainer import models
from trainer.base import BaseModel
from trainer.config import TrainingConfig
from trainer.rendering import Rendered, render

CPU = torch.device("cpu")


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig.from_mapping({"row_tokens": 128, "max_length": 128, **changes})


def fresh(base: BaseModel, settings: TrainingConfig) -> Any:
    # On matrices this small threads wait for each other most of the time.
    torch.set_num_threads(1)
    return models.load_for(base, settings, CPU, torch.float32)


def lora_parameters(model: Any) -> dict[str, Any]:
    return {n: each for n, each in model.named_parameters() if each.requires_grad}


def lora(model: Any) -> dict[str, torch.Tensor]:
    return {n: each.detach() for n, each in lora_parameters(model).items()}


def trained_a_little(base: BaseModel, settings: TrainingConfig | None = None) -> Any:
    """B is not zero, so that A has gradients too."""
    model = fresh(base, settings or config())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in lora_parameters(model).values():
            each.add_(0.02 * torch.randn(each.shape, generator=generator))
    return model


def rendered(tokenizer: Any, count: int, *, instruction: str = "") -> list[Rendered]:
    system = [{"role": "system", "content": instruction}] if instruction else []
    return [
        render(
            tokenizer,
            [*system, *row.case.messages],
            row.case.stable.text,
            stops=frozenset({tokenizer.eos_token_id}),
            max_length=128,
        )
        for row in sentences(count)
    ]
