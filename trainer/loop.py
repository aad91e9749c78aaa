"""The training loop: items in, trained weights out. Read it from top to bottom."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollout.errors import InvalidInputError
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Best, Checkpoint
from trainer.config import MethodName, TrainingConfig, auto_batch_tokens, auto_learning_rate
from trainer.methods.dpo import DPO
from trainer.methods.kto import KTO
from trainer.methods.orpo import ORPO
from trainer.methods.sft import SFT
from trainer.methods.step import Method, Packer, Part, Totals, totals_of
from trainer.packing import Item, pack, plan_epoch
from trainer.ranks import Alone, Ranks

METHODS: Mapping[MethodName, Method] = {
    "sft": SFT,
    "distill": SFT,
    "dpo": DPO,
    "ipo": DPO,
    "kto": KTO,
    "orpo": ORPO,
}
# The loss of fewer items than these says more about them than about the weights.
_FEWEST_TO_CHOOSE_BY = 32


class StoppedError(Exception):
    """Asked to stop; the checkpoint is written."""


class DivergedError(InvalidInputError):
    """The loss is no number any more; a smaller learning rate may help."""

    code = "diverged"


@dataclass(frozen=True, slots=True)
class Progress:
    """After `done` of `total` steps. `loss` is the step's, in nats."""

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
    """`steps` were done and `kept` is the one whose weights are kept. `tokens` is how many passed
    through, in all epochs."""

    steps: int
    tokens: int
    loss: float
    validation_loss: float | None
    learning_rate: float
    batch_tokens: int
    kept: int


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """Where and how often (in seconds) to save; `job` names what is trained."""

    folder: Path
    job: str
    seconds: float = 60.0


def train(
    model: Any,
    items: Sequence[Item],
    validation: Sequence[Item],
    config: TrainingConfig,
    *,
    on_step: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    checkpointing: Checkpointing | None = None,
    ranks: Ranks | None = None,
) -> Trained:
    """Train what of `model` wants gradients, in place.

    Raises StoppedError at the first step boundary after `should_stop` says so, with the state
    saved; called again with the same arguments it goes on from there and ends with the same
    weights. Raises DivergedError where the loss is no longer a number.
    """
    ranks = Alone() if ranks is None else ranks
    method = METHODS[config.method]
    device = next(model.parameters()).device
    packer = packer_for(model, [*items, *validation], device)
    plan, batch_tokens = plan_run(items, config)
    learning_rate = (
        auto_learning_rate(
            model.config.get_text_config().hidden_size,
            steps=len(plan),
            weights=config.weights,
            method=config.method,
        )
        if config.learning_rate == "auto"
        else config.learning_rate
    )
    measured = measuring_points(len(plan), config) if validation else frozenset()
    choosing = config.keep == "best" and len(validation) >= _FEWEST_TO_CHOOSE_BY

    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=learning_rate,
        betas=(0.9, 0.999),
        weight_decay=config.weight_decay,
        fused=True,
    )
    first, tokens, best = 0, 0, Best()
    if checkpointing and (saved := checkpoints.load(checkpointing.folder, checkpointing.job)):
        _restore(trained, optimizer, saved)
        first, tokens, best = saved.step, saved.tokens, saved.best
    loss, validation_loss, done = math.nan, best.last, first
    started = last_saved = time.monotonic()
    tokens_before = tokens

    model.train()
    for number in range(first, len(plan)):
        if ranks.sum(float(should_stop())):
            _save(checkpointing, ranks, trained, optimizer, number, tokens, best)
            raise StoppedError
        rate = learning_rate * schedule(number, len(plan), config)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # The step's loss is the mean over all that it learns, however that falls into rows. The
        # rows are the parts of gradient accumulation, and each process takes its share of them.
        parts = [[items[index] for index in row] for row in plan[number]]
        mine = parts[ranks.number :: ranks.count]
        totals = totals_with_drift(totals_of(parts), model, method, mine, packer, ranks)
        part_losses: list[Tensor] = []
        for part in mine:
            row = packer(method.learnt(part))
            with in_half(model):
                part_loss = method.loss(model, row, Part(part, totals, config))
            part_loss.backward()
            part_losses.append(part_loss.detach())
        tokens += sum(len(each.ids) for part in parts for item in part for each in item.examples)
        loss = ranks.sum(sum(each.item() for each in part_losses))
        if not math.isfinite(loss):
            # Before the first step nothing was learnt yet that could be at fault.
            cure = (
                f"choose a learning_rate below {learning_rate:g}"
                if number
                else "the base itself gives no number: its weights are damaged, or too large for "
                "its type"
            )
            raise DivergedError(
                f"the loss is {loss} at step {number + 1} of {len(plan)}: {cure}",
                param="learning_rate",
            )
        ranks.sum_gradients(trained.values())
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = number + 1
        if done in measured:
            validation_loss = _validate(model, method, validation, packer, config, ranks)
            best = _judge(best, validation_loss, done, trained if choosing else {})
        now = time.monotonic()
        on_step(
            Progress(
                done=done,
                total=len(plan),
                loss=loss,
                learning_rate=rate,
                gradient_norm=float(norm),
                tokens=tokens,
                tokens_per_second=(tokens - tokens_before) / max(now - started, 1e-9),
                eta=(now - started) / (done - first) * (len(plan) - done),
                validation_loss=validation_loss if done in measured else None,
            )
        )
        if config.patience and best.worse >= config.patience:
            break
        if checkpointing and now - last_saved >= checkpointing.seconds:
            _save(checkpointing, ranks, trained, optimizer, done, tokens, best)
            last_saved = now
    model.eval()
    kept = done
    if best.weights and best.step < done:
        _put(trained, best.weights)
        kept, validation_loss = best.step, best.loss
    return Trained(
        steps=done,
        tokens=tokens,
        loss=loss,
        validation_loss=validation_loss,
        learning_rate=learning_rate,
        batch_tokens=batch_tokens,
        kept=kept,
    )


