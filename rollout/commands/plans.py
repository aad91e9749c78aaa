"""Plans in files: reading one, and telling on which line the control API found fault with it."""

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.errors import InvalidInputError, SluiceError
from rollout.lines import line_of


@dataclass(frozen=True, slots=True)
class PlanFile:
    """`plan` is the file as the API takes it, `steps` and what holds for all of them."""

    path: Path
    text: str
    plan: Mapping[str, Any]

    @contextmanager
    def blamed(self, under: str) -> Iterator[None]:
        """Name the line of what the API refuses below the field `under`."""
        try:
            yield
        except SluiceError as exc:
            if exc.param is None or not exc.param.startswith(f"{under}."):
                raise
            key = exc.param.removeprefix(f"{under}.")
            line = line_of(self.text, [int(p) if p.isdecimal() else p for p in key.split(".")])
            where = self.path if line is None else f"{self.path}, line {line}"
            message = exc.message.removeprefix(f"{exc.param}: ")
            raise InvalidInputError(f"{where}: {key}: {message}", param=exc.param) from exc


def read_plan(path: Path) -> PlanFile:
    """Raises InvalidInputError where it cannot be read, or is no TOML with steps in it."""
    try:
        text = path.read_text(encoding="utf-8")
        plan = tomllib.loads(text)
    except OSError as exc:
        raise InvalidInputError(f"cannot read the plan {path}: {exc.strerror or exc}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise InvalidInputError(f"{path} is no valid TOML: {exc}") from exc
    if "steps" not in plan:
        raise InvalidInputError(
            f"{path} has no steps: write steps = [1, 10, 50], or a table [[steps]] for each"
        )
    return PlanFile(path, text, plan)
