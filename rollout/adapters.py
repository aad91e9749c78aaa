"""An adapter directory, checked against what vLLM can serve."""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from rollout.errors import UnservableError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
# Of a base's file: what says where its tensors are.
_LONGEST_HEADER = 100 << 20


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """`modules` are the base's modules that it changes; `rank` is the largest that occurs."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    parameters: int


def check_adapter(
    folder: Path,
    *,
    max_rank: int | None = None,
    base_name: str | None = None,
    base_revision: str | None = None,
    base_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> AdapterInfo:
    """Look at an adapter as the engine will, and at what the engine does not look at.

    The engine answers 200 for an adapter that matches no module of the base, and the result is
    the base under another name. What is None is not compared, nor is a revision that the adapter
    does not name. Raises UnservableError that names the field.
    """
    config = read_config(folder)
    rank = _check_config(config, max_rank)
    _check_base(config, base_name, base_revision)
    pairs, parameters = _read_weights(folder)
    _check_pairs(pairs, rank)
    if base_shapes is not None:
        _check_shapes(pairs, base_shapes, turned=bool(config.get("fan_in_fan_out")))
    return AdapterInfo(
        rank=rank,
        alpha=float(config["lora_alpha"]),
        modules=tuple(sorted(pairs)),
        parameters=parameters,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration as it stands there. Raises UnservableError where it can't be read."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise UnservableError(
            f"{folder} has no {CONFIG_FILE}: save the adapter with PEFT", param=CONFIG_FILE
        ) from exc
    except ValueError as exc:
        raise UnservableError(
            f"{folder / CONFIG_FILE} is no valid JSON: {exc}", param=CONFIG_FILE
        ) from exc
    if not isinstance(config, dict):
        raise UnservableError(f"{folder / CONFIG_FILE} is no JSON object", param=CONFIG_FILE)
    return config


def base_of(folder: Path) -> tuple[str | None, str | None]:
    """The base that an adapter says it was made for, and the revision of it."""
    config = read_config(folder)
    return config.get("base_model_name_or_path"), config.get("revision")


def read_base_shapes(folder: Path) -> Mapping[str, tuple[int, ...]] | None:
    """The shapes of a base's weights, of the headers of its safetensors files.

    None where they cannot be had there, or do not say what an adapter has to fit: in a quantized
    base they are those of packed integers.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("quantization_config"):
            return None
        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            shapes |= _header_shapes(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return shapes or None


def _header_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LONGEST_HEADER:
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(file.read(length))
    return {name: tuple(each["shape"]) for name, each in header.items() if name != "__metadata__"}


def _check_config(config: Mapping[str, Any], max_rank: int | None) -> int:
    """The largest rank, once nothing in the configuration stands against serving it."""
    kind = config.get("peft_type")
    if kind not in (None, "LORA"):
        raise UnservableError(
            f"peft_type = {kind!r}: the engine serves LORA only", param="peft_type"
        )
    for field, why in _REFUSED.items():
        if config.get(field):
            raise UnservableError(f"{field} = {config[field]!r}: {why}", param=field)
    if config.get("bias") not in (None, "none"):
        raise UnservableError(
            f"bias = {config['bias']!r}: the engine refuses adapters with biases", param="bias"
        )
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and str(start).lower().split("_")[0] in _BASE_CHANGING:
        raise UnservableError(
            f"init_lora_weights = {start!r}: it changes the base, which the engine does not; save it "
            "converted to plain LoRA",
            param="init_lora_weights",
        )
    if not config.get("target_modules"):
        raise UnservableError("target_modules is empty", param="target_modules")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise UnservableError(f"lora_alpha = {alpha!r}: it must be above 0", param="lora_alpha")
    return _largest_rank(config, max_rank)


def _check_base(
    config: Mapping[str, Any], base_name: str | None, base_revision: str | None
) -> None:
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if base_name is not None and name != base_name:
        raise UnservableError(
            f"base_model_name_or_path = {name!r}: the engine serves {base_name!r}",
            param="base_model_name_or_path",
        )
    if base_revision is not None and revision not in (None, base_revision):
        raise UnservableError(
            f"revision = {revision!r}: the engine serves revision {base_revision!r} of the base; train "
            "the adapter on that",
            param="revision",
        )


def _largest_rank(config: Mapping[str, Any], max_rank: int | None) -> int:
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(type(rank) is int and rank > 0 for rank in ranks):
        raise UnservableError(f"r = {ranks}: ranks are whole numbers above 0", param="r")
    rank = int(max(ranks))
    if max_rank is not None and rank > max_rank:
        field = "r" if rank == config["r"] else "rank_pattern"
        raise UnservableError(
            f"{field} = {rank}: the engine accepts ranks up to {max_rank}; raise its "
            "--max-lora-rank and `max_rank` in the configuration, or train with a smaller rank",
            param=field,
        )
    return rank


_REFUSED: Mapping[str, str] = {
    "use_dora": "the engine refuses DoRA adapters",
    "modules_to_save": "the engine refuses whole modules beside the adapter",
    "layer_replication": "the engine cannot replicate layers",
    "use_qalora": "the engine refuses QALoRA adapters",
    "alora_invocation_tokens": "the engine refuses activated LoRA",
    "trainable_token_indices": "the engine cannot serve new or changed tokens",
    "target_parameters": "the engine adapts modules, not single parameters",
}
_BASE_CHANGING = frozenset({"pissa", "olora", "corda", "loftq", "eva"})

Shape = tuple[int, ...]


def _read_weights(folder: Path) -> tuple[dict[str, dict[str, Shape]], int]:
    """For each module of the base the shapes of its A and B, and how many numbers there are."""
    pairs: dict[str, dict[str, Shape]] = {}
    parameters = 0
    changed = False
    for key, values in _tensors(folder / WEIGHTS_FILE):
        module, letter = _split_key(key)
        if not np.isfinite(values).all():
            raise UnservableError(f"{key} holds values that are no numbers", param=key)
        changed = changed or (letter == "B" and bool(values.any()))
        pairs.setdefault(module, {})[letter] = values.shape
        parameters += values.size
    if not changed:
        raise UnservableError(
            "all lora_B weights are zero: the adapter changes nothing, it was not trained",
            param=WEIGHTS_FILE,
        )
    return pairs, parameters


def _tensors(path: Path) -> Iterator[tuple[str, NDArray[np.generic]]]:
    try:
        tensors = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as exc:
        raise UnservableError(f"{path} cannot be read: {exc}", param=WEIGHTS_FILE) from exc
    for name, tensor in sorted(tensors, key=lambda each: each[0]):
        kind = tensor["dtype"]
        if kind not in _READ_AS:
            raise UnservableError(f"{name} is of type {kind}: save it as floats", param=name)
        values = np.frombuffer(tensor["data"], dtype=_READ_AS[kind])
        if kind == "BF16":
            # The upper half of a float32.
            values = (values.astype(np.uint32) << 16).view(np.float32)
        yield name, values.reshape(tensor["shape"])


_READ_AS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def _split_key(key: str) -> tuple[str, str]:
    for letter in ("A", "B"):
        ending = f".lora_{letter}.weight"
        if key.startswith(_PREFIX) and key.endswith(ending):
            return key[len(_PREFIX) : -len(ending)], letter
    raise UnservableError(
        f"{key}: the engine reads {_PREFIX}….lora_A.weight and ….lora_B.weight only", param=key
    )


def _check_pairs(pairs: Mapping[str, Mapping[str, Shape]], rank: int) -> None:
    for module, shapes in pairs.items():
        if set(shapes) != {"A", "B"}:
            raise UnservableError(f"{module} has only lora_{next(iter(shapes))}", param=module)
        inner = shapes["A"][0]
        if inner != shapes["B"][1] or inner > rank:
            raise UnservableError(
                f"{module}: lora_A {shapes['A']} and lora_B {shapes['B']} do not fit each other at "
                f"rank {rank}",
                param=module,
            )


def _check_shapes(
    pairs: Mapping[str, Mapping[str, Shape]], base_shapes: Mapping[str, Shape], *, turned: bool
) -> None:
    # A checkpoint may name the way to its layers otherwise than the code that adapts them.
    by_tail: dict[str, set[Shape]] = {}
    for name, shape in base_shapes.items():
        by_tail.setdefault(_tail(name.removesuffix(".weight")), set()).add(shape)
    for module, shapes in pairs.items():
        there = base_shapes.get(f"{module}.weight")
        wanted = by_tail.get(_tail(module), set()) if there is None else {there}
        if not wanted:
            raise UnservableError(
                f"{module} is not in the base: the engine would leave it out without a word",
                param=module,
            )
        fits = (shapes["B"][0], shapes["A"][1])
        if fits not in wanted and not (turned and fits[::-1] in wanted):
            sizes = " or ".join(str(shape) for shape in sorted(wanted))
            raise UnservableError(
                f"{module}: the adapter is for a matrix of {fits}, the base's has {sizes}: it was "
                "trained on another base",
                param=module,
            )


def _tail(module: str) -> str:
    """From the first numbered layer on: `layers.0.mlp.up_proj`; its last word where it has none."""
    found = re.search(r"[^.]+\.\d+\..+", module)
    return found[0] if found else module.rpartition(".")[2]
