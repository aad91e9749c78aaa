"""The formats of other programs, by name."""

from typing import Final, Literal, get_args

Format = Literal[
    "rows",
    "openai-chat",
    "openai-preference",
    "trl-messages",
    "trl-prompt-completion",
    "trl-preference",
    "trl-unpaired",
    "axolotl-conversations",
    "axolotl-alpaca",
    "axolotl-preference",
]
FORMATS: Final[tuple[Format, ...]] = get_args(Format)
# `rows` is our own, and comes with splits that an import would not keep.
IMPORTED: Final[tuple[Format, ...]] = tuple(name for name in FORMATS if name != "rows")
