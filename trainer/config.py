"""What a training run may be asked to do, checked before a step is taken."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from rollout.errors import InvalidInputError, UnservableError

# Settings that PEFT knows and the engine refuses, or serves as something else than was trained.
_UNSERVABLE: Mapping[str, tuple[object, str]] = {
    "use_dora": (False, "the engine refuses DoRA adapters"),
    "use_qalora": (False, "the engine refuses QALoRA adapters"),
    "bias": ("none", "the engine refuses adapters with biases"),
    "lora_bias": (False, "the engine refuses adapters with biases"),
    "modules_to_save": (None, "the engine refuses whole modules beside the adapter"),
    "layer_replication": (None, "the engine cannot replicate layers"),
    "target_parameters": (None, "the engine adapts modules, not single parameters"),
    "alora_invocation_tokens": (None, "the engine refuses activated LoRA"),
    "trainable_token_indices": (None, "the engine cannot serve new or changed tokens"),
    "new_tokens": (None, "the engine cannot serve new or changed tokens"),
    "resize_token_embeddings": (False, "the engine cannot serve new or changed tokens"),
    "init_lora_weights": (True, "initialisations that change the base cannot be served"),
    "loftq_config": (None, "initialisations that change the base cannot be served"),
    "eva_config": (None, "initialisations that change the base cannot be served"),
    "corda_config": (None, "initialisations that change the base cannot be served"),
    "lora_dropout": (0, "the probes of training would differ from those of serving"),
}
MethodName = Literal["sft", "dpo", "ipo", "kto", "orpo", "distill"]
Weights = Literal["lora", "qlora", "full"]
# Methods that hold answers against each other start from a model that answers already.
PREFERENCE_METHODS: frozenset[MethodName] = frozenset({"dpo", "ipo", "kto", "orpo"})

_UNSERVABLE_MODULES = frozenset({"lm_head", "embed_tokens"})


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Everything that decides which adapter comes out, beside the dataset and the base.

    method: "sft", "dpo", "ipo", "kto", "orpo", or "distill": "sft" on what a `teacher` answered.
    backend: "sluice" is the loop here; "external" the command of `[trainer.external]`.
    weights: which are trained: "lora"; "qlora", over a base held in four bits; "full", all of
        them, which makes a model of its own that no engine can load as an adapter.
    rank, alpha: LoRA's; the update is scaled by alpha/rank.
    rslora: scaled by alpha/sqrt(rank) instead.
    target_modules: "all-linear" (all but the head), or names such as "q_proj".
    learning_rate, batch_tokens (tokens in one optimizer step): "auto" as `auto_*` below.
    row_tokens: tokens packed into one forward pass, at least `max_length`.
    max_length: longer examples are dropped and counted.
    warmup: share of the steps over which the learning rate rises.
    beta: how far preferences may move the model from the base; IPO's tau, ORPO's lambda.
    dpo_loss: the form of `dpo`; "sigmoid_norm" holds answers of different lengths against each
        other by the token. ld_alpha: the weight of an answer's tokens beyond the length of its
        pair's shorter one. label_smoothing: the share of swapped labels that "robust" expects.
    kto_loss, desirable_weight, undesirable_weight: of `kto`.
    orpo_learns: what of the chosen side ORPO learns by likelihood.
    teacher: the route whose accepted answers `distill` learns.
    gradient_checkpointing: compute activations twice instead of keeping them: less memory, slower.
    heldout, validation: shares of the prompt clusters that are never trained on; the first
        evaluates the adapter where the route has no suite, the second only watches the loss.
    validations: how often in an epoch the validation loss is measured.
    patience: stop after so many measurements without a better one; 0 is never.
    keep: the weights of the lowest validation loss, or the last ones.
    prompt: what the new version puts before the client's messages, in training as in serving:
        "parent" (what its parent does), "none", or a version's name (what that one does).
    minimum_rows: fewer rows to train on refuse the run.
    evaluation_rows: at most so many rows are evaluated; 0 is all of them.
    dtype: "auto" is bfloat16 on a GPU that has it, else float32.
    """

    method: MethodName = "sft"
    backend: Literal["sluice", "external"] = "sluice"
    weights: Weights = "lora"
    rank: int = 16
    alpha: int = 32
    rslora: bool = False
    target_modules: str | tuple[str, ...] = "all-linear"
    learning_rate: float | Literal["auto"] = "auto"
    epochs: int = 2
    batch_tokens: int | Literal["auto"] = "auto"
    row_tokens: int = 1024
    max_length: int = 1024
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    beta: float = 0.1
    dpo_loss: Literal["sigmoid", "sigmoid_norm", "hinge", "robust", "apo_zero", "apo_down"] = (
        "sigmoid"
    )
    ld_alpha: float = 1.0
    label_smoothing: float = 0.0
    kto_loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    orpo_learns: Literal["answer", "all"] = "answer"
    teacher: str = ""
    gradient_checkpointing: bool = False
    heldout: float = 0.2
    validation: float = 0.05
    validations: int = 1
    patience: int = 0
    keep: Literal["best", "last"] = "best"
    prompt: str = "parent"
    minimum_rows: int = 20
    evaluation_rows: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @classmethod
    def from_mapping(
        cls, values: Mapping[str, Any], *, max_rank: int | None = None
    ) -> "TrainingConfig":
        """The defaults with `values` on top.

        Raises InvalidInputError that names the field, and UnservableError where the result could
        not be served by an engine that takes ranks up to `max_rank`.
        """
        known = {field.name for field in fields(cls)}
        chosen: dict[str, Any] = {}
        for name, value in values.items():
            if name in _UNSERVABLE:
                _refuse_unservable(name, value)
            elif name not in known:
                raise InvalidInputError(
                    f"{name}: there is no such training setting; there are {', '.join(sorted(known))}",
                    param=name,
                )
            else:
                chosen[name] = _CHECKS[name](name, value)
        config = cls(**chosen)
        _check_servable(config, max_rank)
        _check_together(config)
        return config

    def digest(self) -> str:
        """Names the configuration: equal for equal settings (64 hex digits)."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


# LoRA wants ten times the learning rate of full fine-tuning, fifteen times in runs this short.
_SHORT_RUN = 100
# LoRA bears large batches worse than full fine-tuning does.
_MOST_EXAMPLES = 31


def auto_learning_rate(
    hidden_size: int, *, steps: int, weights: Weights = "lora", method: MethodName = "sft"
) -> float:
    """The learning rate for a base of that width and a run of that length.

    From "LoRA Without Regret" (Schulman and Thinking Machines, 2025): ten times the best rate of
    full fine-tuning, fifteen times under a hundred steps, and its width law for Llama. The law's
    factor is set so that a width of 576 gets 1.06e-3, which was measured to do well on
    SmolLM2-135M. Preferences get a twentieth, which is how TRL's defaults for DPO and SFT differ.
    """
    times = 1.0 if weights == "full" else 15.0 if steps < _SHORT_RUN else 10.0
    share = 0.05 if method in PREFERENCE_METHODS else 1.0
    return float(f"{4e-5 * times * share * (2000 / hidden_size) ** 0.781:.3g}")


def auto_batch_tokens(tokens_in_all: int, longest: int, *, examples: int | None = None) -> int:
    """Tokens a step: about a hundred steps for the whole run, and never less than one example.

    `examples` are how many there are in those tokens: a step has fewer than 32 of them, where
    LoRA still learns as full fine-tuning does (the same source).
    """
    wanted = min(max(tokens_in_all // 100, 256), 8192)
    if examples:
        wanted = min(wanted, _MOST_EXAMPLES * tokens_in_all // examples)
    return max(longest, wanted)


def _refuse_unservable(name: str, value: object) -> None:
    harmless, why = _UNSERVABLE[name]
    if value != harmless and value is not None:
        raise UnservableError(f"{name} = {value!r}: {why}; leave it out", param=name)


def _check_servable(config: TrainingConfig, max_rank: int | None) -> None:
    if max_rank is not None and config.rank > max_rank:
        raise UnservableError(
            f"rank = {config.rank}: the engine accepts ranks up to {max_rank}; choose a smaller one, "
            "or raise the engine's --max-lora-rank and its `max_rank` in the configuration",
            param="rank",
        )
    if config.weights == "full" and config.backend == "external":
        raise UnservableError(
            "weights = 'full': what comes from an external trainer is admitted as an adapter only",
            param="weights",
        )
    if isinstance(config.target_modules, tuple):
        bad = sorted(_UNSERVABLE_MODULES.intersection(config.target_modules))
        if bad:
            raise UnservableError(
                f"target_modules: {', '.join(bad)} cannot be adapted on the engine; leave it out",
                param="target_modules",
            )


def _check_together(config: TrainingConfig) -> None:
    if (config.method == "distill") != bool(config.teacher):
        raise InvalidInputError(
            "method = 'distill' learns from a teacher, and only that does: name the larger route, as "
            "in teacher=support-large",
            param="teacher",
        )
    if config.label_smoothing and config.dpo_loss != "robust":
        raise InvalidInputError(
            "label_smoothing is of dpo_loss = 'robust' alone", param="label_smoothing"
        )
    if config.patience and config.validation == 0.0:
        raise InvalidInputError(
            "patience waits for a better validation loss: give validation a share of the rows",
            param="patience",
        )
    if config.row_tokens < config.max_length:
        raise InvalidInputError(
            f"row_tokens = {config.row_tokens} is less than max_length = {config.max_length}: the "
            "longest example must fit into a row",
            param="row_tokens",
        )
    if config.heldout + config.validation >= 1:
        raise InvalidInputError(
            "heldout and validation together leave nothing to train on", param="heldout"
        )


Check = Callable[[str, Any], Any]


def _whole(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidInputError(
                f"{name} = {value!r}: give a whole number from {low} to {high}", param=name
            )
        return value

    return check


def _number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> float:
        number = not isinstance(value, bool) and isinstance(value, int | float)
        if not (number and low <= value <= high):
            raise InvalidInputError(
                f"{name} = {value!r}: give a number from {low:g} to {high:g}", param=name
            )
        return float(value)

    return check


def _one_of(*allowed: str) -> Check:
    def check(name: str, value: Any) -> str:
        if value not in allowed:
            raise InvalidInputError(
                f"{name} = {value!r}: choose one of {', '.join(allowed)}", param=name
            )
        return str(value)

    return check


def _or_auto(check: Check) -> Check:
    return lambda name, value: value if value == "auto" else check(name, value)


def _modules(name: str, value: Any) -> str | tuple[str, ...]:
    if value == "all-linear":
        return "all-linear"
    if (
        isinstance(value, list | tuple)
        and value
        and all(isinstance(each, str) and each for each in value)
    ):
        return tuple(sorted(set(value)))
    raise InvalidInputError(
        f'{name} = {value!r}: give "all-linear" or a list of module names such as "q_proj"',
        param=name,
    )


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidInputError(f"{name} = {value!r}: give true or false", param=name)
    return value


def _maybe_text(name: str, value: Any) -> str:
    return "" if value in (None, "") else _text(name, value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidInputError(f"{name} = {value!r}: give a text", param=name)
    return value


_CHECKS: Mapping[str, Check] = {
    "method": _one_of("sft", "dpo", "ipo", "kto", "orpo", "distill"),
    "backend": _one_of("sluice", "external"),
    "weights": _one_of("lora", "qlora", "full"),
    "rank": _whole(1, 512),
    "alpha": _whole(1, 4096),
    "rslora": _flag,
    "target_modules": _modules,
    "learning_rate": _or_auto(_number(1e-8, 1.0)),
    "epochs": _whole(1, 1000),
    "batch_tokens": _or_auto(_whole(1, 1 << 24)),
    "row_tokens": _whole(8, 1 << 20),
    "max_length": _whole(8, 1 << 20),
    "schedule": _one_of("cosine", "constant"),
    "warmup": _number(0.0, 1.0),
    "weight_decay": _number(0.0, 1.0),
    "max_grad_norm": _number(1e-6, 1e6),
    "seed": _whole(0, 2**31 - 1),
    "beta": _number(1e-6, 100.0),
    "dpo_loss": _one_of("sigmoid", "sigmoid_norm", "hinge", "robust", "apo_zero", "apo_down"),
    "ld_alpha": _number(0.0, 1.0),
    "label_smoothing": _number(0.0, 0.49),
    "kto_loss": _one_of("kto", "apo_zero_unpaired"),
    "desirable_weight": _number(0.0, 100.0),
    "undesirable_weight": _number(0.0, 100.0),
    "orpo_learns": _one_of("answer", "all"),
    "teacher": _maybe_text,
    "gradient_checkpointing": _flag,
    "validations": _whole(1, 100),
    "patience": _whole(0, 1000),
    "keep": _one_of("best", "last"),
    "heldout": _number(0.0, 0.9),
    "validation": _number(0.0, 0.9),
    "prompt": _text,
    "minimum_rows": _whole(1, 1 << 30),
    "evaluation_rows": _whole(0, 1 << 30),
    "dtype": _one_of("auto", "float32", "bfloat16"),
}
