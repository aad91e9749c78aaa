"""The best prompt with examples that a route's own training rows make, found without a suite."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trainer.dataset import Dataset, Example
from trainer.evaluate import Messages
from trainer.suites import Suite, SuiteRow, infer_choices, make_suite

# Examples cost tokens with each request; an example longer than this is no example.
_LONGEST_EXAMPLE: Final = 1200
_MOST_SHOTS: Final = 12
_SHOTS_OF_TEXTS: Final = (2, 4)


@dataclass(frozen=True, slots=True)
class Shot:
    """A training row that can stand in a prompt: one question, one answer."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Candidates:
    """Prompts to choose from, and rows to choose by: of the dataset, in none of the prompts."""

    prompts: tuple[Messages, ...]
    suite: Suite


def candidates(route: str, dataset: Dataset, schema: str | None, rows: int) -> Candidates | None:
    """A few instructions and sets of examples, the same each time; None where rows are too few.

    Examples are of the training split; the rows that choose are of the validation split, filled
    up from the training split. What is held out takes no part.
    """
    train = [row for row in dataset.split("train") if not row.calls]
    examples = _examples(train)
    choices = None if schema else infer_choices(row.gold for row in dataset.rows if not row.calls)
    prompts = _prompts(examples, choices, schema)
    used = {example.id for prompt in prompts for example in prompt.examples}
    judging = [row for row in dataset.split("validation") if not row.calls]
    spare = sorted((row for row in train if row.case not in used), key=lambda row: _order(row.case))
    judging = (sorted(judging, key=lambda row: _order(row.case)) + spare)[:rows]
    if not prompts or not judging:
        return None
    suite = make_suite(
        route, [SuiteRow(row.case, row.messages, row.gold, choices, schema) for row in judging]
    )
    return Candidates(tuple(each.messages for each in prompts), suite)


def best(rights: Sequence[int], prompts: Sequence[Messages]) -> int:
    """The place of the prompt under which most rows are right; of equals, the shortest."""
    return min(range(len(prompts)), key=lambda place: (-rights[place], _length(prompts[place])))


@dataclass(frozen=True, slots=True)
class _Prompt:
    messages: Messages
    examples: tuple[Shot, ...] = ()


def _prompts(
    examples: Sequence[Shot], choices: Sequence[str] | None, schema: str | None
) -> list[_Prompt]:
    instruction = _instruction(choices, schema)
    found = [_Prompt((instruction,))]
    for shots in _shots(examples, choices):
        found.append(_Prompt(_turns(shots), tuple(shots)))
        found.append(_Prompt((instruction, *_turns(shots)), tuple(shots)))
    return found if examples else found[:1]


def _instruction(choices: Sequence[str] | None, schema: str | None) -> Mapping[str, str]:
    if choices:
        text = f"Answer with one of these and nothing else: {', '.join(choices)}."
    elif schema:
        text = f"Answer with JSON alone, which satisfies this schema: {schema}"
    else:
        text = "Answer as shortly and exactly as possible, in the form that is asked for."
    return {"role": "system", "content": text}


def _shots(examples: Sequence[Shot], choices: Sequence[str] | None) -> list[list[Shot]]:
    """Sets of examples. Small models lean to the class of the last one, so the order varies."""
    if choices is None:
        shortest = sorted(examples, key=lambda each: (len(each.question), each.id))
        middle = shortest[len(shortest) // 4 :]
        found = [list(examples[:count]) for count in _SHOTS_OF_TEXTS]
        return [shots for shots in (*found, middle[: _SHOTS_OF_TEXTS[0]]) if shots]
    by_class: dict[str, list[Shot]] = defaultdict(list)
    for example in examples:
        by_class[example.answer].append(example)
    classes = sorted(by_class)
    wanted = ((classes, range(1)), (classes[::-1], range(1, 2)), (classes, range(2)))
    sets = [
        [by_class[name][turn % len(by_class[name])] for turn in turns for name in order]
        for order, turns in wanted
    ]
    return [list(dict.fromkeys(shots)) for shots in sets if 0 < len(shots) <= _MOST_SHOTS]


def _turns(shots: Sequence[Shot]) -> Messages:
    return tuple(
        {"role": role, "content": content}
        for shot in shots
        for role, content in (("user", shot.question), ("assistant", shot.answer))
    )


def _examples(rows: Sequence[Example]) -> list[Shot]:
    """Rows with one question, those first on which all labels agree, then by their hash."""
    found: list[tuple[float, bytes, Shot]] = []
    for row in rows:
        asked = [each for each in row.messages if each["role"] != "system"]
        if len(asked) != 1 or asked[0]["role"] != "user":
            continue
        question = asked[0]["content"]
        if isinstance(question, str) and 0 < len(question) + len(row.gold) <= _LONGEST_EXAMPLE:
            found.append((-row.weight, _order(row.case), Shot(row.case, question, row.gold)))
    return [shot for _, _, shot in sorted(found, key=lambda each: each[:2])]


def _order(identity: str) -> bytes:
    return hashlib.sha256(f"prompt:{identity}".encode()).digest()


def _length(prompt: Messages) -> int:
    return sum(len(str(each["content"])) for each in prompt)
