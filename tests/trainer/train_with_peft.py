"""A foreign trainer: plain transformers and PEFT, as an operator's own script would be."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("dataset", "base", "output", "config"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=8)
    for name in ("untrained", "dora", "nothing", "other-base"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(argv)
    if options.nothing:
        return
    settings = json.loads(options.config.read_text())
    rows = [json.loads(line) for line in options.dataset.read_text().splitlines()]
    tokenizer: Any = AutoTokenizer.from_pretrained(options.base)
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(options.base),
        LoraConfig(r=options.rank, target_modules=["q_proj", "v_proj"], use_dora=options.dora),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for row in [] if options.untrained else rows * settings["epochs"]:
        text = [*row["prompt"], *row["completion"]]
        ids = torch.tensor([tokenizer.apply_chat_template(text, return_dict=False)])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained on {len(rows)} rows", flush=True)  # noqa: T201 - its log
    if options.other_base:
        model.peft_config["default"].base_model_name_or_path = "somebody/elses"
    model.save_pretrained(options.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
