"""Adapters that the engine cannot serve, or would serve as nothing, are refused by name."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rollout.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    base_of,
    check_adapter,
    read_base_shapes,
)
from rollout.errors import UnservableError
from trainer.base import BaseModel

Weights = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def adapter(tiny_adapters: Mapping[str, Path], tmp_path: Path) -> Path:
    """A copy of a servable adapter, to be spoiled."""
    return Path(shutil.copytree(tiny_adapters["first"], tmp_path / "adapter"))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / WEIGHTS_FILE
    save_file(change(load_file(path)), path)


def refusal(folder: Path, **options: Any) -> str | None:
    with pytest.raises(UnservableError) as refused:
        check_adapter(folder, **options)
    return refused.value.param


def test_an_adapter_of_peft_passes(adapter: Path, tiny_model_dir: Path) -> None:
    shapes = BaseModel.open("tiny", tiny_model_dir).shapes()
    info = check_adapter(adapter, max_rank=16, base_shapes=shapes)
    assert (info.rank, info.alpha, len(info.modules)) == (8, 32.0, 28)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("peft_type", "IA3"),
        ("target_modules", []),
        ("lora_alpha", None),
        ("r", 0),
        ("r", 64),
        ("rank_pattern", {"q_proj": 32}),
    ],
)
def test_what_the_engine_refuses_is_named(adapter: Path, field: str, value: Any) -> None:
    change_config(adapter, **{field: value})
    assert refusal(adapter, max_rank=16) == field


def test_another_bases_adapter_is_refused(adapter: Path) -> None:
    assert refusal(adapter, base_name="other") == "base_model_name_or_path"


def test_another_revision_of_the_base_is_refused_where_it_is_named(adapter: Path) -> None:
    check_adapter(adapter, base_revision="r1")
    change_config(adapter, revision="r1")
    check_adapter(adapter, base_revision="r1")
    assert refusal(adapter, base_revision="r2") == "revision"
    assert base_of(adapter)[1] == "r1"


def test_a_bases_shapes_are_read_of_its_files(adapter: Path, tiny_model_dir: Path) -> None:
    shapes = read_base_shapes(tiny_model_dir)
    assert shapes == BaseModel.open("tiny", tiny_model_dir).shapes()
    assert check_adapter(adapter, base_shapes=shapes).rank == 8


@pytest.mark.parametrize("config", ["", "[]", '{"quantization_config": {"bits": 4}}', None])
def test_a_base_that_says_nothing_of_its_shapes_is_not_compared(
    tmp_path: Path, tiny_model_dir: Path, config: str | None
) -> None:
    shutil.copyfile(tiny_model_dir / "model.safetensors", tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert read_base_shapes(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert read_base_shapes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert read_base_shapes(tmp_path) is None


def test_another_way_to_the_same_layers_is_followed(adapter: Path, tiny_model_dir: Path) -> None:
    shapes = read_base_shapes(tiny_model_dir)
    assert shapes is not None
    renamed = {key.replace("model.", "model.language_model."): each for key, each in shapes.items()}
    assert check_adapter(adapter, base_shapes=renamed).rank == 8
    turned = {key: each[::-1] for key, each in shapes.items()}
    assert "model.layers" in str(refusal(adapter, base_shapes=turned))
    change_config(adapter, fan_in_fan_out=True)
    assert check_adapter(adapter, base_shapes=turned).rank == 8


def test_modules_that_the_base_lacks_are_refused(adapter: Path, tiny_model_dir: Path) -> None:
    change_weights(
        adapter,
        lambda weights: {key.replace("layers.", "blocks."): each for key, each in weights.items()},
    )
    shapes = BaseModel.open("tiny", tiny_model_dir).shapes()
    assert "blocks.0" in str(refusal(adapter, base_shapes=shapes))


def test_shapes_of_another_base_are_refused(adapter: Path, tiny_model_dir: Path) -> None:
    change_weights(
        adapter,
        lambda weights: {
            key: each[:, : each.shape[1] // 2].copy() if "lora_A" in key else each
            for key, each in weights.items()
        },
    )
    shapes = BaseModel.open("tiny", tiny_model_dir).shapes()
    assert "model.layers" in str(refusal(adapter, base_shapes=shapes))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {
            key: np.zeros_like(each) if "lora_B" in key else each for key, each in w.items()
        },
        lambda w: {},
    ],
    ids=["untrained", "empty"],
)
def test_an_adapter_that_changes_nothing_is_refused(
    adapter: Path, change: Callable[[Weights], Weights]
) -> None:
    change_weights(adapter, change)
    assert refusal(adapter) == WEIGHTS_FILE


def test_values_that_are_no_numbers_are_refused(adapter: Path) -> None:
    def spoil(weights: Weights) -> Weights:
        next(iter(weights.values()))[0, 0] = np.nan
        return weights

    change_weights(adapter, spoil)
    assert "layers" in str(refusal(adapter))


def test_half_a_pair_is_refused(adapter: Path) -> None:
    def spoil(weights: Weights) -> Weights:
        return {key: each for key, each in weights.items() if "0.mlp.up_proj.lora_A" not in key}

    change_weights(adapter, spoil)
    assert refusal(adapter) == "model.layers.0.mlp.up_proj"


def test_a_broken_file_is_refused(adapter: Path) -> None:
    (adapter / WEIGHTS_FILE).write_bytes(b"not tensors")
    assert refusal(adapter) == WEIGHTS_FILE
    (adapter / CONFIG_FILE).write_text("{")
    assert refusal(adapter) == CONFIG_FILE
    (adapter / CONFIG_FILE).unlink()
    assert refusal(adapter) == CONFIG_FILE


def test_half_precision_is_read(adapter: Path, tiny_model_dir: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    path = adapter / WEIGHTS_FILE
    save_torch({key: each.to(torch.bfloat16) for key, each in load_torch(path).items()}, path)
    assert check_adapter(adapter).rank == 8
