"""What a bundle says of its weights: pins of all that decided them, probes of what they do."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from rollout.versions import Prompt
from trainer.base import BaseModel
from trainer.config import TrainingConfig
from trainer.dataset import Dataset
from trainer.rendering import TEMPLATE_ARGUMENTS, Rendered, with_prompt

PROBES_FILE: Final = "probes.json"
PINS_FILE: Final = "pins.json"

# Enough that no other adapter passes by chance, few enough that proving takes seconds.
_PROBES: Final = 8
_PROBED_TOKENS: Final = 64
_LIBRARIES: Final = ("sluice", "torch", "transformers", "peft", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt with an answer, and what the trainer's model gives its last tokens.

    `ids` are prompt and answer; `adapter` and `base` the log-probabilities (nats) of the last
    tokens of `ids`, with the adapter and without. `tools` are those that the prompt offers.
    """

    messages: Sequence[Mapping[str, Any]]
    ids: Sequence[int]
    prompt_tokens: int
    adapter: Sequence[float]
    base: Sequence[float]
    tools: Sequence[Mapping[str, Any]] = ()


def pins_of(
    base: BaseModel,
    base_revision: str | None,
    dataset: Dataset,
    config: TrainingConfig,
    prompt: Prompt | None,
) -> dict[str, Any]:
    """All that decides what comes out; nothing in it differs when the same is trained again."""
    pins: dict[str, Any] = {
        "base": base.name,
        "base_revision": base_revision,
        "base_sha256": dict(base.pins()),
        "chat_template_arguments": TEMPLATE_ARGUMENTS,
        "dataset": dataset.digest,
        "config": asdict(config),
        "config_digest": config.digest(),
        "prompt": None if prompt is None else asdict(prompt),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "code": _code_digest(),
    }
    text = json.dumps(pins, sort_keys=True)
    return {**pins, "job": hashlib.sha256(text.encode()).hexdigest()}


def _code_digest() -> str:
    """Of the trainer's own sources, for a version's number is the same for a day of changes."""
    total = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def probes_of(model: Any, dataset: Dataset, renderer: Any) -> list[Probe]:
    """`model` has its adapter, `renderer` is the run's `items.Renderer`."""
    import torch

    from trainer.items import answer_of
    from trainer.methods.likelihood import log_probabilities
    from trainer.packing import Item, pack

    probes: list[Probe] = []
    device = next(model.parameters()).device
    rows = dataset.split("heldout") or dataset.split("train")
    for row in rows:
        whole = renderer(row.case, row.messages, answer_of(row), row.tools)
        if whole is None:
            continue
        # The prompt's own tokens tell adapters apart as well as the answer's.
        probed = Rendered(whole.ids, max(1, len(whole.ids) - _PROBED_TOKENS))
        packed = pack([Item((probed,))]).to(device)
        with torch.no_grad():
            adapted = log_probabilities(model, packed).tolist()
            with model.disable_adapter():
                plain = log_probabilities(model, packed).tolist()
        probes.append(
            Probe(
                messages=with_prompt(row.messages, renderer.prompt),
                ids=list(whole.ids),
                prompt_tokens=whole.answer_start,
                adapter=[round(each, 6) for each in adapted],
                base=[round(each, 6) for each in plain],
                tools=row.tools,
            )
        )
        if len(probes) == _PROBES:
            break
    return probes


def rounding_of(model: Any, probes: Sequence[Probe], dtype: Any) -> float:
    """How far the base's log-probabilities move between float32 and bfloat16, in nats, on average
    over the probed tokens: what an engine in the other type may differ by. The model, which is in
    torch's `dtype`, is used up."""
    import torch

    from trainer.methods.likelihood import log_probabilities
    from trainer.packing import Item, pack

    model.to(torch.float32 if dtype == torch.bfloat16 else torch.bfloat16)
    device = next(model.parameters()).device
    differences: list[float] = []
    for probe in probes:
        count = len(probe.base)
        whole = Rendered(tuple(probe.ids), len(probe.ids) - count)
        with torch.no_grad(), model.disable_adapter():
            moved = log_probabilities(model, pack([Item((whole,))]).to(device)).float().tolist()
        differences += [abs(a - b) for a, b in zip(moved, probe.base, strict=True)]
    return round(sum(differences) / max(1, len(differences)), 6)
