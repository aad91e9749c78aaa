"""A chat template to token ids and loss weights: answers alone are learnt, stop tokens included."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.errors import InvalidInputError
from rollout.versions import Prompt

Message = Mapping[str, Any]
# What the chat template is given for a prompt, beside its messages and tools.
TEMPLATE_ARGUMENTS: Mapping[str, Any] = {"add_generation_prompt": True}


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example as the model sees it.

    `ids[answer_start:]` is what it learns, each token with its weight; None is 1 for all of them.
    A weight of 0 is not learnt: the messages between two answers of a conversation.
    """

    ids: tuple[int, ...]
    answer_start: int
    weights: tuple[float, ...] | None = None

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[: self.answer_start]

    @property
    def answer(self) -> tuple[int, ...]:
        return self.ids[self.answer_start :]

    def learnt(self) -> Iterator[tuple[int, float]]:
        """The place and the weight of each token that counts."""
        for place in range(self.answer_start, len(self.ids)):
            weight = 1.0 if self.weights is None else self.weights[place - self.answer_start]
            if weight:
                yield place, weight


class MaskError(InvalidInputError):
    """The template and the tokenizer would teach something else than the answer."""

    code = "mask_lint"


class TooLongError(InvalidInputError):
    """The example doesn't fit; training on a cut answer would teach to stop too late."""

    code = "too_long"


def with_prompt(messages: Sequence[Message], prompt: Prompt | None) -> list[Message]:
    """The messages that the engine is sent for a version that carries `prompt`."""
    if prompt is None:
        return list(messages)
    if prompt.mode == "prepend":
        return [*prompt.messages, *messages]
    own = [each for each in messages if each.get("role") not in ("system", "developer")]
    return [*prompt.messages, *own]


def render_prompt(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Message] | None = None
) -> tuple[int, ...]:
    """The token ids that serving renders for these messages, up to where the answer begins."""
    return _template(tokenizer, messages, tools, add_generation_prompt=True)


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    answer: str | Message,
    *,
    stops: frozenset[int],
    max_length: int,
    tools: Sequence[Message] | None = None,
) -> Rendered:
    """Render one example and lint its mask.

    `answer` is a text, or an assistant's message (which may call tools). It counts with its
    `weight`, 1 where it has none; an earlier message of the assistant is learnt too where it has
    a `weight` above 0. `stops` are the ids that end an answer when the engine generates.

    Raises MaskError where the model would learn nothing, would not learn to stop, or would see
    another prompt in training than in serving; TooLongError where the example has more than
    `max_length` tokens.
    """
    last: Message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    conversation = [*messages, last]
    whole = _template(tokenizer, conversation, tools)
    pieces: list[tuple[int, int, float]] = []
    for place, message in enumerate(conversation):
        default = 1.0 if place == len(messages) else 0.0
        if weight := _weight(message, default, place):
            start = _answer_start(tokenizer, conversation[:place], tools, whole)
            learnt = _up_to_stop(whole[start:], stops)
            _lint(tokenizer, learnt, message)
            pieces.append((start, start + len(learnt), weight))
    if not pieces:
        raise MaskError("the mask is empty: every message of the assistant has the weight 0")
    end = pieces[-1][1]
    if end > max_length:
        raise TooLongError(f"{end} tokens are more than {max_length}")
    return _assemble(whole[:end], pieces)


def stop_ids(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """The tokens at which the engine ends an answer: the tokenizer's, and the base's own."""
    named = getattr(generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return frozenset(int(each) for each in [*ids, tokenizer.eos_token_id] if each is not None)


def _weight(message: Message, default: float, place: int) -> float:
    if message.get("role") != "assistant":
        return 0.0
    weight = message.get("weight", default)
    if weight is None:
        return default
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 100:
        raise MaskError(f"message {place + 1}: weight = {weight!r}: give a number from 0 to 100")
    return float(weight)


def _answer_start(
    tokenizer: Any,
    before: Sequence[Message],
    tools: Sequence[Message] | None,
    whole: tuple[int, ...],
) -> int:
    """Where the answer begins that follows these messages."""
    prompt = render_prompt(tokenizer, before, tools)
    if whole[: len(prompt)] != prompt:
        raise MaskError(
            "the chat template renders the prompt differently in training than in serving: the "
            f"{len(prompt)} tokens before the answer are not the beginning of the whole conversation"
        )
    return len(prompt)


def _assemble(ids: tuple[int, ...], pieces: Sequence[tuple[int, int, float]]) -> Rendered:
    start = pieces[0][0]
    if len(pieces) == 1 and pieces[0][2] == 1.0:
        return Rendered(ids, start)
    weights = [0.0] * (len(ids) - start)
    for first, end, weight in pieces:
        weights[first - start : end - start] = [weight] * (end - first)
    return Rendered(ids, start, tuple(weights))


def _template(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Message] | None,
    *,
    add_generation_prompt: bool = False,
) -> tuple[int, ...]:
    try:
        ids = tokenizer.apply_chat_template(
            [_as_served(message) for message in messages],
            tools=[dict(tool) for tool in tools] if tools else None,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
        )
    except Exception as exc:  # templates raise whatever their author chose
        raise MaskError(f"the chat template refuses these messages: {exc}") from exc
    return tuple(int(each) for each in ids)


def _as_served(message: Message) -> dict[str, Any]:
    """The message as the engine hands it to the template: arguments of tools as objects."""
    served = {name: value for name, value in message.items() if name != "weight"}
    if calls := served.get("tool_calls"):
        served["tool_calls"] = [_parsed(call) for call in calls]
        served["content"] = served.get("content") or ""
    return served


def _parsed(call: Message) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except ValueError as exc:
            raise MaskError(
                f"the arguments of a tool call are no JSON: {arguments[:60]!r}"
            ) from exc
    return {**call, "function": function}


def _up_to_stop(ids: tuple[int, ...], stops: frozenset[int]) -> tuple[int, ...]:
    """The answer with the first stop token; what templates put behind it is never generated."""
    for place, each in enumerate(ids):
        if each in stops:
            return ids[: place + 1]
    raise MaskError(
        "the stop token would not be trained: the chat template ends the answer with "
        f"{list(ids[-3:])}, but generation stops at {sorted(stops)}"
    )


def _lint(tokenizer: Any, learnt: tuple[int, ...], message: Message) -> None:
    if len(learnt) < 2:
        raise MaskError("the mask is empty: no token of the answer would be trained")
    text = tokenizer.decode(learnt[:-1], skip_special_tokens=False).strip()
    answer = str(message.get("content") or "").strip()
    calls = message.get("tool_calls")
    if calls:
        _lint_calls(text, calls)
    # Around tool calls a template puts what it likes; without them the text is all there is.
    if answer not in text if calls else answer != text:
        raise MaskError(
            f"the chat template changes the answer: {answer[:60]!r} becomes {text[:60]!r}"
        )


def _lint_calls(text: str, calls: Sequence[Message]) -> None:
    for call in calls:
        function = _parsed(call)["function"]
        names = [str(function.get("name")), *(function.get("arguments") or {})]
        missing = [name for name in names if name not in text]
        if missing:
            raise MaskError(
                f"the chat template leaves out {missing[0]!r} of the tool call to "
                f"{function.get('name')}: calls would not be learnt; use a base whose template "
                "writes tool calls"
            )
