"""Chat template to token ids and a loss mask: the answer alone is learnt, its stop token included."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.errors import InvalidInputError
from rollout.versions import Prompt

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example as the model sees it. `ids[answer_start:]` is what it learns."""

    ids: tuple[int, ...]
    answer_start: int

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[: self.answer_start]

    @property
    def answer(self) -> tuple[int, ...]:
        return self.ids[self.answer_start :]


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


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """The token ids that serving renders for these messages, up to where the answer begins."""
    return _template(tokenizer, messages, add_generation_prompt=True)


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    answer: str,
    *,
    stops: frozenset[int],
    max_length: int,
) -> Rendered:
    """Render one example and lint its mask.

    `stops` are the ids that end an answer when the engine generates. Raises MaskError where the
    model would learn nothing, would not learn to stop, or would see another prompt in training
    than in serving; TooLongError where the example has more than `max_length` tokens.
    """
    prompt = render_prompt(tokenizer, messages)
    whole = _template(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    if whole[: len(prompt)] != prompt:
        raise MaskError(
            "the chat template renders the prompt differently in training than in serving: the "
            f"{len(prompt)} tokens before the answer are not the beginning of the whole conversation"
        )
    learnt = _up_to_stop(whole[len(prompt) :], stops)
    _lint(tokenizer, learnt, answer)
    if len(prompt) + len(learnt) > max_length:
        raise TooLongError(f"{len(prompt) + len(learnt)} tokens are more than {max_length}")
    return Rendered(ids=prompt + learnt, answer_start=len(prompt))


def stop_ids(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """The tokens at which the engine ends an answer: the tokenizer's, and the base's own."""
    named = getattr(generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return frozenset(int(each) for each in [*ids, tokenizer.eos_token_id] if each is not None)


def _template(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> tuple[int, ...]:
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
        )
    except Exception as exc:  # templates raise whatever their author chose
        raise MaskError(f"the chat template refuses these messages: {exc}") from exc
    return tuple(int(each) for each in ids)


def _up_to_stop(ids: tuple[int, ...], stops: frozenset[int]) -> tuple[int, ...]:
    """The answer with the first stop token; what templates put behind it is never generated."""
    for place, each in enumerate(ids):
        if each in stops:
            return ids[: place + 1]
    raise MaskError(
        "the stop token would not be trained: the chat template ends the answer with "
        f"{list(ids[-3:])}, but generation stops at {sorted(stops)}"
    )


def _lint(tokenizer: Any, learnt: tuple[int, ...], answer: str) -> None:
    if len(learnt) < 2:
        raise MaskError("the mask is empty: no token of the answer would be trained")
    text = tokenizer.decode(learnt[:-1], skip_special_tokens=False)
    if text.strip() != answer.strip():
        raise MaskError(
            f"the chat template changes the answer: {answer.strip()[:60]!r} becomes "
            f"{text.strip()[:60]!r}"
        )
