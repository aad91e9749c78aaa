"""The model of a run: the base in memory, and what of it is trained."""

import importlib.util
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from rollout.errors import InvalidInputError, UnservableError
from trainer.base import BaseModel
from trainer.config import TrainingConfig

# What holds the probabilities of tokens is adapted by no engine.
_HEADS = re.compile(r"(^|\.)(lm_head|embed_tokens|wte|embed_in|embed_out)$")


def choose_device(config: TrainingConfig) -> tuple[torch.device, torch.dtype]:
    """Where the run is computed, and in what the base is held."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.weights == "full":
        # Small steps vanish in bfloat16; on a GPU the products are in it all the same.
        return device, torch.float32
    if config.dtype == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return device, torch.bfloat16 if half else torch.float32
    return device, torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def check_machine(config: TrainingConfig) -> None:
    """Raises UnservableError that names what this machine lacks for the run."""
    if config.weights != "qlora":
        return
    missing = [
        name
        for name, there in (
            ("an NVIDIA GPU", torch.cuda.is_available()),
            ("the package bitsandbytes", importlib.util.find_spec("bitsandbytes") is not None),
        )
        if not there
    ]
    if missing:
        raise UnservableError(
            f"weights = 'qlora' holds the base in four bits, for which this machine lacks "
            f"{' and '.join(missing)}; take weights = 'lora', or a machine that has it",
            param="weights",
        )


def check_modules(base: BaseModel, config: TrainingConfig) -> None:
    """Raises InvalidInputError for a name among `target_modules` that the base has no matrix of.

    PEFT passes over a name that fits nothing as long as another one does.
    """
    if isinstance(config.target_modules, str) or config.weights == "full":
        return
    shapes = base.shapes()
    matrices = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    ]
    for wanted in config.target_modules:
        found = [name for name in matrices if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            there = sorted(
                {name.rsplit(".", 1)[-1] for name in matrices if not _HEADS.search(name)}
            )
            raise InvalidInputError(
                f"target_modules: the base has no matrix {wanted!r}; it has {', '.join(there)}",
                param="target_modules",
            )
        if any(_HEADS.search(name) for name in found):
            raise UnservableError(
                f"target_modules: {wanted} cannot be adapted on the engine; leave it out",
                param="target_modules",
            )


def stored_dtype(base: BaseModel) -> torch.dtype:
    """In what the base itself is stored, so that a model made of it is no larger."""
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    found = getattr(torch, str(name), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32


def load_tokenizer(base: BaseModel) -> Any:
    """From the disk alone."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.path, local_files_only=True)


def load_base(base: BaseModel, device: torch.device, dtype: torch.dtype) -> Any:
    """The base as the engine serves it, from the disk alone."""
    return _load(base, dtype).to(device)


def load_for(
    base: BaseModel, config: TrainingConfig, device: torch.device, dtype: torch.dtype
) -> Any:
    """The base with what of it the run trains."""
    check_machine(config)
    if config.weights == "qlora":
        model = _load(base, dtype, quantization_config=_four_bits(), device_map={"": device})
    else:
        model = load_base(base, device, dtype)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model if config.weights == "full" else add_adapter(model, config)


def add_adapter(model: Any, config: TrainingConfig) -> Any:
    """The base, frozen, with fresh LoRA weights: B is zero, so that step 0 is the base exactly."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    modules = config.target_modules
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.rslora,
        # Dropout would make the probes of training differ from those of serving; at these ranks
        # and lengths it buys nothing.
        lora_dropout=0.0,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type="CAUSAL_LM",
    )
    try:
        with _quiet():
            return get_peft_model(model, lora, autocast_adapter_dtype=True)
    except ValueError as exc:
        raise InvalidInputError(
            f"target_modules: none of them is in the base ({exc})", param="target_modules"
        ) from exc


def with_adapter(model: Any, folder: Path) -> Any:
    """The base with an adapter from the disk, to look at and not to train."""
    from peft import PeftModel

    with _quiet():
        return PeftModel.from_pretrained(model, str(folder)).eval()


def _load(base: BaseModel, dtype: torch.dtype, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        base.path, dtype=dtype, attn_implementation="sdpa", local_files_only=True, **options
    )


def _four_bits() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


class _quiet(warnings.catch_warnings):  # noqa: N801 - used as a function
    """peft asks transformers for something by its former name."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return entered
