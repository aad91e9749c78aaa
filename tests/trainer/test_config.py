"""A configuration is refused before a step is taken, with the field named."""

from typing import Any

import pytest

from rollout.errors import InvalidInputError, UnservableError
from trainer.config import TrainingConfig, auto_batch_tokens, auto_learning_rate


def test_the_defaults_stand() -> None:
    assert TrainingConfig.from_mapping({}, max_rank=16) == TrainingConfig()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", True),
        ("rank", "16"),
        ("epochs", 0),
        ("learning_rate", -1),
        ("learning_rate", "fast"),
        ("schedule", "linear"),
        ("method", "magic"),
        ("heldout", 0.95),
        ("target_modules", []),
        ("target_modules", 7),
        ("row_tokens", 16),
        ("prompt", ""),
        ("lora_rank", 8),
        ("rslora", 1),
        ("beta", 0.0),
        ("dpo_loss", "ipo"),
        ("label_smoothing", 0.1),
        ("teacher", "large"),
        ("patience", -1),
        ("weights", "half"),
        ("keep", "first"),
    ],
)
def test_a_wrong_value_is_refused_and_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidInputError) as refused:
        TrainingConfig.from_mapping({field: value})
    assert refused.value.param == field
    assert field in refused.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 64),
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("target_modules", ["q_proj", "lm_head"]),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "olora"),
        ("new_tokens", ["<tag>"]),
        ("lora_dropout", 0.1),
        ("use_qalora", True),
        ("lora_bias", True),
    ],
)
def test_what_the_engine_cannot_serve_is_refused_and_named(field: str, value: Any) -> None:
    with pytest.raises(UnservableError) as refused:
        TrainingConfig.from_mapping({field: value}, max_rank=16)
    assert refused.value.param == field


def test_asking_for_what_is_anyway_is_no_error() -> None:
    harmless = {"use_dora": False, "bias": "none", "modules_to_save": None}
    assert TrainingConfig.from_mapping(harmless) == TrainingConfig()


def test_the_digest_changes_with_every_setting_and_with_nothing_else() -> None:
    plain = TrainingConfig.from_mapping({})
    assert TrainingConfig.from_mapping({"rank": 16}).digest() == plain.digest()
    assert TrainingConfig.from_mapping({"rank": 8}).digest() != plain.digest()


def rate(hidden_size: int, **changes: Any) -> float:
    return auto_learning_rate(hidden_size, **{"steps": 120, **changes})


def test_a_wider_base_learns_at_a_smaller_rate() -> None:
    assert 9e-4 < rate(576) < 1.2e-3
    assert rate(4096) < rate(2048) < rate(576)


def test_an_adapter_learns_at_ten_times_the_rate_of_full_weights() -> None:
    assert rate(2000) == pytest.approx(10 * rate(2000, weights="full"))
    assert rate(2000, weights="qlora") == rate(2000)
    # Fifteen times in a short run.
    assert rate(2000, steps=99) == pytest.approx(15 * rate(2000, weights="full", steps=99))


def test_preferences_move_a_model_less() -> None:
    assert rate(2000, method="dpo") == pytest.approx(rate(2000) / 20)


def test_a_step_has_fewer_than_32_examples() -> None:
    assert auto_batch_tokens(10**6, longest=60, examples=20_000) == 31 * 50
    assert auto_batch_tokens(10**6, longest=3000, examples=20_000) == 3000


def test_a_run_has_about_a_hundred_steps() -> None:
    assert auto_batch_tokens(100_000, longest=60) == 1000
    assert auto_batch_tokens(1_000, longest=60) == 256
    assert auto_batch_tokens(1_000, longest=700) == 700
    assert auto_batch_tokens(10**9, longest=60) == 8192


def test_a_distillation_names_its_teacher() -> None:
    with pytest.raises(InvalidInputError) as refused:
        TrainingConfig.from_mapping({"method": "distill"})
    assert refused.value.param == "teacher"
    assert TrainingConfig.from_mapping({"method": "distill", "teacher": "large"}).teacher == "large"


def test_waiting_for_a_better_loss_needs_rows_to_measure_it_on() -> None:
    with pytest.raises(InvalidInputError) as refused:
        TrainingConfig.from_mapping({"patience": 2, "validation": 0.0})
    assert refused.value.param == "patience"
