"""An adapter directory, written the same way each time."""

import json
from pathlib import Path
from typing import Any

from rollout.adapters import CONFIG_FILE, WEIGHTS_FILE


def save_full(model: Any, tokenizer: Any, folder: Path, dtype: Any) -> None:
    """Write a whole model, as an engine takes it for a base."""
    model.to(dtype).save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))


def save_adapter(model: Any, folder: Path, base_name: str) -> None:
    """Write the trained adapter, with nothing in it that differs from machine to machine."""
    model.save_pretrained(str(folder), safe_serialization=True)
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    # PEFT writes the trainer's own path of the base, and its module names in a set's order.
    config["base_model_name_or_path"] = base_name
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for each in folder.iterdir():
        if each.name not in (WEIGHTS_FILE, CONFIG_FILE):
            each.unlink()
