"""One of the processes that share a run: trains the tiny model and writes what came out."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.trainer.tiny import CPU, config, fresh, lora, rendered
from trainer import loop, models
from trainer.base import BaseModel
from trainer.items import with_mismatched
from trainer.loop import Progress
from trainer.methods.reference import with_reference
from trainer.packing import Item
from trainer.ranks import join


def train(model_dir: Path, method: str) -> tuple[Any, list[Progress]]:
    base = BaseModel.open("tiny", model_dir)
    settings = config(method=method, epochs=2, batch_tokens=384, learning_rate=1e-3)
    model = fresh(base, settings)
    examples = rendered(models.load_tokenizer(base), 12)
    items = [Item((each,), desirable=place % 3 > 0) for place, each in enumerate(examples)]
    if method == "kto":
        items = with_mismatched(items)
        items = with_reference(model, items, loop.packer_for(model, items, CPU), row_tokens=128)
    steps: list[Progress] = []
    loop.train(
        model,
        items,
        items[:8],
        settings,
        on_step=steps.append,
        should_stop=lambda: False,
        ranks=join(),
    )
    return model, steps


def main(model_dir: str, folder: str, method: str) -> None:
    torch.set_num_threads(1)
    model, steps = train(Path(model_dir), method)
    weights = {name: each.clone() for name, each in lora(model).items()}
    found = [(each.loss, each.gradient_norm, each.validation_loss) for each in steps]
    torch.save((weights, found), Path(folder) / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
