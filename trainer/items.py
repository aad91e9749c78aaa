"""Rows of a dataset as what a method learns from: rendered, linted, paired."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rollout.datasets import Dataset, Example, Split
from rollout.errors import InvalidInputError, SluiceError
from rollout.versions import Prompt
from trainer.config import TrainingConfig
from trainer.methods.orpo import prompt_learnt_too
from trainer.packing import Item
from trainer.rendering import Message, Rendered, TooLongError, render, with_prompt


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders answers as a run does: `prompt` is what the new version puts before the messages."""

    tokenizer: Any
    stops: frozenset[int]
    prompt: Prompt | None
    max_length: int

    def __call__(
        self,
        case: str,
        messages: Sequence[Message],
        answer: str | Message,
        tools: Sequence[Message] = (),
    ) -> Rendered | None:
        """None where it is too long. Raises MaskError that names the case."""
        try:
            return render(
                self.tokenizer,
                with_prompt(messages, self.prompt),
                answer,
                stops=self.stops,
                max_length=self.max_length,
                tools=tools or None,
            )
        except TooLongError:
            return None
        except SluiceError as exc:
            exc.message = f"case {case}: {exc.message}"
            raise


def answer_of(row: Example) -> Message:
    """The right answer as the assistant's message, with what it counts."""
    answer: dict[str, Any] = {"role": "assistant", "content": row.gold, "weight": row.weight}
    if row.calls:
        answer["tool_calls"] = [dict(call) for call in row.calls]
    return answer


def items_of(
    dataset: Dataset, split: Split, renderer: Renderer, config: TrainingConfig
) -> tuple[list[Item], int]:
    """What the method learns from that split, and how many rows were too long for it."""
    match config.method:
        case "sft" | "distill":
            found = list(_answers(dataset, split, renderer))
        case "dpo" | "ipo" | "orpo":
            found = list(_pairs(dataset, split, renderer, config))
        case "kto":
            found = list(_singles(dataset, split, renderer))
    items = [each for each in found if each is not None]
    if config.method == "kto":
        items = with_mismatched(items)
    return items, len(found) - len(items)


def check_items(items: Sequence[Item], too_long: int, config: TrainingConfig) -> None:
    """Raises InvalidInputError where there are too few, or of one kind where two are compared."""
    if len(items) < config.minimum_rows:
        why = ""
        if too_long:
            why += f"; {too_long} have more than max_length = {config.max_length} tokens"
        if config.method not in ("sft", "distill"):
            why += f"; {config.method} learns from answers that a person refused: label more cases"
        raise InvalidInputError(
            f"{len(items)} rows are left to train on, and {config.minimum_rows} are needed{why}",
            param="max_length" if too_long else "minimum_rows",
        )
    if config.method == "kto" and len({item.desirable for item in items}) < 2:
        raise InvalidInputError(
            "method = 'kto' learns from right and from wrong answers, and the labels have one kind "
            "only: label more cases, or take method = 'sft'",
            param="method",
        )


def _answers(dataset: Dataset, split: Split, renderer: Renderer) -> Iterator[Item | None]:
    for row in dataset.split(split):
        rendered = renderer(row.case, row.messages, answer_of(row), row.tools)
        yield None if rendered is None else Item((rendered,))


def _pairs(
    dataset: Dataset, split: Split, renderer: Renderer, config: TrainingConfig
) -> Iterator[Item | None]:
    for row in dataset.preferences(split):
        chosen, rejected = (
            renderer(row.case, _unlearnt(row.prompt), answer, row.tools)
            for answer in (row.chosen, row.rejected)
        )
        if chosen is None or rejected is None:
            yield None
        else:
            yield pair(chosen, rejected, config, weight=row.weight)


def pair(
    chosen: Rendered, rejected: Rendered, config: TrainingConfig, *, weight: float = 1.0
) -> Item:
    """Two answers to a prompt, as DPO, IPO and ORPO compare them."""
    if config.method == "orpo" and config.orpo_learns == "all":
        return Item((chosen, rejected, prompt_learnt_too(chosen)), weight=weight)
    if config.method == "dpo" and config.ld_alpha != 1.0:
        shorter = min(len(chosen.answer), len(rejected.answer))
        chosen, rejected = (
            replace(each, weights=_tail_weighted(len(each.answer), shorter, config.ld_alpha))
            for each in (chosen, rejected)
        )
    return Item((chosen, rejected), weight=weight)


def _singles(dataset: Dataset, split: Split, renderer: Renderer) -> Iterator[Item | None]:
    for row in dataset.unpaired(split):
        rendered = renderer(row.case, _unlearnt(row.prompt), row.answer, row.tools)
        if rendered is None:
            yield None
        else:
            yield Item((rendered,), desirable=row.desirable, weight=row.weight)


def with_mismatched(items: Sequence[Item]) -> list[Item]:
    """Each item's prompt once more with the answer of the item before it."""
    return [
        replace(item, examples=(item.examples[0], _joined(item, items[place - 1])))
        for place, item in enumerate(items)
    ]


def _joined(item: Item, other: Item) -> Rendered:
    own = item.examples[0]
    return Rendered(own.prompt + other.examples[0].answer, own.answer_start)


def _unlearnt(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    """Where answers are compared, what was said earlier is a part of the prompt."""
    return [{name: each[name] for name in each if name != "weight"} for each in messages]


def _tail_weighted(length: int, shared: int, weight: float) -> tuple[float, ...]:
    # A weight of nothing at all would take the token out, and with it the answer's length.
    return tuple(1.0 if place < shared else max(weight, 1e-12) for place in range(length))
