"""Which split a cluster of prompts belongs to, and what keeps it there."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from rollout.datasets import Split

# What is evaluated on comes first: where two rows must not both stay, it is the one that stays.
ORDER: Final[tuple[Split, ...]] = ("heldout", "validation", "train")


@dataclass(frozen=True, slots=True)
class Places:
    """Where earlier datasets of a route put its prompts.

    `anchors` gives each prompt's digest that of the prompt which its cluster is split by; `held`
    are the anchors that were ever held out, which no later dataset trains on.
    """

    anchors: Mapping[str, str] = field(default_factory=dict)
    held: frozenset[str] = frozenset()

    def split(self, anchor: str, *, heldout: float, validation: float) -> Split:
        if anchor in self.held:
            return "heldout"
        return split_of(anchor, heldout=heldout, validation=validation)


NOWHERE: Final = Places()


def split_of(cluster: str, *, heldout: float, validation: float = 0.0) -> Split:
    """Where a cluster belongs, by its hash alone. A larger share only adds to its split."""
    bucket = int.from_bytes(hashlib.sha256(f"split:{cluster}".encode()).digest()[:8], "big") / 2**64
    if bucket < heldout:
        return "heldout"
    return "validation" if bucket >= 1 - validation else "train"
