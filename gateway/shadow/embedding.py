"""Embeddings in this process, by a small static model in a directory, where model2vec is installed."""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol


class Embedder(Protocol):
    """Gives one vector for each text."""

    def encode(self, sentences: Sequence[str]) -> Iterable[Iterable[float]]: ...


class LocalModels:
    """Models by their directory, each loaded when it is first asked for."""

    def __init__(self) -> None:
        self._models: dict[str, Embedder] = {}

    async def embed(self, path: str, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        """Raises ImportError where model2vec is missing, OSError or ValueError where the directory
        holds no model."""
        if path not in self._models:
            self._models[path] = await asyncio.to_thread(_load, path)
        vectors = await asyncio.to_thread(self._models[path].encode, texts)
        return [[float(number) for number in vector] for vector in vectors]


def _load(path: str) -> Embedder:
    # Loaded only where a route asks for it: it is no dependency of a gateway.
    from model2vec import StaticModel

    # What is no directory here would be looked for on the internet.
    if not Path(path).is_dir():
        raise FileNotFoundError(path)
    model: Embedder = StaticModel.from_pretrained(path)
    return model
