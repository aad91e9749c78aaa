"""A base model on disk: the hashes that pin it, and the shapes that an adapter must fit."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.errors import InvalidInputError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """`name` is what the engine calls it. `path` is where the trainer reads it."""

    name: str
    path: Path

    @classmethod
    def open(cls, name: str, path: Path) -> "BaseModel":
        """Raises InvalidInputError where there is no model."""
        if not (path / "config.json").is_file():
            raise InvalidInputError(
                f"there is no model in {path} (no config.json): put the weights of {name!r} there "
                f"(`make model` does for the sample), or name their directory under [trainer.models]",
                param=f"trainer.models.{name}",
            )
        return cls(name, path)

    @property
    def weight_files(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))

    def pins(self) -> Mapping[str, str]:
        """The sha256 of the weights, the tokenizer and the chat template."""
        return {
            "weights": _hash_files(self.weight_files),
            "config": _hash_files([self.path / "config.json"]),
            "tokenizer": _hash_files(
                self.path / name for name in _TOKENIZER_FILES if (self.path / name).is_file()
            ),
            "chat_template": hashlib.sha256(self._chat_template().encode()).hexdigest(),
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each weight by its name, out of the files' headers."""
        from safetensors import safe_open

        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.weight_files:
            with safe_open(path, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        return shapes

    def _chat_template(self) -> str:
        beside = self.path / "chat_template.jinja"
        if beside.is_file():
            return beside.read_text(encoding="utf-8")
        settings = self.path / "tokenizer_config.json"
        held: dict[str, Any] = json.loads(settings.read_text()) if settings.is_file() else {}
        return json.dumps(held.get("chat_template", ""), sort_keys=True)


def _hash_files(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name}\0{digest}\n".encode())
    return total.hexdigest()