def plan_run(items: Sequence[Item], config: TrainingConfig) -> tuple[list[list[list[int]]], int]:
    """The steps of all epochs, and how many tokens a step has."""
    lengths = [len(item) for item in items]
    batch_tokens = (
        auto_batch_tokens(
            sum(lengths) * config.epochs, max(lengths), examples=len(items) * config.epochs
        )
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
    return plan, batch_tokens


def measuring_points(steps: int, config: TrainingConfig) -> frozenset[int]:
    """After which steps the validation loss is measured: evenly, and at the end."""
    count = config.epochs * config.validations
    return frozenset(max(1, steps * (each + 1) // count) for each in range(count))


def schedule(step: int, total: int, config: TrainingConfig) -> float:
    """The share of the learning rate at a step: a rise, then half a cosine down to nothing."""
    warmup = max(1, round(total * config.warmup)) if config.warmup else 0
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def packer_for(model: Any, items: Sequence[Item], device: torch.device) -> Packer:
    """Packs rows for the model, sharing prompts where one mask is right for every layer: none of
    them looks back less far than the longest example."""
    longest = max(len(each.ids) for item in items for each in item.examples)
    window = getattr(model.config, "sliding_window", None)
    share = window is None or longest <= window
    return lambda some: pack(some, share=share).to(device)


def in_half(model: Any) -> contextlib.AbstractContextManager[Any]:
    """On a GPU that has it, products are in bfloat16 while what is trained stays in float32."""
    device = next(model.parameters()).device
    if device.type != "cuda" or not torch.cuda.is_bf16_supported():
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16)


def totals_with_drift(
    totals: Totals,
    model: Any,
    method: Method,
    parts: Sequence[Sequence[Item]],
    packer: Packer,
    ranks: Ranks | None = None,
) -> Totals:
    """With how far the model has moved; `parts` are this process's."""
    if method.drift is None:
        return totals
    with in_half(model):
        drift = sum(method.drift(model, part, packer) for part in parts)
    return replace(totals, drift=(ranks or Alone()).sum(drift) / totals.count)


@torch.no_grad()
def _validate(
    model: Any,
    method: Method,
    items: Sequence[Item],
    packer: Packer,
    config: TrainingConfig,
    ranks: Ranks,
) -> float:
    plan = plan_epoch(
        [len(item) for item in items],
        row_tokens=config.row_tokens,
        batch_tokens=config.row_tokens,
        seed=0,
        epoch=0,
    )
    parts = [[items[index] for index in row] for step in plan for row in step]
    mine = parts[ranks.number :: ranks.count]
    model.eval()
    totals = totals_with_drift(totals_of(parts), model, method, mine, packer, ranks)
    total = 0.0
    for part in mine:
        with in_half(model):
            row = packer(method.learnt(part))
            total += method.loss(model, row, Part(part, totals, config)).item()
    model.train()
    return ranks.sum(total)


def _judge(best: Best, loss: float, step: int, trained: Mapping[str, Any]) -> Best:
    """What is known of the best weights after another measurement."""
    if loss < best.loss:
        weights = {name: each.detach().cpu().clone() for name, each in trained.items()}
        return Best(loss=loss, last=loss, step=step, worse=0, weights=weights)
    return replace(best, last=loss, worse=best.worse + 1)


def _save(
    checkpointing: Checkpointing | None,
    ranks: Ranks,
    trained: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    step: int,
    tokens: int,
    best: Best,
) -> None:
    if checkpointing is None or ranks.number:
        return
    weights = {name: each.detach().cpu() for name, each in trained.items()}
    state = Checkpoint(checkpointing.job, step, weights, optimizer.state_dict(), tokens, best)
    checkpoints.save(checkpointing.folder, state)


def _restore(trained: dict[str, Any], optimizer: torch.optim.Optimizer, saved: Checkpoint) -> None:
    _put(trained, saved.weights)
    optimizer.load_state_dict(saved.optimizer)


@torch.no_grad()
def _put(trained: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    for name, each in trained.items():
        each.copy_(weights[name])
