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


def test_a_wider_base_learns_at_a_smaller_rate() -> None:
    assert 9e-4 < auto_learning_rate(576) < 1.2e-3
    assert auto_learning_rate(4096) < auto_learning_rate(2048) < auto_learning_rate(576)


def test_a_run_has_about_a_hundred_steps() -> None:
    assert auto_batch_tokens(100_000, longest=60) == 1000
    assert auto_batch_tokens(1_000, longest=60) == 256
    assert auto_batch_tokens(1_000, longest=700) == 700
    assert auto_batch_tokens(10**9, longest=60) == 8192
