"""The training loop: rows in, a LoRA adapter out. Read it from top to bottom."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollout.errors import InvalidInputError
from trainer import checkpoint as checkpoints
from trainer.base import BaseModel
from trainer.checkpoint import Checkpoint
from trainer.config import TrainingConfig, auto_batch_tokens, auto_learning_rate
from trainer.methods import sft
from trainer.packing import Row, pack, plan_epoch
from trainer.rendering import Rendered

_LOSSES: dict[str, Callable[[Any, Row], Tensor]] = {"sft": sft.loss}


class StoppedError(Exception):
    """Asked to stop; the checkpoint is written."""


class DivergedError(InvalidInputError):
    """The loss is no number any more; a smaller learning rate may help."""

    code = "diverged"


@dataclass(frozen=True, slots=True)
class Progress:
    """After `done` of `total` steps. `loss` is the mean over the step's learnt tokens, in nats."""

    done: int
    total: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    eta: float
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """`tokens` is how many passed through, in all epochs."""

    steps: int
    tokens: int
    loss: float
    validation_loss: float | None
    learning_rate: float
    batch_tokens: int


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """Where and how often (in seconds) to save; `job` names what is trained."""

    folder: Path
    job: str
    seconds: float = 60.0


def choose_device(config: TrainingConfig) -> tuple[torch.device, torch.dtype]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.dtype == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return device, torch.bfloat16 if half else torch.float32
    return device, torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def load_base(base: BaseModel, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The base model and its tokenizer, from the disk alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base.path, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        base.path, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    return model.to(device), tokenizer


def add_adapter(model: Any, config: TrainingConfig) -> Any:
    """The base, frozen, with fresh LoRA weights: B is zero, so that step 0 is the base exactly."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    modules = config.target_modules
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        # Dropout would make the probes of training differ from those of serving; at these ranks
        # and lengths it buys nothing.
        lora_dropout=0.0,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # peft asks transformers for something by its former name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return get_peft_model(model, lora, autocast_adapter_dtype=True)
    except ValueError as exc:
        raise InvalidInputError(
            f"target_modules: none of them is in the base ({exc})", param="target_modules"
        ) from exc


def train(
    model: Any,
    examples: Sequence[Rendered],
    validation: Sequence[Rendered],
    config: TrainingConfig,
    *,
    on_step: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    checkpointing: Checkpointing | None = None,
) -> Trained:
    """Train the adapter of `model` in place.

    Raises StoppedError at the first step boundary after `should_stop` says so, with the state
    saved; called again with the same arguments it goes on from there and ends with the same
    weights. Raises DivergedError where the loss is no longer a number.
    """
    device = next(model.parameters()).device
    lengths = [len(example.ids) for example in examples]
    learning_rate = (
        auto_learning_rate(model.config.hidden_size)
        if config.learning_rate == "auto"
        else config.learning_rate
    )
    batch_tokens = (
        auto_batch_tokens(sum(lengths) * config.epochs, max(lengths))
        if config.batch_tokens == "auto"
        else config.batch_tokens
    )
    plan = [
        step
        for epoch in range(config.epochs)
        for step in plan_epoch(
            lengths,
            row_tokens=config.row_tokens,
            batch_tokens=batch_tokens,
            seed=config.seed,
            epoch=epoch,
        )
    ]
    epoch_ends = {len(plan) * (epoch + 1) // config.epochs for epoch in range(config.epochs)}
    share = _may_share(model, max(lengths))
    validation_rows = _validation_rows(validation, config.row_tokens, share=share)

    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay
    )
    first, tokens = 0, 0
    if checkpointing and (saved := checkpoints.load(checkpointing.folder, checkpointing.job)):
        _restore(trained, optimizer, saved)
        first, tokens = saved.step, saved.tokens
    loss_of_row = _LOSSES[config.method]
    loss, validation_loss = math.nan, None
    started = last_saved = time.monotonic()
    tokens_before = tokens

    model.train()
    for number in range(first, len(plan)):
        if should_stop():
            _save(checkpointing, trained, optimizer, number, tokens)
            raise StoppedError
        rate = learning_rate * schedule(number, len(plan), config)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # The step's loss is the mean over its learnt tokens, however they fall into rows.
        rows = [
            pack([examples[index] for index in row], share=share).to(device) for row in plan[number]
        ]
        learnt = sum(len(row.targets) for row in rows)
        loss = 0.0
        for row in rows:
            part = loss_of_row(model, row) / learnt
            part.backward()
            loss += part.item()
            tokens += row.tokens
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} at step {number + 1} of {len(plan)}: choose a learning_rate "
                f"below {learning_rate:g}",
                param="learning_rate",
            )
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = number + 1
        if done in epoch_ends and validation_rows:
            validation_loss = _mean_loss(model, validation_rows, loss_of_row, device)
        now = time.monotonic()
        speed = (tokens - tokens_before) / max(now - started, 1e-9)
        on_step(
            Progress(
                done=done,
                total=len(plan),
                loss=loss,
                learning_rate=rate,
                gradient_norm=float(norm),
                tokens=tokens,
                tokens_per_second=speed,
                eta=(now - started) / (done - first) * (len(plan) - done),
                validation_loss=validation_loss if done in epoch_ends else None,
            )
        )
        if checkpointing and now - last_saved >= checkpointing.seconds:
            _save(checkpointing, trained, optimizer, done, tokens)
            last_saved = now
    model.eval()
    return Trained(
        steps=len(plan),
        tokens=tokens,
        loss=loss,
        validation_loss=validation_loss,
        learning_rate=learning_rate,
        batch_tokens=batch_tokens,
    )


def schedule(step: int, total: int, config: TrainingConfig) -> float:
    """The share of the learning rate at a step: a rise, then half a cosine down to nothing."""
    warmup = max(1, round(total * config.warmup)) if config.warmup else 0
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _may_share(model: Any, longest: int) -> bool:
    """Whether one mask is right for every layer: none of them looks back less far than that."""
    window = getattr(model.config, "sliding_window", None)
    return window is None or longest <= window


def _validation_rows(examples: Sequence[Rendered], row_tokens: int, *, share: bool) -> list[Row]:
    plan = plan_epoch(
        [len(example.ids) for example in examples],
        row_tokens=row_tokens,
        batch_tokens=row_tokens,
        seed=0,
        epoch=0,
    )
    return [pack([examples[index] for index in row], share=share) for step in plan for row in step]


@torch.no_grad()
def _mean_loss(
    model: Any, rows: Sequence[Row], loss_of_row: Callable[[Any, Row], Tensor], device: torch.device
) -> float:
    model.eval()
    total = sum(loss_of_row(model, row.to(device)).item() for row in rows)
    model.train()
    return total / sum(len(row.targets) for row in rows)


def _save(
    checkpointing: Checkpointing | None,
    trained: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    step: int,
    tokens: int,
) -> None:
    if checkpointing is None:
        return
    weights = {name: each.detach().cpu() for name, each in trained.items()}
    state = Checkpoint(checkpointing.job, step, weights, optimizer.state_dict(), tokens)
    checkpoints.save(checkpointing.folder, state)


def _restore(trained: dict[str, Any], optimizer: torch.optim.Optimizer, saved: Checkpoint) -> None:
    with torch.no_grad():
        for name, each in trained.items():
            each.copy_(saved.weights[name])
    optimizer.load_state_dict(saved.optimizer)
